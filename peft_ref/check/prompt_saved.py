"""The question `state_dict` about prompts: what a file holds, and under which keys. There is no tolerance.

    adapter_config, adapter_name, tensors   -> {"tensors": {key: array}}

`tensors` are those that are trained, by their names inside the encoder; their numbers are such that no encoder rounds its table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from peft_ref.check.case import Case, NDArray, build_prompt, decode, encode
from peft_ref.check.prompting import PromptVariant, make_prompt_case
from peft_ref.methods.cartridge import TRAINED
from peft_ref.prompts import EMBEDDING, SAVED, Context, TablePrompt

Named: TypeAlias = dict[str, tuple[str, Mapping[str, NDArray]]]


def _read(tensors: Mapping[str, Any]) -> dict[str, NDArray]:
    return {name: np.asarray(decode(value), dtype=np.float64) for name, value in tensors.items()}


def right_saved(case: Case) -> dict[str, Any]:
    saved = build_prompt(case.method, case.question["adapter_config"]).saved(_read(case.question["tensors"]))
    return {"tensors": {key: encode(value) for key, value in saved.items()}}


def grade_saved(case: Case, answer: Mapping[str, Any]) -> str:
    got = answer.get("tensors")
    if not isinstance(got, Mapping):
        return 'the answer must hold "tensors", an object of arrays under their keys'
    saved, right = _read(got), _read(right_saved(case)["tensors"])
    if _equal(right, saved):
        return ""
    for name, (sentence, wrong) in saved_mistakes(case).items():
        if _equal(wrong, saved):
            return f"{name}: {sentence}"
    missing, extra = sorted(right.keys() - saved.keys()), sorted(saved.keys() - right.keys())
    if missing or extra:
        return "; ".join(f"{what}: {', '.join(keys[:6])}" for what, keys in (("missing", missing), ("too many", extra)) if keys)
    for key, want in right.items():
        if saved[key].shape != want.shape:
            return f"{key} has the shape {saved[key].shape}, expected {want.shape}"
    return f"{next(k for k, v in right.items() if not np.array_equal(saved[k], v))} holds other numbers than it should"


def _equal(want: Mapping[str, Any], got: Mapping[str, Any]) -> bool:
    return want.keys() == got.keys() and all(np.array_equal(want[key], got[key]) for key in want)


def saved_mistakes(case: Case) -> Named:
    """By name, a sentence and what a port that makes the mistake saves; only where it is something else than the right tensors."""
    adapter, given = case.question["adapter_name"], _read(case.question["tensors"])
    method = build_prompt(case.method, case.question["adapter_config"])
    right = dict(method.saved(given))
    encoder = {name: value for name, value in given.items() if name not in (EMBEDDING, *right)}
    renamed: tuple[tuple[str, str, Callable[[str], str]], ...] = (
        ("key-prefix-added", "the keys begin with base_model.model.; those of a prompt are bare", lambda key: f"base_model.model.{key}"),
        ("key-of-the-module", "the keys begin with prompt_encoder., as in memory", lambda key: f"prompt_encoder.{adapter}.{key}"),
        ("adapter-name-in-key", "the adapter's name stays in the keys; a saved file has none", lambda key: f"{key}.{adapter}"),
        ("weight-suffix-added", "the keys end in .weight", lambda key: f"{key}.weight"),
        (
            "key-of-the-table",
            "the table is saved as embedding.weight; a file calls it prompt_embeddings",
            lambda key: EMBEDDING if key == SAVED else key,
        ),
        (
            "key-of-the-table-in-memory",
            "everything is saved under its key in memory",
            lambda key: f"prompt_encoder.{adapter}.{EMBEDDING if key == SAVED else key}",
        ),
    )
    found: Named = {name: (sentence, {rename(key): value for key, value in right.items()}) for name, sentence, rename in renamed}
    if encoder:
        found["encoder-saved"] = ("the encoder's tensors are saved too; a file holds what they make, not them", {**right, **encoder})
        found["encoder-instead-of-table"] = ("what is trained is saved instead of the table that it makes", given)
        if EMBEDDING in given:
            found["table-not-encoded"] = (
                "the rows that enter the encoder are saved instead of those that leave it",
                {**right, SAVED: given[EMBEDDING]},
            )
        if TRAINED in given:
            found["trained-rows-alone"] = ("only the trained rows are saved; the frozen ones belong to the table", {SAVED: given[TRAINED]})
    if isinstance(method, TablePrompt):
        found["example-axis-kept"] = (
            "the table is saved with an axis for the examples",
            {SAVED: np.asarray(method.prompt(given, Context(batch=1)))},
        )
    else:
        ids = np.zeros(1, dtype=np.int64)
        found["tasks-lost"] = ("only prompt_embeddings is saved; the matrices of the tasks belong to it", {SAVED: right[SAVED]})
        found["prompt-of-a-task-saved"] = (
            "prompt_embeddings is already multiplied by a task's matrices",
            {**right, SAVED: np.asarray(method.prompt(given, Context(1, ids)))[0]},
        )
    return {name: (sentence, wrong) for name, (sentence, wrong) in found.items() if not _equal(right, wrong)}


# ---- what is asked


def state_dict_cases(name: str, clause: str) -> Iterator[Case]:
    """The last layer of every encoder multiplies by zero, so that no table is rounded: its numbers are another operation's question."""
    sizes = {"num_virtual_tokens": 3, "token_dim": 4, "num_transformer_submodules": 1, "num_attention_heads": 2, "num_layers": 2}
    options: dict[str, dict[str, Mapping[str, Any]]] = {
        "cartridge": {"plain": {}, "nothing-frozen": {"num_frozen_tokens": 0}, "inference": {"inference_mode": True}},
        # templates alone, and shorter than their radius: what is added is not rounded
        "cpt": {
            "plain": {"cpt_token_ids": [2, 0, 1], "cpt_tokens_type_mask": [1, 3, 5], "opt_projection_format_epsilon": 80.0},
            "inference": {"cpt_token_ids": [2, 0, 1], "inference_mode": True},
        },
        "multitask_prompt_tuning": {"plain": {"num_tasks": 3, "num_ranks": 2}},
        "p_tuning": {
            "mlp": {"encoder_hidden_size": 5},
            "lstm": {"encoder_hidden_size": 5, "encoder_reparameterization_type": "LSTM"},
            "inference": {"encoder_hidden_size": 5, "inference_mode": True},
        },
        "prefix_tuning": {
            "plain": {},
            "projected": {"prefix_projection": True, "encoder_hidden_size": 5},
            "inference": {"prefix_projection": True, "encoder_hidden_size": 5, "inference_mode": True},
        },
        "prompt_tuning": {"plain": {}, "two-sides": {"num_transformer_submodules": 2}},
    }
    for label, option in options[name].items():
        own = make_prompt_case(
            name, PromptVariant(name=f"state-dict-{label}", clause=clause, config={**sizes, **option}), "saved"
        ).adapters[0]
        last = max((key for key in own.tensors if key.startswith(("transform.", "mlp_head.")) and key.endswith(".weight")), default="")
        tensors = {key: 0 * value if key == last else value for key, value in own.tensors.items()}
        for adapter in ("default", "0"):
            question = {
                "adapter_config": own.config,
                "adapter_name": adapter,
                "tensors": {key: encode(value) for key, value in tensors.items()},
            }
            yield Case(id=f"{name}.state-dict.{label}.{adapter}", method=name, operation="state_dict", clause=clause, question=question)
