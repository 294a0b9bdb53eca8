"""Making wrong draws of right ones, for the judge to name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from peft_ref.check.case import Case

Host: TypeAlias = Any  # an array
Draw = dict[str, Host]
Wrong = Callable[[Case, Draw, np.random.Generator], Draw]


def key_with(draw: Draw, part: str) -> str:
    return next(k for k in draw if part in k)


def replaced(part: str, number: Callable[[Case, Host, np.random.Generator], Host]) -> Wrong:
    """The tensor whose key has `part`, drawn otherwise."""

    def wrong(case: Case, draw: Draw, rng: np.random.Generator) -> Draw:
        key = key_with(draw, part)
        return {**draw, key: number(case, draw[key], rng)}

    return wrong


def fan_in(case: Case) -> int:
    assert case.layer is not None
    return case.layer.fan_in
