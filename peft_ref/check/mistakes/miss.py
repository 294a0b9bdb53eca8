"""MiSS: what is asked, and what ports get wrong."""

from __future__ import annotations

import math

import numpy as np

from peft_ref.arrays import Array, tile
from peft_ref.check import shared_mistakes as shared
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case
from peft_ref.check.distributions import Law, constant, uniform
from peft_ref.check.mistake import Mistake, Suite, only, reread
from peft_ref.check.oracle import answer, pose
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer

PLAIN = {"r": 2}

VARIANTS = (
    Variant(name="plain", clause="MISS-C1", configs=(PLAIN,), layers=("linear", "linear-both")),
    Variant(name="small", clause="MISS-C1", configs=({"r": 4},), layers=("linear", "linear-both"), numbers="small"),
    Variant(name="rounded", clause="MISS-C1", configs=({"r": 5},), layers=("linear-large",), numbers="rounded"),
    Variant(name="vector", clause="MISS-C3", configs=(PLAIN,), operations=RUN, rows=()),
    Variant(name="no-bias", clause="MISS-C2", configs=(PLAIN,), bias=False),
    Variant(name="dropout", clause="MISS-C10", configs=({**PLAIN, "miss_dropout": 0.75},), layers=("linear", "linear-both"), dropout=0.75),
    Variant(name="two-adapters", clause="MISS-C9", configs=(PLAIN, {"r": 3}), layers=("linear", "linear-both")),
)


def copies(layer: Layer, D: Array) -> int:
    return -(-layer.shape[1] // int(D.shape[0]))


def in_runs(V: Array, shape: tuple[int, int]) -> Array:
    """Every entry of V as many times in a row as it is repeated, instead of V as a whole again and again."""
    rows, columns = (-(-n // m) for n, m in zip(shape, V.shape, strict=True))
    return np.repeat(np.repeat(V, rows, axis=0)[: shape[0]], columns, axis=1)[:, : shape[1]]


def first_columns(V: Array, columns: int) -> Array:
    """V with zeros after a number of columns."""
    return V * (np.arange(V.shape[1]) < columns)


def averaged(layer: Layer, D: Array) -> Array:
    return tile(D.T, layer.shape) / copies(layer, D)


def one_copy_backward(case: Case) -> Answer | None:
    """The block's gradient from its first copy over the columns alone."""
    p = pose(case)
    if any(a.dropout for a in p.adapters):
        return None
    G = p.layer.weight_vjp(p.x, p.dy)
    rows = {f"{i}.miss_block": _rows_of(G[:, : a.params.D.shape[0]].T, a.params.D.shape) for i, a in enumerate(p.adapters)}
    return {**answer(case), **rows}


def _rows_of(g: Array, shape: tuple[int, int]) -> Array:
    """(r, out) summed to (r, mini_r)."""
    return g.reshape(shape[0], -1, shape[1]).sum(axis=1)


def without_remainder(layer: Layer, D: Array) -> Array | None:
    whole = layer.shape[1] // D.shape[0] * D.shape[0]
    return first_columns(tile(D.T, layer.shape), whole)


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    drawn = uniform(1 / math.sqrt(layer.shape[0]))
    return {"miss_block": constant(0.0, "init-not-identity") if config["init_weights"] else drawn}


FRESH = Fresh(
    clause="MISS-C17",
    starts={"default": Start(PLAIN), "false": Start({**PLAIN, "init_weights": False})},
    laws=laws,
)
FILES = Files(
    configs_clause="MISS-C19",
    keys_clause="MISS-C20",
    configs={"plain": PLAIN, "rank-missing": {}, "mini-elsewhere": {"r": 2, "mini_r": 4, "bias": "none"}},
    told={"r": "r"},
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="columns-in-runs",
            clause="MISS-C1",
            sentence="column j gets row j // (in / r) of the block instead of row j mod r: neighbouring inputs are added up",
            replay=shared.other_delta(lambda layer, method, p, W0: in_runs(p.D.T, (layer.shape[0], layer.shape[1]))),
        ),
        Mistake(
            name="block-once",
            clause="MISS-C1",
            sentence="the block is added to the first r columns only and not repeated",
            replay=shared.other_delta(lambda layer, method, p, W0: first_columns(tile(p.D.T, layer.shape), p.D.shape[0])),
        ),
        Mistake(
            name="copies-averaged",
            clause="MISS-C5",
            sentence="the inputs that share a row of the block are averaged instead of added up",
            replay=shared.other_delta(lambda layer, method, p, W0: averaged(layer, p.D)),
        ),
        Mistake(
            name="scale-one-over-r",
            clause="MISS-C5",
            sentence="the block is divided by r; MiSS has no scale",
            replay=shared.other_delta(lambda layer, method, p, W0: tile(p.D.T, layer.shape) / method.r),
        ),
        Mistake(
            name="remainder-left-out",
            clause="MISS-C7",
            sentence="where r does not divide in, the last columns get nothing",
            replay=shared.other_delta(lambda layer, method, p, W0: without_remainder(layer, p.D)),
        ),
        Mistake(
            name="block-backwards",
            clause="MISS-C1",
            sentence="the block's rows are taken in reverse: column j gets row r - 1 - (j mod r)",
            replay=shared.other_delta(lambda layer, method, p, W0: tile(p.D.T[:, ::-1], layer.shape)),
        ),
        Mistake(
            name="block-transposed",
            clause="MISS-C4",
            sentence="miss_block's numbers are read as (out, r) instead of (r, out)",
            replay=reread("miss_block"),
        ),
        Mistake(
            name="grad-of-one-copy",
            clause="MISS-C15",
            sentence="the block's gradient is that of its first copy instead of the sum over all",
            replay=only(backward=one_copy_backward),
        ),
        shared.input_gradient_missing("MISS-C16"),
        *shared.dropout("MISS-C10"),
        shared.only_first_adapter("MISS-C9"),
        *shared.merging("MISS-C12", "MISS-C13"),
    ),
)
