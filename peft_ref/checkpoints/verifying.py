"""Is this checkpoint the base with these adapters merged, and if not, which mistake was made?

Both are streamed, tensor by tensor. What no adapter touches has to be the same numbers; what one touches has to be the exact result, up to
the rounding of one merge in whichever of PEFT's three ways (spec/merging.md). The answer is a report of the judge: a case is a tensor, so
that `peft_ref.report` shows it as it shows a port's.

    right         with how far off the worst element is, in ulps of the dtype it is stored in
    undecidable   the adapter changes so little here that the dtype cannot show it
    wrong         with the named mistake, where one gives these numbers on every tensor of a group; the smallest tensor is looked at first
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from peft_ref.check.result import Diagnosis, PortInfo, Report, Verdict, Worst
from peft_ref.checkpoints.base import Base
from peft_ref.checkpoints.exactly import Block, blocks, claimed, method_of
from peft_ref.checkpoints.pieces import Piece, same, source
from peft_ref.checkpoints.plan import Plan, Planned
from peft_ref.checkpoints.suspecting import CLAUSE, FORMATS, Claim, Suspect, explaining, spacing, tolerance

Progress = Callable[[int, int, str], None]
LARGEST = 1 << 27  # elements of a tensor that mistakes are still replayed on


class Task(NamedTuple):
    """One tensor, where it lies in both checkpoints, and which method changes it."""

    planned: Planned
    merged: Piece | None
    method: str


def verify(plan: Plan, merged: Path, progress: Progress = lambda n, total, text: None) -> Report:
    """The report on the checkpoint in the folder `merged`. Raises `FileFormatError` where a file is none."""
    began = time.monotonic()
    there = Base(merged).tensors
    tasks = [Task(p, there.get(p.name), method_of(p)) for shard in plan.shards for p in shard.tensors]
    verdicts, wrong = list[Verdict](), list[Task]()
    for n, task in enumerate(tasks):
        progress(n, len(tasks), task.planned.name)
        verdict = graded(task)
        verdicts.append(verdict)
        if verdict.status == "wrong" and verdict.worst is not None:
            wrong.append(task)
    expected = {task.planned.name for task in tasks}
    verdicts += [_verdict(name, "", "wrong", "is in the merged checkpoint and not in the base") for name in there if name not in expected]
    diagnoses = diagnosed(wrong, {v.case: v for v in verdicts}, progress)
    info = PortInfo(name=merged.resolve().name, dtype=", ".join(sorted({piece.dtype for piece in there.values()})), language="a checkpoint")
    seconds = time.monotonic() - began
    return Report(port=info, verdicts=tuple(verdicts), diagnoses=tuple(diagnoses), seconds=seconds, verb="verify", thing="tensor")


def graded(task: Task) -> Verdict:
    """The verdict on one tensor."""
    planned, place, method = task
    if place is None:
        return _verdict(planned.name, method, "wrong", "is missing in the merged checkpoint")
    if place.shape != planned.shape:
        return _verdict(planned.name, method, "wrong", f"is {place.shape} there, {planned.shape} in the base")
    if place.dtype not in FORMATS:
        if planned.changes or place.dtype != planned.stored_dtype:
            return _verdict(planned.name, method, "wrong", f"is {place.dtype}, which is no number that can be compared")
        if same(source(planned), place):
            return _verdict(planned.name, method, "right", "untouched")
        return _verdict(planned.name, method, "wrong", "its bytes are not the base's")
    worst = _Worst(place.dtype, bool(planned.changes))
    for block in blocks(planned, place):
        worst.add(block)
    return worst.verdict(planned.name, method)


class _Worst:
    """The element furthest off, over all blocks of a tensor."""

    def __init__(self, dtype: str, changed: bool) -> None:
        self._dtype, self._changed = dtype, changed
        self._ratio, self._ulps, self._effect = -1.0, 0.0, 0.0
        self._at: tuple[tuple[int, ...], float, float] = ((), 0.0, 0.0)

    def add(self, block: Block) -> None:
        first, W, right, got, slack = block
        if not right.size:
            return
        step = spacing(right, self._dtype)
        allowed = tolerance(W, right, self._dtype) + slack if self._changed else 0.5 * step
        with np.errstate(invalid="ignore"):
            off = np.where((got == right) | (np.isnan(got) & np.isnan(right)), 0.0, np.abs(got - right))
        off = np.where(np.isfinite(off), off, np.inf)
        self._ulps = max(self._ulps, float(np.max(off / step)))
        self._effect = max(self._effect, float(np.max(np.abs(right - W) / (2 * allowed))))
        ratio = off / allowed
        index = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
        if ratio[index] > self._ratio:
            self._ratio = float(ratio[index])
            place = (int(index[0]) + first, *(int(i) for i in index[1:])) if index else ()
            self._at = (place, float(got[index]), float(right[index]))

    def verdict(self, name: str, method: str) -> Verdict:
        worst = Worst(name, *self._at, max(self._ratio, 0.0))
        if self._ratio > 1:
            return _verdict(name, method, "wrong", f"{self._ulps:.3g} ulp off at worst", worst)
        if self._changed and 0 < self._effect <= 1:
            return _verdict(name, method, "undecidable", f"the adapter's change is within the rounding of {self._dtype}", worst)
        if not self._changed:
            return _verdict(name, method, "right", "untouched", worst, exact=self._ratio <= 0)
        return _verdict(name, method, "right", f"{self._ulps:.2f} ulp worst", worst)


# ---- what is wrong


def diagnosed(wrong: list[Task], verdicts: Mapping[str, Verdict], progress: Progress) -> list[Diagnosis]:
    """One diagnosis for every group of wrong tensors that one cause explains, or none that is known."""
    groups = list[tuple[list[Suspect], list[Task]]]()
    for n, task in enumerate(sorted(wrong, key=lambda t: math.prod(t.planned.shape))):
        progress(n, len(wrong), f"what is wrong with {task.planned.name}?")
        small = task.merged is not None and math.prod(task.planned.shape) <= LARGEST
        claim = claimed(task.planned, task.merged) if small and task.merged else None
        known = next((g for g in groups if g[1][0].method == task.method and claim and g[0] and _still(g, claim)), None)
        if known is not None:
            known[1].append(task)
            continue
        suspects = explaining(claim) if claim else []
        if suspects:
            groups.append((suspects, [task]))
        else:
            _unexplained(groups, task)
    return [_diagnosis(suspects, tasks, verdicts) for suspects, tasks in groups]


def _verdict(name: str, method: str, status: str, reason: str, worst: Worst | None = None, exact: bool = False) -> Verdict:
    told = {"case": name, "method": method or "untouched", "operation": "merge", "layer": "", "clause": ""}
    return Verdict(**told, status=status, reason=reason, worst=worst, exact=exact)


def _still(group: tuple[list[Suspect], list[Task]], claim: Claim) -> bool:
    """Whether one of the group's suspects explains this tensor too; those that do not are no longer the group's."""
    found = {s.name for s in explaining(claim, frozenset(s.name for s in group[0]))}
    if found:
        group[0][:] = [s for s in group[0] if s.name in found]
    return bool(found)


def _unexplained(groups: list[tuple[list[Suspect], list[Task]]], task: Task) -> None:
    for suspects, tasks in groups:
        if not suspects and tasks[0].method == task.method:
            tasks.append(task)
            return
    groups.append(([], [task]))


def _diagnosis(suspects: list[Suspect], tasks: list[Task], verdicts: Mapping[str, Verdict]) -> Diagnosis:
    names = tuple(t.planned.name for t in tasks)
    sentences = "; or when ".join(s.sentence for s in suspects)
    worst = max((w for name in names if (w := verdicts[name].worst)), key=lambda w: w.ratio)
    return Diagnosis(
        method=tasks[0].method,
        operations=("merge",),
        layers=(),
        cases=names,
        mistakes=tuple(s.name for s in suspects),
        text=f"The numbers are what you get when {sentences}." if suspects else "No known mistake gives these numbers.",
        clause=suspects[0].clause if suspects else CLAUSE,
        links=tuple(link for s in suspects for link in s.links),
        worst=worst,
    )
