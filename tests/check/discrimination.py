"""The discrimination matrix: how many tolerances apart the right answer and the mistakes are, case by case.

    python -m tests.check.discrimination [dtype]     prints it: one row per mistake, its best case and how far off it is there

A ratio of infinity means that bits have to match and do not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import cache

import numpy as np

from peft_ref.check.case import ARRAY_OPERATIONS, Answer, Case
from peft_ref.check.corpus import corpus
from peft_ref.check.diagnose import expected_answer, rounded
from peft_ref.check.mistakes import SUITES
from peft_ref.check.tolerance import Expected, compare

MARGIN = 10.0  # a mistake counts as visible, and as told apart, from this many tolerances on


@cache
def array_cases(method: str) -> tuple[Case, ...]:
    return tuple(c for c in corpus(method) if c.operation in ARRAY_OPERATIONS)


@cache
def replays(method: str) -> Mapping[str, Mapping[str, Answer]]:
    """mistake -> case -> what a port that makes the mistake answers, where that is not the right answer."""
    found: dict[str, dict[str, Answer]] = {}
    for mistake in SUITES[method].mistakes:
        answers = {case.id: mistake.replay(case) for case in array_cases(method)}
        found[mistake.name] = {case: a for case, a in answers.items() if a is not None}
    return found


@cache
def separation(method: str, dtype: str) -> Mapping[str, Mapping[str, float]]:
    """mistake -> case -> its distance from the right answer, in tolerances. A case where it does not show has 0."""
    rows: dict[str, dict[str, float]] = {}
    for name, answers in replays(method).items():
        rows[name] = {
            case.id: compare(rounded(answers[case.id], dtype), expected_answer(case, dtype)).ratio if case.id in answers else 0.0
            for case in array_cases(method)
        }
    return rows


@cache
def rounded_replays(method: str, dtype: str) -> Mapping[str, Mapping[str, Answer]]:
    return {name: {case: rounded(a, dtype) for case, a in answers.items()} for name, answers in replays(method).items()}


def between(method: str, first: str, second: str, dtype: str) -> Iterator[float]:
    """How many tolerances two mistakes' answers are apart, case by case, where one of them has an answer of its own."""
    one, other = (rounded_replays(method, dtype)[name] for name in (first, second))
    for case in array_cases(method):
        if case.id in one or case.id in other:
            expected = expected_answer(case, dtype)
            a, b = (answers.get(case.id) or rounded(expected.values, dtype) for answers in (one, other))
            yield _distance(a, b, expected)


def _distance(a: Answer, b: Answer, expected: Expected) -> float:
    if a.keys() != b.keys():
        return np.inf
    moved = {name: expected.values[name] + (a[name] - b[name]) for name in a}
    return 0.0 if all(np.array_equal(a[name], b[name]) for name in a) else compare(moved, expected).ratio


def main(dtype: str = "float32") -> None:
    for method in SUITES:
        for name, row in separation(method, dtype).items():
            case = max(row, key=row.__getitem__)
            seen = sum(ratio > MARGIN for ratio in row.values())
            print(f"{method:5} {name:30} seen in {seen:3} of {len(row)} cases, most in {case} ({row[case]:.3g} tolerances)")


if __name__ == "__main__":
    main(*sys.argv[1:])
