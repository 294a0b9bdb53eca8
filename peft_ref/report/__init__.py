"""What every report says, worked out once; `terminal`, `html` and `junit` lay it out.

Whatever comes from a port (its name, its reasons, its case ids) goes through `clean` before anybody sees it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from peft_ref.check.case import OPERATIONS, NDArray, decode
from peft_ref.check.result import ASKED, Counterexample, Diagnosis, Report, Verdict, Worst
from peft_ref.errors import clean

NAMELESS = "?"  # the port was broken before it said anything
GOOD, DOUBTFUL, BAD = "good", "doubtful", "bad"
# Of a configuration, what changes the answer to one question.
HYPERPARAMETERS = ("r", "lora_alpha", "alpha", "use_rslora", "use_dora", "is_feedforward")
SCHEDULE = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "total_step", "beta1", "beta2")


class Group(NamedTuple):
    """Cases that have a reason in common."""

    method: str
    operation: str
    reason: str
    cases: tuple[str, ...]


def headline(report: Report) -> tuple[str, str, str]:
    """How it went (GOOD, DOUBTFUL or BAD), in one word, and in one sentence."""
    n = report.counts
    answered, asked = sum(n[s] for s in ("right", "wrong", "dialect", "undecidable")), sum(n[s] for s in ASKED)
    if report.broken:
        return BAD, "Broken", "The port could not be judged."
    if not asked:
        return (
            BAD,
            "Nothing was executed",
            f"{_many(n['skipped'], report.thing)} skipped, {n['not asked']} not asked. This says nothing about the port.",
        )
    if n["wrong"]:
        return BAD, "Wrong", f"{n['wrong']} of {_many(asked, report.thing)} wrong. {_causes(report)}".strip()
    if n["error"]:
        return BAD, "Broken", f"{n['error']} of {_many(asked, report.thing)} had no usable answer; {n['right']} right, none wrong."
    if not n["right"] and not n["dialect"]:
        return (
            DOUBTFUL,
            "Undecided",
            f"In {report.port.dtype} none of {_many(answered, 'answer')} can be told from that of a layer without adapter.",
        )
    doubts = [f"{n[s]} {word}" for s, word in (("dialect", "in a dialect"), ("undecidable", "undecidable")) if n[s]]
    if doubts:
        return GOOD, "Right", f"{n['right']} of {_many(asked, report.thing)} right, {', '.join(doubts)}, none wrong."
    if n["skipped"]:
        return GOOD, "Right", f"{_many(asked, report.thing)} right, {n['skipped']} skipped."
    return GOOD, "Right", f"All {_many(asked, report.thing)} that were asked."


def _causes(report: Report) -> str:
    known = {(d.method, d.mistakes) for d in report.diagnoses if d.mistakes and not d.dialect}
    unknown = sum(not d.mistakes for d in report.diagnoses)
    parts = [_many(len(known), "known mistake")] if known else []
    parts += [f"{_many(unknown, 'cause')} unknown"] if unknown else []
    return f"{' and '.join(parts)}." if parts else ""


def _many(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def port_name(report: Report) -> str:
    return clean(report.port.name) if report.port.name != NAMELESS else "a port that did not tell its name"


def about(report: Report) -> str:
    """What the port says of itself, in one line after its name."""
    port = report.port
    if port.name == NAMELESS:
        return ""
    return ", ".join(clean(part) for part in (port.version, port.language, port.dtype) if part)


def operations(verdicts: Iterable[Verdict]) -> list[str]:
    """The operations that occur, in their usual order."""
    there = {v.operation for v in verdicts}
    return [*(o for o in OPERATIONS if o in there), *sorted(there - set(OPERATIONS))]


def tally(verdicts: Iterable[Verdict]) -> dict[tuple[str, str], Counter[str]]:
    """(method, operation) -> how many of each status."""
    out: dict[tuple[str, str], Counter[str]] = {}
    for v in verdicts:
        out.setdefault((v.method, v.operation), Counter())[v.status] += 1
    return out


def undiagnosed(report: Report) -> list[Group]:
    """Wrong cases that no diagnosis is about: those of names, files and fresh adapters. Their reason is all there is."""
    explained = {case for d in report.diagnoses for case in d.cases}
    return _groups([v for v in report.verdicts if v.status == "wrong" and v.case not in explained], by_operation=True)


def reasons(report: Report, status: str) -> list[Group]:
    """The cases of a status by reason, most frequent first."""
    return sorted(_groups([v for v in report.verdicts if v.status == status]), key=lambda g: -len(g.cases))


def hidden(report: Report) -> dict[str, list[str]]:
    """method -> known mistakes that the right cases would not have shown, and that were not found."""
    found = {(d.method, name) for d in report.diagnoses for name in d.mistakes}
    left = {method: [n for n in names if (method, n) not in found] for method, names in report.undecidable.items()}
    return {method: names for method, names in left.items() if names}


def _groups(verdicts: Sequence[Verdict], by_operation: bool = False) -> list[Group]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for v in verdicts:
        reason = (
            clean(v.reason.replace(v.case, "<case>") if v.case else v.reason) or "no reason given"
        )  # two reasons that differ in the case alone are one
        groups.setdefault((v.method if by_operation else "", v.operation if by_operation else "", reason), []).append(v.case)
    return [Group(*key, tuple(cases)) for key, cases in groups.items()]


class Closeness(NamedTuple):
    exact: int  # right where bits had to match
    within: int  # right within a tolerance
    worst: Verdict | None  # the one of them that came closest to it


def closeness(report: Report) -> Closeness:
    right = [v for v in report.verdicts if v.status == "right" and v.worst is not None]
    within = [v for v in right if not v.exact]
    return Closeness(len(right) - len(within), len(within), max(within, key=lambda v: v.worst.ratio if v.worst else 0.0, default=None))


def title(d: Diagnosis) -> str:
    """The name of what is wrong."""
    if not d.mistakes:
        return "an unknown mistake"
    if len(d.mistakes) == 1:
        return d.mistakes[0]
    return " and ".join(d.mistakes) if d.together else f"one of {', '.join(d.mistakes)}"


def page(method: str) -> str:
    return f"spec/methods/{method}.md"


def element(worst: Worst) -> str:
    return f"{worst.name}[{', '.join(map(str, worst.index))}]" if worst.index else worst.name


def distance(worst: Worst) -> str:
    """How far off, in words: in units of the tolerance, or that bits had to match."""
    if worst.got != worst.got or worst.got in (float("inf"), float("-inf")):
        return "not a finite number"
    if worst.ratio == float("inf"):
        return "bits must match here"
    return f"{worst.ratio:.2g} times the tolerance" if worst.ratio < 1000 else f"{worst.ratio:.1e} times the tolerance"


def number(value: float) -> str:
    return f"{value:.10g}"


# ---- a counterexample


def arrays(case: Mapping[str, Any]) -> Iterator[tuple[str, NDArray]]:
    """The arrays of a question as JSON, by the names a reader knows."""
    layer, merged = case.get("layer") or {}, case.get("merged") or {}
    adapters = case.get("adapters") or []
    given = [("W", layer.get("weight")), ("b", layer.get("bias"))]
    for i, adapter in enumerate(adapters):
        where = f"{i}." if len(adapters) > 1 else ""
        given += [(f"{where}{key}", value) for key, value in adapter["tensors"].items()]
        given += [(f"{where}dropout mask", adapter["dropout"]["mask"])] if adapter.get("dropout") else []
    given += [("x", case.get("x")), ("dy", case.get("dy"))]
    given += [("merged W", merged.get("weight")), ("merged b", merged.get("bias"))]
    given += [(f"{module}.{key}", value) for module, own in (case.get("parameters") or {}).items() for key, value in own.items()]
    for step in case.get("steps") or ():
        given += [
            *_of_modules(step["parameters"], f"step {step['step']} "),
            *_of_modules(step["gradients"], f"step {step['step']} gradient of "),
        ]
    for name, value in given:
        if (array := decode(value)) is not None:
            yield name, array


def _of_modules(modules: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """Of the steps of a training everything that is not zero."""
    for module, tensors in modules.items():
        yield from ((f"{where}{module}.{key}", value) for key, value in tensors.items() if np.any(decode(value)))


def settings(case: Mapping[str, Any]) -> list[str]:
    """The hyper-parameters of a question that matter: "r=2"."""
    adapters = case.get("adapters") or []
    asked = {"allocate": SCHEDULE, "aux_loss": ("orth_reg_weight",)}.get(str(case.get("operation")), ())
    out = [f"{k}={case['adapter_config'][k]}" for k in asked]
    out += ["all else zero"] if case.get("steps") else []
    for i, adapter in enumerate(adapters):
        where = f"{i}." if len(adapters) > 1 else ""
        out += [f"{where}{k}={v}" for k, v in adapter["config"].items() if k in HYPERPARAMETERS and v is not False]
        out += [f"{where}p={adapter['dropout']['p']}"] if adapter.get("dropout") else []
    return out


def one_line(example: Counterexample) -> str:
    """The smallest counterexample; where it is not small, its arrays in short."""
    if len(example.text) <= 240:
        return clean(example.text)
    _, _, outcome = example.text.rpartition(" -> ")
    parts = [f"{name}={_in_short(array)}" for name, array in arrays(example.case)]
    return clean(f"{' '.join([*parts, *settings(example.case)])} -> {outcome}")


def _in_short(array: NDArray) -> str:
    if array.size <= 6:
        return str(array.tolist()).replace(".0", "").replace(" ", "")
    shape = "x".join(map(str, array.shape))
    at = [tuple(int(i) for i in index) for index in np.argwhere(array != 0)]
    if len(at) > 3:
        return f"({shape} numbers)"
    ones = ", ".join(f"{number(float(array[i]))} at {list(i)}" for i in at)
    return f"({shape} zeros{f', but {ones}' if ones else ''})"
