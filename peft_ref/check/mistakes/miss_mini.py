"""MiSS mini: what is asked, and what ports get wrong."""

from __future__ import annotations

import numpy as np

from peft_ref.arrays import tile
from peft_ref.check import shared_mistakes as shared
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case
from peft_ref.check.distributions import Law, constant
from peft_ref.check.mistake import Mistake, Suite, only, reread
from peft_ref.check.mistakes.miss import averaged, first_columns, in_runs, one_copy_backward, without_remainder
from peft_ref.check.oracle import answer, pose
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer

PLAIN = {"r": 2, "mini_r": 4}
WIDE = {"r": 3, "mini_r": 4}

VARIANTS = (
    Variant(name="plain", clause="MISSMINI-C1", configs=(PLAIN,), layers=("linear-both",)),
    Variant(name="remainder", clause="MISSMINI-C6", configs=(WIDE,), layers=("linear-both",)),
    Variant(name="small", clause="MISSMINI-C1", configs=({"r": 4, "mini_r": 3},), layers=("linear-both",), numbers="small"),
    Variant(name="rounded", clause="MISSMINI-C1", configs=({"r": 5, "mini_r": 6},), layers=("linear-both",), numbers="rounded"),
    Variant(name="one-row", clause="MISSMINI-C4", configs=({"r": 2, "mini_r": 1},)),
    Variant(name="vector", clause="MISSMINI-C3", configs=(PLAIN,), layers=("linear-both",), operations=RUN, rows=()),
    Variant(name="no-bias", clause="MISSMINI-C2", configs=(PLAIN,), layers=("linear-both",), bias=False),
    Variant(name="dropout", clause="MISSMINI-C8", configs=({**PLAIN, "miss_dropout": 0.75},), layers=("linear-both",), dropout=0.75),
    Variant(name="two-adapters", clause="MISSMINI-C7", configs=(PLAIN, {"r": 4, "mini_r": 6}), layers=("linear-both",)),
)


def _one_row_backward(case: Case) -> Answer | None:
    """The block's gradient from its first copy over the rows alone."""
    p = pose(case)
    if any(a.dropout for a in p.adapters):
        return None
    G = p.layer.weight_vjp(p.x, p.dy)
    found = {}
    for i, a in enumerate(p.adapters):
        r, q = a.params.D.shape
        found[f"{i}.miss_block"] = np.stack([G[:q, k::r].sum(axis=1) for k in range(r)])
    return {**answer(case), **found}


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    return {"miss_block": constant(0.0, "init-not-identity")}


FRESH = Fresh(clause="MISSMINI-C13", starts={"default": Start({"r": 4, "mini_r": 3}, ("linear-both",))}, laws=laws)
FILES = Files(
    configs_clause="MISSMINI-C14",
    keys_clause="MISSMINI-C15",
    configs={"plain": {"r": 4, "mini_r": 1, "init_weights": "mini"}, "size-missing": {"r": 2, "init_weights": "mini"}},
    told={"r": "r"},
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="rows-in-runs",
            clause="MISSMINI-C1",
            sentence="row i gets column i // (out / mini_r) of the block instead of column i mod mini_r",
            replay=shared.other_delta(lambda layer, method, p, W0: tile(in_runs(p.D.T, (layer.shape[0], p.D.shape[0])), layer.shape)),
        ),
        Mistake(
            name="columns-in-runs",
            clause="MISSMINI-C1",
            sentence="column j gets row j // (in / r) of the block instead of row j mod r",
            replay=shared.other_delta(lambda layer, method, p, W0: tile(in_runs(p.D.T, (p.D.shape[1], layer.shape[1])), layer.shape)),
        ),
        Mistake(
            name="rows-once",
            clause="MISSMINI-C1",
            sentence="only the first mini_r outputs are adapted",
            replay=shared.other_delta(lambda layer, method, p, W0: first_columns(tile(p.D.T, layer.shape).T, p.D.shape[1]).T),
        ),
        Mistake(
            name="block-once",
            clause="MISSMINI-C1",
            sentence="the block is added to the first r columns only and not repeated",
            replay=shared.other_delta(lambda layer, method, p, W0: first_columns(tile(p.D.T, layer.shape), p.D.shape[0])),
        ),
        Mistake(
            name="copies-averaged",
            clause="MISSMINI-C5",
            sentence="the inputs that share a row of the block are averaged instead of added up",
            replay=shared.other_delta(lambda layer, method, p, W0: averaged(layer, p.D)),
        ),
        Mistake(
            name="remainder-left-out",
            clause="MISSMINI-C6",
            sentence="where r does not divide in, the last columns get nothing",
            replay=shared.other_delta(lambda layer, method, p, W0: without_remainder(layer, p.D)),
        ),
        Mistake(
            name="block-transposed",
            clause="MISSMINI-C4",
            sentence="miss_block's numbers are read as (mini_r, r) instead of (r, mini_r)",
            replay=reread("miss_block"),
        ),
        Mistake(
            name="grad-of-one-copy",
            clause="MISSMINI-C11",
            sentence="the block's gradient is that of its first copy over the columns instead of the sum over all",
            replay=only(backward=one_copy_backward),
        ),
        Mistake(
            name="grad-of-one-row",
            clause="MISSMINI-C11",
            sentence="the block's gradient is that of its first copy over the rows instead of the sum over all",
            replay=only(backward=_one_row_backward),
        ),
        shared.input_gradient_missing("MISSMINI-C12"),
        *shared.dropout("MISSMINI-C8"),
        shared.only_first_adapter("MISSMINI-C7"),
        *shared.merging("MISSMINI-C9", "MISSMINI-C10"),
    ),
)
