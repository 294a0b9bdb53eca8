"""PVeRA in evaluation: what is asked, and what ports get wrong. VeRA's mistakes, and those of its two halves."""

from __future__ import annotations

from typing import Any

from peft_ref.arrays import Array
from peft_ref.check.asked import Files, Fresh
from peft_ref.check.mistake import Mistake, Suite
from peft_ref.check.mistakes.vera import CONFIGS, FRESH, as_drawn, random_pair, starts, variants
from peft_ref.check.mistakes.vera import delta as of_vera
from peft_ref.check.shared_mistakes import other_delta
from peft_ref.layers import Layer


def delta(layer: Layer, p: Any) -> Array:
    """The right one: the first half of d and of A."""
    r = p.d.shape[0] // 2
    return of_vera(layer, p._replace(d=p.d[:r], A=p.A[:r, :]))


def _second(layer: Layer, method: Any, p: Any, W0: Array) -> Array:
    return of_vera(layer, p._replace(d=p.d[method.r :], A=p.A[method.r :, :]))


HALVES = (
    Mistake(
        name="second-half",
        clause="PVERA-C18",
        sentence="the half of the logarithm of the variance stands for the mean",
        replay=other_delta(_second),
    ),
    Mistake(
        name="halves-interleaved",
        clause="PVERA-C18",
        sentence="mean and variance alternate: every second row of A and number of d is the mean's",
        replay=other_delta(lambda layer, method, p, W0: of_vera(layer, p._replace(d=p.d[::2], A=p.A[::2, :]))),
    ),
    Mistake(
        name="halves-added",
        clause="PVERA-C18",
        sentence="the half of the variance is added to the mean",
        replay=other_delta(lambda layer, method, p, W0: delta(layer, p) + _second(layer, method, p, W0)),
    ),
)

SUITE = Suite(
    variants=variants("PVERA", "pvera_dropout"),
    mistakes=(*random_pair("PVERA", "pvera", delta, 2), *HALVES),
    fresh=Fresh(clause="PVERA-C12", starts=FRESH, laws=starts("pvera"), identity=as_drawn("pvera", 2)),
    files=Files(configs_clause="PVERA-C14", keys_clause="PVERA-C15", configs=CONFIGS, told={"r": "r"}),
)
