"""How fresh parameters must be distributed, judged from many draws, and the cases that ask for them.

A port draws with its own generator, so no number can be compared. What can: which parameters are exactly zero or one, within which bounds
a uniform draw stays and how it fills them, the deviation of a normal draw, and, where a start is computed from the weight, the identities
that survive the free choice of signs. Each method's suite says its laws (`asked.Fresh`), written down apart from the code that draws, from
the catalogue of what HF PEFT 0.21.2 does; `prompt_starts` has those of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from peft_ref.check.asked import Draw, Fresh
from peft_ref.check.attending_text import attention_laws, attention_shapes
from peft_ref.check.case import Case, CaseAdapter, build_method, build_prompt, config_of, decode
from peft_ref.check.distributions import Law
from peft_ref.check.mistakes import SUITES
from peft_ref.check.prompt_starts import prompt_laws
from peft_ref.check.variants import LAYERS, dyadic, generator
from peft_ref.methods import METHODS


def laws(case: Case) -> dict[str, Law]:
    """The law of every key of a fresh adapter, where its numbers are drawn or constant."""
    if case.method in METHODS.prompts:
        return prompt_laws(case)
    if case.method in METHODS.attention:
        return attention_laws(case)
    assert case.layer is not None
    return dict(_asked(case.method).laws(case.adapters[0].config, case.layer))


def _asked(method: str) -> Fresh:
    fresh = SUITES[method].fresh
    assert fresh is not None, f"nothing is asked of {method}'s fresh adapters"
    return fresh


def grade_init(case: Case, answer: Mapping[str, Any], dtype: str) -> str:
    """What is wrong with a port's fresh adapters; an empty string if nothing is."""
    draws = answer.get("draws")
    if not isinstance(draws, list) or not draws:
        return f'the answer must hold "draws", a list of {case.question["draws"]} objects of tensors'
    specs = shapes_of(case)
    read: list[Draw] = []
    for draw in draws:
        arrays = {k: np.asarray(decode(v), dtype=np.float64) for k, v in draw.items() if k != "weight"}
        if arrays.keys() != specs.keys():
            return f"a draw has the keys {sorted(arrays)}, expected {sorted(specs)}"
        for key, array in arrays.items():
            if array.shape != specs[key]:
                return f"{key} is {array.shape}, expected {specs[key]}"
        if "weight" in draw:
            arrays["weight"] = np.asarray(decode(draw["weight"]), dtype=np.float64)
        read.append(arrays)
    for key, law in laws(case).items():
        if problem := law.problem(np.stack([d[key] for d in read]), dtype):
            return f"{key}: {problem}"
    return "" if case.layer is None else next((p for d in read if (p := _asked(case.method).identity(case, case.layer, d, dtype))), "")


def shapes_of(case: Case) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a fresh adapter has, by its key."""
    config = case.adapters[0].config
    if case.method in METHODS.attention:
        return attention_shapes(case)
    if case.layer is None:
        return build_prompt(case.method, config).shapes()
    return {s.key: s.stored_shape for s in build_method(case.method, config).spec(case.layer)}


def init_cases(name: str, fresh: Fresh) -> Iterator[Case]:
    """The cases that ask a method for fresh adapters."""
    for label, start in fresh.starts.items():
        for layer_name in start.layers:
            layer, where = LAYERS[layer_name], f"{name}.{layer_name}.init-{label}"
            yield Case(
                id=f"{where}.init",
                method=name,
                operation="init",
                clause=fresh.clause,
                layer=layer,
                weight=dyadic(generator(where), layer.weight_shape),
                bias=None if layer.kind == "embedding" else dyadic(generator(where + "b"), (layer.shape[0],)),
                adapters=(CaseAdapter(config=config_of(build_method(name, start.config)), tensors={}),),
                question={"draws": start.draws},
            )
