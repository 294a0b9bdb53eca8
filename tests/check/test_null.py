"""A port that does nothing is right about nothing: test262's rule that a vacuous answer must not pass, made a gate."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from peft_ref.check.case import ARRAY_OPERATIONS, Answer, Case
from peft_ref.check.corpus import corpus
from peft_ref.check.judge import empty_handed, judge
from peft_ref.check.oracle import answer, null_answer
from peft_ref.check.tolerance import PRECISION, Expected
from tests.check.function_port import FunctionPort

CASES = tuple(c for c in corpus() if c.operation in ARRAY_OPERATIONS)


def base_only(case: Case) -> Answer:
    """The frozen layer without its adapters."""
    return null_answer(case)


def zeros(case: Case) -> Answer:
    return {name: np.zeros(v.shape) for name, v in _right(case).items()}


def ones(case: Case) -> Answer:
    return {name: np.ones(v.shape) for name, v in _right(case).items()}


def noise(case: Case) -> Answer:
    """The right shapes, and numbers of the right size."""
    rng = np.random.default_rng(zlib.crc32(case.id.encode()))
    return {name: np.asarray(rng.normal(size=v.shape) * np.std(v) + np.mean(v)) for name, v in _right(case).items()}


def shapes(case: Case) -> Answer:
    """Every number says where it stands: right in shape and nothing else."""
    return {name: np.arange(v.size, dtype=np.float64).reshape(v.shape) for name, v in _right(case).items()}


def mean(case: Case) -> Answer:
    return {name: np.full(v.shape, float(np.mean(v))) for name, v in _right(case).items()}


def of_another_case(case: Case) -> Answer | None:
    """The right answer to the next case whose answer looks the same from outside."""
    peers = _alike()[_outside(case)]
    other = peers[(peers.index(case) + 1) % len(peers)]
    return None if other is case else _right(other)


def rolled(case: Case) -> Answer:
    """The right numbers, each one place further."""
    return {name: np.roll(v.reshape(-1), 1).reshape(v.shape) for name, v in _right(case).items()}


def one_array_short(case: Case) -> Answer | None:
    right = _right(case)
    return dict(list(right.items())[1:]) if len(right) > 1 else None


def not_a_number(case: Case) -> Answer:
    return {name: np.full(v.shape, np.nan) for name, v in _right(case).items()}


def infinite(case: Case) -> Answer:
    return {name: np.full(v.shape, np.inf) for name, v in _right(case).items()}


EMPTY_HANDED: tuple[Callable[[Case], Answer | None], ...] = (
    base_only,
    zeros,
    ones,
    noise,
    shapes,
    mean,
    of_another_case,
    rolled,
    one_array_short,
    not_a_number,
    infinite,
)


@cache
def _right(case: Case) -> Answer:
    return answer(case)


def _outside(case: Case) -> tuple[object, ...]:
    return case.method, case.operation, tuple((k, v.shape) for k, v in _right(case).items())


@cache
def _alike() -> dict[tuple[object, ...], list[Case]]:
    groups: dict[tuple[object, ...], list[Case]] = {}
    for case in CASES:
        groups.setdefault(_outside(case), []).append(case)
    return groups


def only_graded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why an answer is wrong, and which mistakes could hide, is not the question here, and takes long."""
    monkeypatch.setattr("peft_ref.check.judge.diagnose", lambda *_: [])
    monkeypatch.setattr("peft_ref.check.judge.undecidable", lambda *_: {})


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("port", EMPTY_HANDED, ids=lambda f: f.__name__)
def test_a_port_that_does_nothing_is_right_about_nothing(
    port: Callable[[Case], Answer | None], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_graded(monkeypatch)
    report = judge(FunctionPort(port, dtype), CASES, search=False)
    assert not report.broken
    assert not [v.case for v in report.verdicts if v.status in ("right", "dialect")]
    executed = len(CASES) - report.counts["skipped"]
    assert executed > (10 if port is one_array_short else 100)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_without_the_adapter_every_case_is_wrong_in_a_precise_dtype(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only_graded(monkeypatch)
    report = judge(FunctionPort(base_only, dtype), CASES, search=False)
    assert {v.status for v in report.verdicts} == {"wrong"}
    assert report.exit_code == 1


def test_zeros_count_as_an_empty_answer_where_the_tolerances_are_unlike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two numbers, each below its own tolerance, whose mean is far above the smaller one's: nothing but zeros gives them away."""
    values, tolerance = {"y": np.asarray([8.0, 0.01])}, {"y": np.asarray([10.0, 0.02])}
    monkeypatch.setattr("peft_ref.check.judge.expected_answer", lambda *_: Expected(values, tolerance, tolerance, False))
    monkeypatch.setattr("peft_ref.check.judge.null_answer", lambda _: {"y": np.asarray([1e6, 1e6])})
    assert "zeros" in empty_handed(replace(CASES[0]), "bfloat16")


def test_a_port_that_answers_nothing_is_no_success() -> None:
    report = judge(FunctionPort(lambda case: None, "float64"), CASES, search=False)
    assert report.counts["skipped"] == len(CASES)
    assert report.exit_code == 2


def test_the_right_answers_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side of the gate: it is not closed to everybody."""
    only_graded(monkeypatch)
    report = judge(FunctionPort(_right, "float64"), CASES, search=False)
    assert {v.status for v in report.verdicts} == {"right"}
    assert report.exit_code == 0
