"""What a judgement is: a verdict for each case, a diagnosis for each group of wrong ones, a report of it all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# In the order in which a reader wants them.
STATUSES = ("wrong", "error", "undecidable", "dialect", "right", "skipped", "not asked")
BAD = ("wrong", "error")
ASKED = ("wrong", "error", "undecidable", "dialect", "right")


@dataclass(frozen=True, kw_only=True)
class PortInfo:
    """What a port says of itself at the start."""

    name: str
    dtype: str = "float64"
    language: str = ""
    version: str = ""
    operations: tuple[str, ...] = ()  # empty: all
    methods: tuple[str, ...] = ()  # empty: all
    layers: tuple[str, ...] = ()  # empty: all
    homepage: str = ""


@dataclass(frozen=True)
class Worst:
    """The element furthest from right, in units of what an honest computation may drift."""

    name: str  # "y", "weight", "0.lora_A.weight"
    index: tuple[int, ...]
    got: float
    want: float
    ratio: float  # |got - want| over the tolerance; infinite where bits must match

    @property
    def texts(self) -> tuple[str, str]:
        """`got` and `want` with as many digits as it takes to tell them apart."""
        short = f"{self.got:.10g}", f"{self.want:.10g}"
        return short if short[0] != short[1] else (repr(self.got), repr(self.want))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    case: str
    method: str
    operation: str
    layer: str
    clause: str
    status: str
    reason: str = ""
    worst: Worst | None = None
    exact: bool = False  # bits had to match


@dataclass(frozen=True, kw_only=True)
class Counterexample:
    """The smallest question found on which the port is still wrong."""

    case: Mapping[str, Any]  # as the port was asked
    got: Any
    want: Any
    text: str
    round_trips: int


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Why a group of cases is wrong, as far as that is known."""

    method: str
    operations: tuple[str, ...]
    layers: tuple[str, ...]
    cases: tuple[str, ...]
    mistakes: tuple[str, ...]  # one: it is this; several: one of these; none: no known mistake
    text: str
    clause: str = ""
    links: tuple[str, ...] = ()
    dialect: bool = False
    together: bool = False  # all of the named mistakes at once
    worst: Worst | None = None
    counterexample: Counterexample | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    port: PortInfo
    verdicts: tuple[Verdict, ...]
    diagnoses: tuple[Diagnosis, ...]
    seconds: float
    # method -> mistakes that the asked cases could not have told from the right answer in the port's dtype
    undecidable: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    broken: str = ""  # why the port itself cannot be judged: its harness, not its mathematics
    verb: str = "check"  # which command judged
    thing: str = "case"  # and what a case of it is

    @property
    def counts(self) -> dict[str, int]:
        seen = Counter(v.status for v in self.verdicts)
        return {status: seen[status] for status in STATUSES}

    @property
    def exit_code(self) -> int:
        """0: everything asked is right. 1: something is wrong. 2: the port is broken, or nothing was asked or could be decided."""
        counts = self.counts
        if self.broken:
            return 2
        if counts["wrong"]:
            return 1
        return 2 if counts["error"] or not counts["right"] + counts["dialect"] else 0

    def to_json(self) -> dict[str, Any]:
        return {
            "peft_ref_report": 1,
            "port": asdict(self.port),
            "seconds": round(self.seconds, 3),
            "exit_code": self.exit_code,
            "broken": self.broken,
            "counts": self.counts,
            "diagnoses": [_finite(asdict(d)) for d in self.diagnoses],
            "undecidable": {k: list(v) for k, v in self.undecidable.items()},
            "verdicts": [_finite(asdict(v)) for v in self.verdicts],
        }


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they travel as strings, as in the protocol."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value
