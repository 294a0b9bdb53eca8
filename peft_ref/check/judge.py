"""The judge: asks every case, grades every answer, and says why what is wrong is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import numpy as np

from peft_ref.check.case import ARRAY_OPERATIONS, TEXT_OPERATIONS, Answer, Case
from peft_ref.check.corpus import corpus
from peft_ref.check.diagnose import Wrong, diagnose, expected_answer, grouped, rounded
from peft_ref.check.init_laws import grade_init
from peft_ref.check.mistake import Mistake
from peft_ref.check.mistakes import SUITES
from peft_ref.check.oracle import null_answer, smoke_case
from peft_ref.check.port import Answered, BrokenPort, Failed, Port, Skipped
from peft_ref.check.result import Diagnosis, PortInfo, Report, Verdict, Worst
from peft_ref.check.search import smallest
from peft_ref.check.text import grade_text
from peft_ref.check.tolerance import compare

Progress = Callable[[int, int, str], None]
# What reading a port's own idea of an answer may raise.
UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
# A mistake, or an answer of a port that does nothing, counts as told apart this many tolerances away from the right answer.
MARGIN = 2.0


def judge(
    port: Port,
    cases: Sequence[Case] | None = None,
    *,
    progress: Progress | None = None,
    search: bool = True,
) -> Report:
    """Asks `port` the cases (all of them by default) and reports. The port is closed at the end, whatever happens."""
    began = time.monotonic()
    asked = corpus() if cases is None else tuple(cases)
    info, broken = PortInfo(name="?"), ""
    verdicts: list[Verdict] = []
    diagnoses: list[Diagnosis] = []
    try:
        info = port.start()
        broken = _smoke(port, info)
        if not broken:
            verdicts, wrong = _ask(port, info, asked, progress)
            right = {v.case for v in verdicts if v.status == "right"}
            with np.errstate(all="ignore"):  # a replayed mistake may well divide by zero
                diagnoses = diagnose(wrong, [c for c in asked if c.id in right], info.dtype)
            if search and diagnoses:
                if progress is not None:
                    progress(len(asked), len(asked), "looking for the smallest counterexample")
                diagnoses = [_looked_into(port, info, d, asked) for d in diagnoses]
    except BrokenPort as error:
        broken = str(error)
    finally:
        port.close()
    dialects = {case: d.mistakes[0] for d in diagnoses if d.dialect for case in d.cases}
    verdicts = [replace(v, status="dialect", reason=dialects[v.case]) if v.case in dialects else v for v in verdicts]
    seen = tuple(v.case for v in verdicts if v.status in ("right", "undecidable"))
    named = {name for d in diagnoses for name in d.mistakes}
    hidden = {method: tuple(n for n in names if n not in named) for method, names in undecidable(info.dtype, seen).items()}
    return Report(
        port=info,
        verdicts=tuple(verdicts),
        diagnoses=tuple(diagnoses),
        seconds=time.monotonic() - began,
        undecidable={method: names for method, names in hidden.items() if names},
        broken=broken,
    )


def _ask(port: Port, info: PortInfo, asked: Sequence[Case], progress: Progress | None) -> tuple[list[Verdict], list[Wrong]]:
    """Every verdict, and every array answer that is wrong."""
    verdicts, wrong = [], []
    for n, case in enumerate(asked):
        if progress is not None:
            progress(n, len(asked), case.id)
        verdict, answer = _grade(port, info, case)
        verdicts.append(verdict)
        if answer is not None:
            wrong.append(Wrong(case, answer, verdict))
    return verdicts, wrong


def _looked_into(port: Port, info: PortInfo, d: Diagnosis, asked: Sequence[Case]) -> Diagnosis:
    """The diagnosis with the smallest counterexample; where no mistake is known, whether the port keeps something between questions."""
    if d.dialect:
        return d
    cases = [c for c in asked if c.id in d.cases]
    if not d.mistakes:
        port.forget()
        if _grade(port, info, cases[0])[0].status == "right":
            alone = f"Asked {cases[0].id} alone, started anew, the port is right: it keeps something between questions."
            return replace(d, text=f"{d.text} {alone}")
    return replace(d, counterexample=smallest(port, cases, info.dtype))


def _smoke(port: Port, info: PortInfo) -> str:
    """A frozen linear layer, no adapter: a port that fails here has a broken harness, whatever its mathematics."""
    case = smoke_case()
    reply = port.ask(case)
    if isinstance(reply, Skipped):
        return ""
    if isinstance(reply, Failed):
        return f"the smoke test (a frozen linear layer without adapters) failed: {reply.reason}"
    if problem := misshapen(reply.answer, expected_answer(case, info.dtype).values):
        return f"the smoke test (a frozen linear layer without adapters) failed: {problem}"
    worst = compare(_arrays(reply.answer), expected_answer(case, info.dtype))
    if worst.ratio <= 1:
        return ""
    return (
        f"the smoke test failed: y = x W^T + b of a frozen linear layer, without any adapter, is wrong: y{list(worst.index)} is"
        f" {worst.got:g}, expected {worst.want:g}. Look at how your harness reads nested lists and lays out the weight (out, in)"
    )


def _grade(port: Port, info: PortInfo, case: Case) -> tuple[Verdict, Answer | None]:
    """The verdict on one case, and the answer if it is an array answer that is wrong."""
    layer = case.layer.kind if case.layer is not None else ""
    verdict = Verdict(case=case.id, method=case.method, operation=case.operation, layer=layer, clause=case.clause, status="right")
    for allowed, value in ((info.operations, case.operation), (info.methods, case.method), (info.layers, layer)):
        if allowed and value and value not in allowed:
            return replace(verdict, status="not asked", reason=f"the port does not do {value}"), None
    reply = port.ask(case)
    if isinstance(reply, Skipped):
        return replace(verdict, status="skipped", reason=reply.reason), None
    if isinstance(reply, Failed):
        return replace(verdict, status="error", reason=reply.reason), None
    if case.operation in TEXT_OPERATIONS or case.operation == "init":
        try:
            problem = grade_init(case, reply.answer, info.dtype) if case.operation == "init" else grade_text(case, reply.answer)
        except UNREADABLE as error:  # an object of another make than was asked for, at any depth
            return replace(verdict, status="error", reason=f"the answer cannot be read: {type(error).__name__}: {error}"[:300]), None
        return (replace(verdict, status="wrong", reason=problem), None) if problem else (verdict, None)
    return _grade_arrays(verdict, case, reply, info.dtype)


def _grade_arrays(verdict: Verdict, case: Case, reply: Answered, dtype: str) -> tuple[Verdict, Answer | None]:
    expected = expected_answer(case, dtype)
    verdict = replace(verdict, exact=expected.exact)
    if problem := misshapen(reply.answer, expected.values):
        return replace(verdict, status="error", reason=problem), None
    got = _arrays(reply.answer)
    worst = compare(got, expected)
    if worst.ratio > 1:
        return replace(verdict, status="wrong", worst=worst, reason=describe(worst, expected.exact)), got
    if empty := empty_handed(case, dtype):
        return replace(verdict, status="undecidable", worst=worst, reason=f"in {dtype} {empty} would be within tolerance too"), None
    return replace(verdict, worst=worst), None


@lru_cache(maxsize=8192)
def empty_handed(case: Case, dtype: str) -> str:
    """Which answer of a port that knows nothing of the method cannot be told from the right one; an empty string if none."""
    expected = expected_answer(case, dtype)
    answers = {
        "the answer of a layer without the adapter": null_answer(case),
        "an answer of zeros": {name: np.zeros_like(v) for name, v in expected.values.items()},
        "one and the same number everywhere": {name: np.full_like(v, np.sum(v) / max(v.size, 1)) for name, v in expected.values.items()},
    }
    return next((what for what, empty in answers.items() if compare(empty, expected).ratio <= MARGIN), "")


def describe(worst: Worst, exact: bool) -> str:
    at = f"{worst.name}{list(worst.index) or ''}"
    got, want = worst.texts
    if not np.isfinite(worst.got):
        return f"{at}: got {got}, want {want}"
    how = "bits must match here" if exact else f"{worst.ratio:.2g} x tolerance"
    return f"{at}: got {got}, want {want} ({how})"


def misshapen(answer: Any, want: Answer) -> str:
    """What is missing, too many or of a wrong shape; an empty string if nothing is."""
    if missing := [name for name in want if name not in answer]:
        return f"{', '.join(missing)} missing in the answer; there are {', '.join(answer) or 'none'}"
    if extra := [name for name in answer if name not in want]:
        return f"{', '.join(extra)} in the answer, which nobody asked for; expected {', '.join(want)}"
    for name, array in want.items():
        if tuple(answer[name].shape) != array.shape:
            return f"{name} has the shape {tuple(answer[name].shape)}, expected {array.shape}"
    return ""


def _arrays(answer: Any) -> Answer:
    return {name: np.asarray(value, dtype=np.float64) for name, value in answer.items()}


@cache
def undecidable(dtype: str, case_ids: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Per method, the mistakes that the given cases tell from the right answer in float64, and not in `dtype`."""
    ids = frozenset(case_ids)
    asked = [c for c in corpus() if c.id in ids and c.operation in ARRAY_OPERATIONS]
    hidden: dict[str, tuple[str, ...]] = {}
    if dtype == "float64":
        return hidden
    for method, cases in grouped(asked, lambda c: c.method).items():
        unseen = [m for m in SUITES.of(method).mistakes if not any(_shows(m, case, dtype) for case in cases)]
        names = tuple(m.name for m in unseen if any(_shows(m, case, "float64") for case in cases))
        if names:
            hidden[method] = names
    return hidden


def _shows(mistake: Mistake, case: Case, dtype: str) -> bool:
    replayed = mistake.replay(case)
    return replayed is not None and compare(rounded(replayed, dtype), expected_answer(case, dtype)).ratio > MARGIN
