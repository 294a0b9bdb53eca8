"""How far an honest computation may drift, element by element, and where it may not drift at all.

`Exact` numbers carry k roundings over a gauge: in a format of unit roundoff u the bound is k u gauge / (1 - k u). The judge allows twice
that and two roundings more (a float32 sum rounded once to bfloat16, an input read through a decimal), times a method's slack for
honest formulas with larger terms. Where nothing can have rounded, bits must match.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from peft_ref.check.case import Answer
from peft_ref.check.result import Worst

PRECISION = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
# The spacing of the smallest numbers, below which float16 rounds absolutely; the others reach far below any case.
TINY = {"float64": 0.0, "float32": 0.0, "float16": 2.0**-24, "bfloat16": 0.0}
LARGEST = {"float64": math.inf, "float32": 2.0**127, "float16": 65504.0, "bfloat16": 2.0**127}


class Expected(NamedTuple):
    """The right answer with, for one dtype, the tolerance of every element; `exact` if it is zero everywhere."""

    values: Answer
    tolerance: Answer
    likely: Answer  # how far an honest computation drifts as a rule: for recognising, never for accusing
    exact: bool


def expect(right: dict[str, np.ndarray[Any, Any]], dtype: str, slack: float = 1.0) -> Expected:
    """From an answer in `Exact` numbers of the dtype's precision. With a slack above 1 bits never have to match."""
    u = 2.0 ** -PRECISION[dtype]
    values = {name: array.astype(np.float64) for name, array in right.items()}
    likely = {name: _map(lambda e: 3 * math.sqrt(e.depth + 2) * u * e.gauge, array) for name, array in right.items()}
    exact = slack == 1.0 and _nothing_rounds(right, dtype)
    bounds = {name: _map(lambda e: 0.0 if exact else _bound(e.k, e.gauge, dtype, slack), array) for name, array in right.items()}
    return Expected(values, bounds, likely, exact)


def _nothing_rounds(right: dict[str, np.ndarray[Any, Any]], dtype: str) -> bool:
    tiny = TINY[dtype]
    return all(
        e.k == 0 and e.gauge <= LARGEST[dtype] and math.ldexp(1.0, e.quantum) >= tiny for array in right.values() for e in array.reshape(-1)
    )


def compare(got: Answer, expected: Expected) -> Worst:
    """The worst element; its ratio is at most 1 where the answer is right. A number that is not finite is infinitely wrong."""
    worst: Worst | None = None
    for name, want in expected.values.items():
        if not want.size:
            continue
        distance = np.abs(got[name].astype(np.float64) - want)
        tolerance = expected.tolerance[name]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(distance == 0, 0.0, distance / tolerance)
        ratio = np.where(np.isfinite(got[name]), ratio, np.inf)
        at = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
        if worst is None or ratio[at] > worst.ratio:
            index = tuple(int(i) for i in at)
            worst = Worst(name, index, float(got[name][at]), float(want[at]), float(ratio[at]))
    return worst if worst is not None else Worst("", (), 0.0, 0.0, 0.0)


def near(got: Answer, other: Answer, expected: Expected, dtype: str) -> bool:
    """Whether `got` is `other` (a replayed mistake), up to the usual drift at that size."""
    u = 2.0 ** -PRECISION[dtype]
    for name, want in other.items():
        if got[name].shape != want.shape:
            return False
        size = np.abs(want)
        allowed = expected.likely[name] + 8 * u * (size + 0.25 * (float(np.max(size)) if size.size else 0.0))
        if not np.all(np.abs(got[name] - want) <= allowed):
            return False
    return True


def _bound(k: float, gauge: float, dtype: str, slack: float) -> float:
    drift = 2 * slack * (k + 2) * 2.0 ** -PRECISION[dtype]
    tiny = (k + 2) * TINY[dtype]
    return math.inf if drift >= 1 else drift * gauge / (1 - drift) + tiny


def _map(f: Any, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray([f(e) for e in array.reshape(-1)], dtype=np.float64).reshape(array.shape)
