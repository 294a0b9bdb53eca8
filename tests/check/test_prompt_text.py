"""Sizes and keys of prompts: the right answer is right, every known mistake is named where it shows, and it shows somewhere."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from peft_ref.check.case import Case, encode
from peft_ref.check.corpus import corpus
from peft_ref.check.prompt_saved import saved_mistakes
from peft_ref.check.prompt_sizes import size_mistakes
from peft_ref.check.text import grade_text, right_text
from peft_ref.methods import METHODS

CASES = [c for c in corpus() if c.method in METHODS.prompts and c.operation in ("config", "state_dict")]
BY_ID = {c.id: c for c in CASES}


def wrong_answers(case: Case) -> dict[str, Mapping[str, Any]]:
    """By the mistake's name, what a port that makes it answers."""
    if case.operation == "config":
        return {name: {"sizes": sizes} for name, (_, sizes) in size_mistakes(case).items()}
    return {name: {"tensors": {k: encode(v) for k, v in tensors.items()}} for name, (_, tensors) in saved_mistakes(case).items()}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_the_right_answer_is_right_and_a_mistake_is_named(case: Case) -> None:
    assert grade_text(case, right_text(case)) == ""
    for name, answer in wrong_answers(case).items():
        assert grade_text(case, answer).startswith(f"{name}: "), name


def test_no_two_mistakes_look_alike_everywhere() -> None:
    """Where two do in one case, another tells them apart."""
    alike = {frozenset(pair) for case in CASES for pair in combinations(wrong_answers(case), 2)}
    apart = set()
    for case in CASES:
        answers = wrong_answers(case)
        apart |= {frozenset(pair) for pair in combinations(answers, 2) if answers[pair[0]] != answers[pair[1]]}
    assert alike <= apart


SEEN = {
    "config": {
        "config-overridden",
        "decoder-layers-counted",
        "encoder-as-wide-as-the-model",
        "grouped-queries-ignored",
        "head-dim-ignored",
        "heads-of-queries",
        "keys-for-embeddings",
        "keys-without-values",
        "rows-times-submodules",
        "rows-without-submodules",
        "sizes-of-the-file",
        "submodules-always-two",
        "submodules-forgotten",
        "token-dim-of-queries",
        "tokens-of-the-file",
    },
    "state_dict": {
        "adapter-name-in-key",
        "encoder-instead-of-table",
        "encoder-saved",
        "example-axis-kept",
        "key-of-the-module",
        "key-of-the-table",
        "key-of-the-table-in-memory",
        "key-prefix-added",
        "prompt-of-a-task-saved",
        "table-not-encoded",
        "tasks-lost",
        "trained-rows-alone",
        "weight-suffix-added",
    },
}


@pytest.mark.parametrize("operation", SEEN)
def test_every_mistake_shows_somewhere(operation: str) -> None:
    assert {name for case in CASES if case.operation == operation for name in wrong_answers(case)} == SEEN[operation]


def test_a_llama_with_grouped_queries_by_hand() -> None:
    """24 wide, 6 heads of queries, 2 of keys: a head is 4 wide, keys are 8, and 3 layers have 3 keys and 3 values, 48 numbers."""
    want = {"rows": 7, "columns": 48, "token_dim": 8, "num_attention_heads": 2, "num_layers": 3, "num_transformer_submodules": 1}
    assert right_text(BY_ID["prefix_tuning.config.llama"])["sizes"] == {**want, "encoder_hidden_size": 8}
    wide = {"rows": 7, "columns": 24, "token_dim": 24, "num_attention_heads": 6, "num_layers": 3, "num_transformer_submodules": 1}
    assert right_text(BY_ID["prompt_tuning.config.llama"])["sizes"] == wide


def test_no_table_is_rounded_by_its_encoder() -> None:
    for case in CASES:
        for value in right_text(case).get("tensors", {}).values():
            assert np.all(np.asarray(value) * 2 % 1 == 0), case.id


@pytest.mark.parametrize(
    ("case", "answer", "says"),
    [
        ("prefix_tuning.config.llama", {}, "sizes"),
        ("prefix_tuning.config.llama", {"sizes": [7, 48]}, "sizes"),
        ("prefix_tuning.config.llama", {"sizes": {"rows": 7}}, "columns is None, expected 48"),
        ("prompt_tuning.config.gpt2", {"sizes": {"rows": 7, "columns": 20, "token_dim": 21}}, "token_dim is 21, expected 20"),
        ("prompt_tuning.state-dict.plain.0", {}, "tensors"),
        ("prompt_tuning.state-dict.plain.0", {"tensors": {"prompt": [[1.0]]}}, "missing: prompt_embeddings; too many: prompt"),
        ("prompt_tuning.state-dict.plain.0", {"tensors": {"prompt_embeddings": [[1.0]]}}, "has the shape (1, 1), expected (3, 4)"),
        ("prompt_tuning.state-dict.plain.0", {"tensors": {"prompt_embeddings": [[1.0] * 4] * 3}}, "holds other numbers"),
    ],
)
def test_what_else_is_wrong_is_told(case: str, answer: dict[str, Any], says: str) -> None:
    assert says in grade_text(BY_ID[case], answer)


def test_a_number_more_is_no_mistake_and_true_is_no_number() -> None:
    case = BY_ID["prompt_tuning.config.bert"]
    sizes = right_text(case)["sizes"]
    assert grade_text(case, {"sizes": {**sizes, "encoder_hidden_size": 14}}) == ""
    assert grade_text(case, {"sizes": {**sizes, "num_transformer_submodules": True}}) != ""
