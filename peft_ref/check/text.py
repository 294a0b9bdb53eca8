"""Operations about text: which modules a configuration targets, what it means for each of them, under which keys an adapter is saved.

    targets      modules, config, model  -> {"modules": [names]} or {"error": why}
    config       adapter_config, modules -> {"modules": {name: {"r": ..., "scaling": ...}}}
    state_dict   adapter_config, modules -> {"tensors": {key: array}}

What the last two ask about prompts is in `prompt_sizes` and `prompt_saved`, about attention in `attending_text`.
There is no tolerance here: names and keys are equal or not. What is wrong is compared with the known ways of being wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from peft_ref.attending import AttentionMethod
from peft_ref.check.attending_text import grade_blocks, right_added, right_blocks
from peft_ref.check.case import Case, as_json, decode, encode, layer_from_json
from peft_ref.check.mistakes import SUITES
from peft_ref.check.prompt_saved import grade_saved, right_saved
from peft_ref.check.prompt_sizes import grade_sizes, right_sizes
from peft_ref.check.text_mistakes import KEY_MISTAKES, TARGET_MISTAKES, config_mistakes
from peft_ref.errors import TargetError
from peft_ref.files.adapter import AdapterModule, spanned, state_dict
from peft_ref.files.config import from_dict
from peft_ref.methods import METHODS


def right_text(case: Case) -> dict[str, Any]:
    """The right answer to a text case."""
    if case.method in METHODS.prompts:
        return _RIGHT_OF_PROMPTS[case.operation](case)
    if case.method in METHODS.attention and case.operation == "config":
        return right_blocks(case)
    return right_config(case, case.question) if case.operation == "config" else _RIGHT[case.operation](case.question)


def grade_text(case: Case, answer: Mapping[str, Any]) -> str:
    """What is wrong with a port's answer; an empty string if nothing is."""
    if case.method in METHODS.attention and case.operation == "config":
        return grade_blocks(case, answer)
    return (_GRADE_OF_PROMPTS if case.method in METHODS.prompts else _GRADE)[case.operation](case, answer)


def right_targets(question: Mapping[str, Any]) -> dict[str, Any]:
    from peft_ref.check.target_graph import matched_names

    try:
        return {"modules": matched_names(question["modules"], question["config"], question["model"])}
    except TargetError as error:
        return {"error": str(error)}


def right_config(case: Case, question: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says about each module: its rank and scale, or what its method has instead."""
    files, config = SUITES[case.method].files, from_dict(question["adapter_config"])
    assert files is not None
    methods = {name: config.method_for(name) for name in question["modules"]}
    return {
        "modules": {name: {word: as_json(getattr(method, held)) for word, held in files.told.items()} for name, method in methods.items()}
    }


def right_state_dict(question: Mapping[str, Any]) -> dict[str, Any]:
    config = from_dict(question["adapter_config"])
    if isinstance(config.method, AttentionMethod):
        return right_added(question)
    config = spanned(config, {module["name"]: layer_from_json(module["layer"]) for module in question["modules"]}, {})
    modules = {}
    for module in question["modules"]:
        method, layer = config.method_for(module["name"]), layer_from_json(module["layer"])
        tensors = {key: np.asarray(decode(value), dtype=np.float64) for key, value in module["tensors"].items()}
        modules[module["name"]] = AdapterModule(method, layer, method.unpack(layer, tensors))
    return {"tensors": {key: encode(value) for key, value in state_dict(modules).items()}}


def _grade_targets(case: Case, answer: Mapping[str, Any]) -> str:
    right = right_targets(case.question)
    if "error" in right:
        return "" if "error" in answer else "nothing matches, which must be refused with an error; the answer has none"
    if "error" in answer:
        return f"the port refuses what must be accepted: {str(answer['error'])[:200]}"
    got = answer.get("modules")
    if not isinstance(got, list) or not all(isinstance(name, str) for name in got):
        return 'the answer must hold "modules", a list of names'
    if set(got) == set(right["modules"]):
        return ""
    for name, (sentence, wrong) in TARGET_MISTAKES.items():
        if set(got) == wrong(case.question):
            return f"{name}: {sentence}"
    missing, extra = sorted(set(right["modules"]) - set(got)), sorted(set(got) - set(right["modules"]))
    return "; ".join(part for part in (_listed("missing", missing), _listed("too many", extra)) if part)


def _grade_config(case: Case, answer: Mapping[str, Any]) -> str:
    right, got = right_config(case, case.question)["modules"], answer.get("modules")
    if not isinstance(got, dict):
        return 'the answer must hold "modules", an object of what each module has'
    if _same_meaning(right, got):
        return ""
    for name, (sentence, question) in config_mistakes(case.question).items():
        if _same_meaning(right_config(case, question)["modules"], got):
            return f"{name}: {sentence}"
    for module, want in right.items():
        if not _same_meaning({module: want}, {module: got.get(module)}):
            return f"{module} has {got.get(module)}, expected {want}"
    return ""


def _same_meaning(want: Mapping[str, Any], got: Mapping[str, Any]) -> bool:
    for module, fields in want.items():
        have = got.get(module)
        if not isinstance(have, Mapping):
            return False
        for key, value in fields.items():
            number = have.get(key)
            if isinstance(value, str | list | None):
                if key not in have or number != value:
                    return False
                continue
            if not isinstance(number, int | float) or abs(number - value) > 1e-6 * abs(value):
                return False
    return True


def _grade_state_dict(case: Case, answer: Mapping[str, Any]) -> str:
    right, got = right_state_dict(case.question)["tensors"], answer.get("tensors")
    if not isinstance(got, dict):
        return 'the answer must hold "tensors", an object of arrays under their keys'
    if got.keys() != right.keys():
        for name, (sentence, rename) in KEY_MISTAKES.items():
            if set(got) == {rename(key, case.question["adapter_name"]) for key in right}:
                return f"{name}: {sentence}"
        missing, extra = sorted(right.keys() - got.keys()), sorted(got.keys() - right.keys())
        return "; ".join(part for part in (_listed("missing", missing), _listed("too many", extra)) if part)
    for key, want in right.items():
        a, b = np.asarray(decode(want)), np.asarray(decode(got[key]))
        if a.shape != b.shape:
            return f"{key} has the shape {b.shape}, expected {a.shape}"
        if not np.array_equal(a, b):
            return f"{key} holds other numbers than it was given"
    return ""


def _listed(what: str, names: list[str]) -> str:
    return f"{what}: {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}" if names else ""


_RIGHT: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "targets": right_targets,
    "state_dict": right_state_dict,
}
_GRADE: dict[str, Callable[[Case, Mapping[str, Any]], str]] = {
    "targets": _grade_targets,
    "config": _grade_config,
    "state_dict": _grade_state_dict,
}
_RIGHT_OF_PROMPTS: dict[str, Callable[[Case], dict[str, Any]]] = {"config": right_sizes, "state_dict": right_saved}
_GRADE_OF_PROMPTS: dict[str, Callable[[Case, Mapping[str, Any]], str]] = {"config": grade_sizes, "state_dict": grade_saved}
