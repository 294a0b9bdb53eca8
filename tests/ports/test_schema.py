"""The schema describes the judge's own messages completely, and notices what is wrong with a port's."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import jsonschema
import pytest

from peft_ref.check.case import ARRAY_OPERATIONS, OPERATIONS, Case, encode, to_json
from peft_ref.check.corpus import corpus
from peft_ref.check.export import document
from peft_ref.check.oracle import answer, smoke_case
from peft_ref.check.protocol import START, STOP, nest, run_message, schema_document, violation
from peft_ref.check.text import right_text
from peft_ref.methods import METHODS

# One case of every operation on every kind of layer, and of every method that has none.
WITHOUT_LAYER = METHODS.prompts.keys() | METHODS.attention.keys()
ONE_OF_EACH = {(c.operation, c.layer and c.layer.kind, c.method in WITHOUT_LAYER and c.method): c for c in corpus()}.values()
ONE_PER_OPERATION = {(c.operation, c.method in METHODS.prompts, c.method in METHODS.attention): c for c in ONE_OF_EACH}
# What a question about fresh prompts must bring hangs on where they start.
STARTS = [c for c in ONE_OF_EACH if c.method in METHODS.prompts and c.operation in ("init", "prompt")]
STARTS += [c for c in corpus() if c.operation == "init" and "prompt_tuning_init" in c.adapters[0].config]


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema_document())


@pytest.mark.parametrize("method", sorted({c.method for c in corpus()}))
def test_every_question_of_the_judge_fits(method: str) -> None:
    assert [(c.id, problem) for c in corpus(method) if (problem := violation(run_message(c), "run"))] == []


def test_start_stop_and_smoke_fit() -> None:
    assert [violation(START, "start"), violation(STOP, "stop"), violation(run_message(smoke_case()), "run")] == ["", "", ""]


def test_exported_cases_fit() -> None:
    assert violation(json.loads(json.dumps(document([smoke_case(), *ONE_PER_OPERATION.values()]))), "cases_file") == ""


def test_there_is_an_example_of_every_operation() -> None:
    assert {operation for operation, *_ in ONE_PER_OPERATION} == set(OPERATIONS)


def _right(case: Case) -> dict[str, Any] | None:
    if case.operation in ARRAY_OPERATIONS:
        return nest(case, {k: encode(v) for k, v in answer(case).items()})
    return None if case.operation == "init" else right_text(case)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda c: c.id)
def test_a_right_reply_fits(case: Case) -> None:
    right = _right(case)
    assert violation({"id": case.id, "answer": right} if right else {"id": case.id, "skipped": "drawn at random"}, "reply") == ""


@pytest.mark.parametrize("case", [*ONE_PER_OPERATION.values(), *STARTS], ids=lambda c: c.id)
def test_a_question_that_lacks_a_field_or_has_one_more_does_not_fit(case: Case) -> None:
    whole = to_json(case)
    optional = {"adapters", "dropout"} if case.operation == "forward" else {"dropout"}  # the smoke test has no adapters
    for name in whole.keys() - optional:
        assert violation({k: v for k, v in whole.items() if k != name}, "case") != "", name
    assert violation({**whole, "surplus": 1}, "case") != ""


@pytest.mark.parametrize("kind", sorted({c.layer.kind for c in corpus() if c.layer}))
def test_a_layer_that_lacks_a_field_or_has_one_more_or_a_weight_of_another_depth_does_not_fit(kind: str) -> None:
    layer = to_json(next(c for c in corpus() if c.layer and c.layer.kind == kind))["layer"]
    assert violation(layer, "layer") == ""
    for name in layer:
        assert violation({k: v for k, v in layer.items() if k != name}, "layer") != "", name
    assert violation({**layer, "surplus": 1}, "layer") != ""
    assert violation({**layer, "weight": [layer["weight"]]}, "layer") != ""
    assert violation({**layer, "weight": layer["weight"][0]}, "layer") != ""


REPLY: dict[str, Any] = {"id": "a", "answer": {"y": [[1.0, "nan"], [0, -2.5e-8]]}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"time": 3}, "'time'"),
        ({"id": 3}, "id"),
        ({"skipped": "no"}, "skipped"),
        ({"error": "no"}, "error"),
        ({"answer": {"z": [1.0]}}, "'z'"),
        ({"answer": {"y": 1.0}}, "answer.y"),
        ({"answer": {"y": [[1.0, None]]}}, "answer.y[0][1]"),
        ({"answer": {"y": [[1.0, "1.5"]]}}, "answer.y[0][1]"),
        ({"answer": {"y": [[1.0, [2.0]], [True]]}}, "answer.y[1][0]"),
        ({"answer": {"adapters": {"lora_A.weight": [[1.0]]}}}, "answer.adapters"),
        ({"answer": {"adapters": [{"lora_A.weight": 1.0}]}}, "answer.adapters[0].lora_A.weight"),
        ({"answer": [[1.0]]}, "answer"),
    ],
)
def test_what_is_wrong_with_a_reply_is_named(change: dict[str, Any], named: str) -> None:
    assert violation(REPLY, "reply") == ""
    assert named in violation({**REPLY, **change}, "reply")


def test_a_reply_must_have_one_of_answer_skipped_and_error() -> None:
    assert violation({"id": "a"}, "reply") != ""
    assert violation({"id": "a", "skipped": ""}, "reply") != ""


INFO: dict[str, Any] = {"name": "a", "dtype": "bfloat16", "operations": ["forward"], "methods": [], "x-build": {"commit": "1a2b"}}


@pytest.mark.parametrize("change", [{"operation": ["forward"]}, {"dtype": "f32"}, {"methods": "lora"}, {"name": ""}])
def test_a_wrong_or_misspelled_field_in_the_answer_to_start_does_not_fit(change: dict[str, Any]) -> None:
    assert violation(INFO, "info") == ""
    assert violation({**INFO, **change}, "info") != ""


def test_an_answers_file_may_have_no_further_field() -> None:
    whole = {"port": INFO, "answers": [deepcopy(REPLY)]}
    assert violation(whole, "answers_file") == ""
    assert violation({**whole, "seconds": 3}, "answers_file") != ""
