"""What numbers that are drawn must look like, judged from many draws.

The distribution test is Kolmogorov and Smirnov's, at a level (about 1e-12) at which an honest port is never accused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from peft_ref.check.case import NDArray
from peft_ref.check.tolerance import PRECISION

UNLIKELY = 1e-12
KS_LIMIT = 3.8  # P(sqrt(n) D > 3.8) = 2 exp(-2 * 3.8^2) = 6e-13
A_ZERO = "init-A-zero: it is zero in every draw, so nothing can be learned from it together with a zero partner"


@dataclass(frozen=True)
class Law:
    """What the numbers of one key must look like; `problem` says how they do not."""

    text: str
    problem: Callable[[NDArray, str], str]  # given all draws stacked, and the port's dtype


def constant(value: float, name: str) -> Law:
    def problem(draws: NDArray, dtype: str) -> str:
        return "" if np.all(draws == value) else f"{name}: it must be {value:g} everywhere, and is not"

    return Law(f"{value:g}", problem)


def uniform(bound: float, if_zero: str = A_ZERO) -> Law:
    def problem(draws: NDArray, dtype: str) -> str:
        u = 2.0 ** -PRECISION[dtype]
        if not np.any(draws):
            return if_zero
        if np.max(np.abs(draws)) > bound * (1 + 2 * u):
            return f"init-wrong-bound: {np.max(np.abs(draws)):.4g} was drawn, expected uniform within {bound:.4g}"
        return _ks(draws, lambda v: np.clip((v + bound) / (2 * bound), 0, 1), f"uniform within {bound:.4g}", u * bound)

    return Law(f"uniform within {bound:.4g}", problem)


def normal(deviation: float, mean: float = 0.0) -> Law:
    def problem(draws: NDArray, dtype: str) -> str:
        if not np.any(draws):
            return "init-zero: it is zero in every draw"
        draws = draws - mean
        law, u = NormalDist(0.0, deviation), 2.0 ** -PRECISION[dtype]
        # A uniform of the same deviation is near in every statistic but this one: it ends.
        reach = law.inv_cdf((1 + UNLIKELY ** (1 / draws.size)) / 2) * (1 - 2 * u)
        if np.max(np.abs(draws)) < reach:
            return (
                f"init-wrong-law: of {draws.size} draws none is beyond {reach:.4g}, which a normal with deviation {deviation:.4g} reaches"
            )
        return _ks(draws, np.vectorize(law.cdf), f"normal with deviation {deviation:.4g}", u * (deviation + abs(mean)))

    return Law(f"normal, deviation {deviation:.4g}", problem)


def _ks(draws: NDArray, cdf: Callable[[NDArray], NDArray], law: str, rounding: float) -> str:
    values = np.sort(draws.reshape(-1))
    n = values.size
    want = cdf(values)
    steps = np.arange(n + 1) / n
    # A coarse format rounds draws to few values: its steps may be as wide as the law's mass within one rounding.
    slack = np.max(cdf(values + 2 * rounding) - want)
    distance = max(np.max(steps[1:] - want), np.max(want - steps[:-1])) - slack
    if distance * math.sqrt(n) <= KS_LIMIT:
        return ""
    return f"init-wrong-law: {n} draws with deviation {np.std(values):.4g} do not look {law} (Kolmogorov-Smirnov distance {distance:.2f})"
