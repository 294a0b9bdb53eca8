"""How far an honest computation may drift, element by element, and where it may not drift at all.

`Exact` numbers carry k roundings over a gauge, and the error err of what they were divided by: in a format of unit roundoff u the bound is
u (k gauge + err). The judge allows two roundings more (a float32 sum rounded once to bfloat16, an input read through a
decimal). Where nothing can have rounded, bits must match.
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


def expect(right: dict[str, np.ndarray[Any, Any]], dtype: str, apart: Answer | None = None) -> Expected:
    """From an answer in `Exact` numbers of the dtype's precision.

    `apart` is the size of terms that an honest order adds and subtracts again; then bits never have to match.
    """
    u = 2.0 ** -PRECISION[dtype]
    values = {name: array.astype(np.float64) for name, array in right.items()}
    more = {name: 0.0 if apart is None else 2 * apart[name] for name in right}
    roots = {name: 3 * np.sqrt(_map(lambda e: e.depth + 2, array)) for name, array in right.items()}
    errors = {name: _map(lambda e: e.err, array) for name, array in right.items()}
    gauges = {name: _map(lambda e: e.gauge, array) + more[name] for name, array in right.items()}
    likely = {name: u * (roots[name] * gauges[name] + errors[name]) for name in right}
    exact = apart is None and _nothing_rounds(right, dtype)
    bounds = {name: np.zeros(array.shape) if exact else _bound(array, gauges[name], errors[name], dtype) for name, array in right.items()}
    return Expected(values, bounds, likely, exact)


def anything(values: Answer) -> Expected:
    """Where nothing can be expected: every finite number is within tolerance."""
    endless = {name: np.full(array.shape, math.inf) for name, array in values.items()}
    return Expected(values, endless, endless, False)


def _nothing_rounds(right: dict[str, np.ndarray[Any, Any]], dtype: str) -> bool:
    tiny = TINY[dtype]
    return all(
        e.quantum is not None and e.gauge <= LARGEST[dtype] and math.ldexp(1.0, e.quantum) >= tiny
        for array in right.values()
        for e in array.reshape(-1)
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


def _bound(right: np.ndarray[Any, Any], gauge: np.ndarray[Any, Any], err: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    u = 2.0 ** -PRECISION[dtype]
    roundings = _map(lambda e: e.k + 2, right)
    share = np.asarray([n * u / (1 - n * u) if n * u < 1 else math.inf for n in roundings.reshape(-1)]).reshape(roundings.shape)
    return np.asarray(np.where(gauge > 0, share * np.maximum(gauge, 1e-300), 0.0) + u * err + roundings * TINY[dtype])


def _map(f: Any, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray([f(e) for e in array.reshape(-1)], dtype=np.float64).reshape(array.shape)
