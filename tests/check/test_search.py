"""The smallest counterexample is small: planted bugs shrink to one row, one column and a handful of ones, in few questions."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.check.case import ARRAY_OPERATIONS, Answer, Case, build_method, from_json
from peft_ref.check.corpus import corpus
from peft_ref.check.diagnose import expectation
from peft_ref.check.oracle import answer
from peft_ref.check.port import Failed, Port, Reply
from peft_ref.check.program import ProgramPort
from peft_ref.check.result import Counterexample, PortInfo
from peft_ref.check.search import filled, resized, smallest
from peft_ref.check.tolerance import compare
from tests.check.function_port import FunctionPort

CASES = {c.id: c for c in corpus() if c.operation in ARRAY_OPERATIONS}
ROUND_TRIPS = 700


def with_tensors(case: Case, change: Callable[[str, Any, Mapping[str, Any]], Any]) -> Case:
    adapters = (replace(a, tensors={k: change(k, v, a.config) for k, v in a.tensors.items()}) for a in case.adapters)
    return replace(case, adapters=tuple(adapters))


def scale_is_alpha(case: Case) -> Answer:
    return answer(with_tensors(case, lambda k, v, c: v * c["r"] if "_B" in k else v))


def rank_truncated(keep: int) -> Callable[[Case], Answer]:
    """Only the first `keep` rows of A count."""

    def cut(key: str, v: Any, config: Mapping[str, Any]) -> Any:
        return np.concatenate([v[:keep], np.zeros_like(v[keep:])]) if "_A" in key else v

    return lambda case: answer(with_tensors(case, cut))


def a_reshaped(case: Case) -> Answer:
    """A read as (in, r) in the order its numbers come."""
    return answer(with_tensors(case, lambda k, v, c: v.reshape(v.shape[::-1]).T if "_A" in k and v.ndim == 2 else v))


def last_row_of_x_lost(case: Case) -> Answer:
    y = answer(case)["y"].copy()
    y[..., -1, :] = 0 if y.ndim == 2 else y[..., -1, :]
    return {"y": y}


def negative_outputs_clipped(case: Case) -> Answer:
    return {name: np.maximum(v, 0) for name, v in answer(case).items()}


def only_large_layers_wrong(case: Case) -> Answer:
    assert case.layer is not None
    return scale_is_alpha(case) if case.layer.shape[1] >= 3 else answer(case)


def bias_doubled(case: Case) -> Answer:
    return answer(case if case.bias is None else replace(case, bias=2 * case.bias))


def norm_of_base(case: Case) -> Answer:
    p = case
    assert p.weight is not None
    a = p.adapters[0]
    W, A, B, m = p.weight, a.tensors["lora_A.weight"], a.tensors["lora_B.weight"], a.tensors["lora_magnitude_vector"]
    s = build_method("dora", a.config).scale  # type: ignore[attr-defined]
    with np.errstate(all="ignore"):
        merged = (m / np.linalg.norm(W, axis=1))[:, None] * (W + s * B @ A)
    y = p.x @ merged.T
    return {"y": y if p.bias is None else y + p.bias}


PLANTED: list[tuple[str, Callable[[Case], Answer], str, Mapping[str, int]]] = [
    ("scale is alpha", scale_is_alpha, "lora.linear.plain.forward", {"in": 1, "out": 1, "r": 2, "rows": 1}),
    ("scale is alpha, merged", scale_is_alpha, "lora.linear.plain.merge", {"in": 1, "out": 1, "r": 2}),
    ("scale is alpha, gradients", scale_is_alpha, "lora.linear.plain.backward", {"in": 1, "out": 1, "r": 2, "rows": 1}),
    ("scale is alpha, table", scale_is_alpha, "lora.embedding.plain.forward", {"in": 1, "out": 1, "r": 2, "rows": 1}),
    ("rank truncated to 1", rank_truncated(1), "lora.linear.plain.forward", {"in": 1, "out": 1, "r": 2, "rows": 1}),
    ("rank truncated to 2", rank_truncated(2), "lora.linear.plain.forward", {"in": 1, "out": 1, "r": 4, "rows": 1}),
    ("rank truncated to 4", rank_truncated(4), "lora.linear-large.rounded.forward", {"in": 1, "out": 1, "r": 9, "rows": 1}),
    ("A reshaped", a_reshaped, "lora.linear.plain.forward", {"in": 2, "out": 1, "r": 2, "rows": 1}),
    ("only large layers", only_large_layers_wrong, "lora.linear.plain.forward", {"in": 3, "out": 1, "r": 2, "rows": 1}),
    ("bias doubled", bias_doubled, "ia3.linear.feedforward.forward", {"in": 1, "out": 1, "rows": 1}),
    ("negatives clipped", negative_outputs_clipped, "loha.linear.plain.forward", {"in": 1, "out": 1, "r": 1, "rows": 1}),
    ("norm of the base", norm_of_base, "dora.linear.plain.forward", {"in": 1, "out": 1, "r": 1, "rows": 1}),
]


def searched(port: Port, case: str, dtype: str) -> Counterexample | None:
    return smallest(port, [CASES[case]], dtype, seconds=120.0)  # on a busy machine too


def sizes(found: Counterexample) -> dict[str, int]:
    case = from_json(found.case)
    assert case.layer is not None
    out = {"in": case.layer.shape[1], "out": case.layer.shape[0]}
    if "r" in case.adapters[0].config:
        out["r"] = case.adapters[0].config["r"]
    if case.x is not None:
        out["rows"] = case.x.size if case.layer.kind == "embedding" else case.x.size // case.x.shape[-1]
    return out


@pytest.mark.parametrize(("bug", "case", "want"), [pytest.param(*rest, id=name) for name, *rest in PLANTED])
def test_a_planted_bug_shrinks_to_the_smallest_sizes(bug: Callable[[Case], Answer], case: str, want: Mapping[str, int]) -> None:
    port = FunctionPort(bug, "float32")
    found = searched(port, case, "float32")
    assert found is not None
    assert sizes(found) == dict(want)
    assert found.round_trips <= ROUND_TRIPS
    assert port.asked <= found.round_trips + 1


@pytest.mark.parametrize(("bug", "case"), [pytest.param(bug, case, id=name) for name, bug, case, _ in PLANTED])
def test_a_counterexample_is_one(bug: Callable[[Case], Answer], case: str) -> None:
    """The port really gives `got` to the case as it stands there, that is wrong, and `want` is right."""
    found = searched(FunctionPort(bug, "float64"), case, "float64")
    assert found is not None
    again = from_json(found.case)
    expected = expectation(again, "float64")
    assert compare(bug(again), expected).ratio > 1
    flat = {k: np.asarray(v) for k, v in found.want.items() if k != "adapters"}
    flat |= {f"{i}.{k}": np.asarray(v) for i, t in enumerate(found.want.get("adapters", ())) for k, v in t.items()}
    for name, v in answer(again).items():
        np.testing.assert_allclose(flat[name], v, rtol=1e-12, atol=1e-12)
    assert "-> you" in found.text


def test_the_numbers_shrink_too() -> None:
    """Truncated to 2 of 4 ranks: one number of A, one of B, one of x, in a row that is cut off. The counterexample is the explanation."""
    found = searched(FunctionPort(rank_truncated(2), "float64"), "lora.linear.plain.forward", "float64")
    assert found is not None
    case = from_json(found.case)
    A, B = (case.adapters[0].tensors[f"lora_{k}.weight"] for k in "AB")
    assert np.count_nonzero(A) == np.count_nonzero(B) == np.count_nonzero(np.asarray(case.x)) == 1
    assert np.flatnonzero(A)[0] >= 2
    assert np.count_nonzero(np.asarray(case.weight)) == np.count_nonzero(np.asarray(case.bias)) == 0


def test_a_convolution_keeps_its_shape_and_loses_its_numbers() -> None:
    asked = CASES["lora.conv1d.plain.forward"]
    found = searched(FunctionPort(scale_is_alpha, "float32"), asked.id, "float32")
    assert found is not None
    case = from_json(found.case)
    assert case.layer == asked.layer
    A, B = (case.adapters[0].tensors[f"lora_{k}.weight"] for k in "AB")
    assert np.count_nonzero(A) == np.count_nonzero(B) == np.count_nonzero(np.asarray(case.x)) == 1
    assert found.round_trips < 3000


def doubled(name: str) -> Callable[[Case], Answer]:
    """One array of the answer twice as large."""
    return lambda case: {k: 2 * v if k == name else v for k, v in answer(case).items()}


def test_a_prompt_keeps_its_shape_and_loses_its_numbers() -> None:
    found = searched(FunctionPort(doubled("0.prefix_task_cols"), "float32"), "multitask_prompt_tuning.plain.prompt_backward", "float32")
    assert found is not None
    case = from_json(found.case)
    tensors = case.adapters[0].tensors
    assert case.dy is not None
    left = [np.count_nonzero(v) for v in (tensors["embedding.weight"], tensors["prefix_task_rows"], case.dy)]
    assert left == [1, 1, 1]
    assert not np.any(tensors["prefix_task_cols"])
    assert {v for array in (case.dy, *tensors.values()) for v in np.unique(array)} == {0.0, 1.0}
    assert "task_ids=" in found.text


def test_a_prompt_put_before_its_inputs_loses_all_numbers_that_are_not_wrong() -> None:
    """Masks and labels are whole numbers and stay; of the floating point numbers one is enough."""
    asked = CASES["prefix_tuning.splice-causal.splice"]
    found = searched(FunctionPort(doubled("past_key_values"), "float64"), asked.id, "float64")
    assert found is not None
    question = from_json(found.case).question
    assert np.count_nonzero(question["prompt"]) == 1
    assert not np.any(question["inputs"]["embeddings"])
    np.testing.assert_array_equal(question["inputs"]["labels"], asked.question["inputs"]["labels"])
    assert "prompt=" in found.text


RIGHT = (
    "lora.linear.plain.forward",
    "lora.embedding.plain.backward",
    "lora.transposed_linear.plain.unmerge",
    "loha.linear.plain.merge",
    "ia3.linear.output.unmerge",
    "dora.linear.plain.backward",
    "dora.linear.two-adapters.unmerge",
    "dora.linear.dropout.forward",
    "p_tuning.mlp.prompt_backward",
    "prefix_tuning.splice-causal.splice",
)


@pytest.mark.parametrize("case", RIGHT)
def test_nothing_is_found_for_a_right_port(case: str) -> None:
    assert searched(FunctionPort(answer, "float32"), case, "float32") is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "dora", "loha"])
def test_nothing_is_found_for_a_right_port_in_a_narrow_format(method: str, dtype: str) -> None:
    assert searched(FunctionPort(answer, dtype), f"{method}.linear.plain.forward", dtype) is None


def test_a_port_that_is_wrong_at_random_is_not_pinned_to_a_question() -> None:
    """Asked again, it is right: there is no counterexample to print."""
    rng = np.random.default_rng(0)
    wrong_once = iter([True])

    def sometimes(case: Case) -> Answer:
        return scale_is_alpha(case) if next(wrong_once, False) else {k: v + 0 * rng.normal() for k, v in answer(case).items()}

    assert searched(FunctionPort(sometimes, "float64"), "lora.linear.plain.forward", "float64") is None


def test_a_port_that_fails_on_other_sizes_is_asked_the_case_itself() -> None:
    """Smaller sizes are the judge's idea: a port that knows only the corpus's still gets a counterexample."""

    class OneSize(Port):
        def __init__(self) -> None:
            self._inner = FunctionPort(scale_is_alpha, "float64")

        def start(self) -> PortInfo:
            return self._inner.start()

        def ask(self, case: Case) -> Reply:
            assert case.layer is not None
            return self._inner.ask(case) if case.layer.shape == (7, 5) else Failed("only 7 by 5 here")

        def forget(self) -> None:
            pass

        def close(self) -> None:
            pass

    found = searched(OneSize(), "lora.linear.plain.forward", "float64")
    assert found is not None
    assert sizes(found) == {"in": 5, "out": 7, "r": 4, "rows": 6}


def test_a_program_is_searched_through_its_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])]))
    port = ProgramPort([sys.executable, "-m", "tests.check.planted", "lora", "scale-is-alpha"])
    try:
        port.start()
        found = searched(port, "lora.linear.plain.forward", "float64")
    finally:
        port.close()
    assert found is not None
    assert sizes(found) == {"in": 1, "out": 1, "r": 2, "rows": 1}


def test_filling_and_resizing_keep_what_they_do_not_change() -> None:
    case = CASES["dora.linear.dropout.backward"]
    small = resized(case, 2, 3, 1, 2)
    assert small is not None
    assert small.layer is not None
    assert (small.layer.shape, small.adapters[0].config["r"]) == ((3, 2), 1)
    assert {k: v.shape for k, v in small.adapters[0].tensors.items()} == {
        "lora_A.weight": (1, 2),
        "lora_B.weight": (3, 1),
        "lora_magnitude_vector": (3,),
    }
    count = sum(v.size for v in (small.weight, small.bias, small.x, small.dy) if v is not None) + 2 + 3 + 3
    numbers = [float(i + 1) for i in range(count)]
    full = filled(small, numbers)
    held = [v for a in full.adapters for v in a.tensors.values()] + [full.weight, full.bias, full.x, full.dy]
    assert sorted(np.concatenate([np.asarray(v).reshape(-1) for v in held])) == numbers
    assert full.layer == small.layer
