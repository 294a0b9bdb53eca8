"""Why a port is wrong: which known mistake gives its numbers.

A mistake explains a group of cases when its replay is the port's answer on every wrong one and is right on every right one: a mistake
that would have shown elsewhere, and did not, is not the one. Tried in this order: one mistake for the whole method, one per operation,
one per operation and layer kind, two at once, and, where none fits, how much of the frozen layer and of the adapter the numbers hold.
Ambiguity is reported, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple, TypeVar

import numpy as np

from peft_ref.backend import round_to
from peft_ref.check import training
from peft_ref.check.case import Answer, Case
from peft_ref.check.exact import Undecided
from peft_ref.check.mistake import AsIf, Mistake
from peft_ref.check.mistakes import SUITES
from peft_ref.check.oracle import answer, exact_answer, in_size, null_answer
from peft_ref.check.result import Diagnosis, Verdict
from peft_ref.check.suites import NOTHING
from peft_ref.check.tolerance import PRECISION, Expected, anything, compare, expect, near

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Wrong(NamedTuple):
    case: Case
    got: Answer
    verdict: Verdict


def diagnose(wrong: Sequence[Wrong], right: Sequence[Case], dtype: str) -> list[Diagnosis]:
    """One diagnosis for every group of wrong cases that has one cause, or none that is known."""
    found: list[Diagnosis] = []
    for method, group in grouped(wrong, lambda w: w.case.method).items():
        found += _explain(method, group, [c for c in right if c.method == method], dtype)
    return found


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


_SPLITS: tuple[Callable[[Case], Hashable], ...] = (
    lambda case: "",
    lambda case: case.operation,
    lambda case: (case.operation, case.layer.kind if case.layer else ""),
)


def _explain(method: str, group: list[Wrong], right: list[Case], dtype: str, level: int = 0) -> list[Diagnosis]:
    """The group as a whole if one mistake explains it, else its parts."""
    key = _SPLITS[level]
    out: list[Diagnosis] = []
    for part, members in grouped(group, lambda w: key(w.case)).items():
        peers = [c for c in right if key(c) == part]
        names = [m for m in SUITES.of(method).mistakes if _fits(m.replay, members, peers, dtype)]
        if names:
            out.append(_named(method, members, names))
        elif level == 0 and (pair := _pair(method, members, peers, dtype)):
            out.append(_named(method, members, list(pair), together=True))
        elif level + 1 < len(_SPLITS):
            out += _explain(method, members, peers, dtype, level + 1)
        else:
            out.append(_unknown(method, members, dtype))
    return _joined(out) if level == 0 else out


def _fits(replay: Callable[[Case], Answer | None], wrong: Sequence[Wrong], right: Sequence[Case], dtype: str) -> bool:
    for w in wrong:
        replayed = replay(w.case)
        if replayed is None or replayed.keys() != w.got.keys():
            return False
        if not near(w.got, replayed, expected_answer(w.case, dtype), dtype):
            return False
    return all(_hidden(replay, case, dtype) for case in right)


def _hidden(replay: Callable[[Case], Answer | None], case: Case, dtype: str) -> bool:
    """Whether the mistake would have gone unseen in a case that the port got right."""
    replayed = replay(case)
    return replayed is None or compare(rounded(replayed, dtype), expected_answer(case, dtype)).ratio <= 1


def rounded(answer: Answer, dtype: str) -> Answer:
    """The answer as a port of that dtype can send it."""
    return {name: array if array.dtype.kind in "iub" else round_to(array, dtype) for name, array in answer.items()}


def expectation(case: Case, dtype: str) -> Expected:
    """The right answer to an array case with its tolerance in `dtype`."""
    suite = SUITES.get(case.method, NOTHING)
    apart = null_answer(in_size(case)) if suite.base_apart else suite.transformed(case) if suite.transformed else None
    try:
        right = exact_answer(case, PRECISION[dtype])
    except Undecided:
        return anything(answer(case))
    expected = expect(right, dtype, apart)
    return training.with_open_triplets(case, dtype, expected) if case.operation == "allocate" else expected


@lru_cache(maxsize=8192)
def expected_answer(case: Case, dtype: str) -> Expected:
    """`expectation`, remembered. Cases are compared by identity."""
    return expectation(case, dtype)


def _pair(method: str, wrong: list[Wrong], right: list[Case], dtype: str) -> tuple[Mistake, Mistake] | None:
    """Two mistakes made at once, of the kind that can be: both change the case."""
    simple = [m for m in SUITES.of(method).mistakes if isinstance(m.replay, AsIf)]
    for first, second in combinations(simple, 2):
        if _fits(first.replay.then(second.replay), wrong, right, dtype):  # type: ignore[attr-defined]  # filtered above
            return first, second
    return None


def _named(method: str, group: list[Wrong], mistakes: list[Mistake], together: bool = False) -> Diagnosis:
    sentences = (" and " if together else "; or when ").join(m.sentence for m in mistakes)
    return replace(
        _of(method, group, mistakes[0].clause, f"Your numbers are what you get when {sentences}."),
        mistakes=tuple(m.name for m in mistakes),
        links=tuple(link for m in mistakes for link in m.links),
        dialect=all(m.dialect for m in mistakes),
        together=together,
    )


def _unknown(method: str, group: list[Wrong], dtype: str) -> Diagnosis:
    fit = _too_few_digits(group) or next((text for w in group if (text := _fit(w, dtype))), "")
    text = "No known mistake gives these numbers." + (f" {fit}" if fit else "")
    return _of(method, group, group[0].case.clause, text)


def _of(method: str, group: Sequence[Wrong], clause: str, text: str) -> Diagnosis:
    return Diagnosis(
        method=method,
        operations=tuple(dict.fromkeys(w.case.operation for w in group)),
        layers=tuple(dict.fromkeys(w.case.layer.kind for w in group if w.case.layer is not None)),
        cases=tuple(w.case.id for w in group),
        mistakes=(),
        text=text,
        clause=clause,
        worst=max((w.verdict.worst for w in group if w.verdict.worst), key=lambda x: x.ratio, default=None),
    )


def _joined(diagnoses: list[Diagnosis]) -> list[Diagnosis]:
    """Diagnoses of the same mistakes as one."""
    out: list[Diagnosis] = []
    for group in grouped(diagnoses, lambda d: (d.mistakes or d.text, d.together)).values():
        out.append(
            replace(
                group[0],
                operations=_union(d.operations for d in group),
                layers=_union(d.layers for d in group),
                cases=_union(d.cases for d in group),
                worst=max((d.worst for d in group if d.worst), key=lambda x: x.ratio, default=None),
            )
        )
    return out


def _union(parts: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in parts for name in part))


def _too_few_digits(group: Sequence[Wrong]) -> str:
    """Whether the numbers are right and only printed too short."""
    for digits in (15, 16, 9, 8, 7, 6):
        if all(_printed(w, digits) for w in group):
            return f"They are the right numbers, printed with {digits} significant digits: print 17 (9 for float32)."
    return ""


def _printed(w: Wrong, digits: int) -> bool:
    right = answer(w.case)
    return all(
        float(f"{want:.{digits}g}") == got
        for name in right
        for want, got in zip(right[name].reshape(-1).tolist(), w.got[name].reshape(-1).tolist(), strict=True)
    )


def _fit(w: Wrong, dtype: str) -> str:
    """The port's numbers as so much of the frozen layer and so much of what the adapter adds, if they are that."""
    if w.case.operation not in ("forward", "merge", "delta"):
        return ""
    name = "y" if w.case.operation == "forward" else "weight"
    right, base, got = answer(w.case)[name], null_answer(w.case)[name], w.got[name]
    columns = np.stack([base.reshape(-1), (right - base).reshape(-1)], axis=1)
    share, *_ = np.linalg.lstsq(columns, got.reshape(-1), rcond=None)
    rest = (columns @ share).reshape(got.shape)
    if not near({name: got}, {name: rest}, _only(name, expected_answer(w.case, dtype)), dtype):
        return ""
    return f"They are {share[0]:.4g} times the frozen layer plus {share[1]:.4g} times what the adapter should add."


def _only(name: str, expected: Expected) -> Expected:
    return Expected({name: expected.values[name]}, {name: expected.tolerance[name]}, {name: expected.likely[name]}, expected.exact)
