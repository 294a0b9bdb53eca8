"""VeRA: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from peft_ref.arrays import Array, column, namespace
from peft_ref.check.asked import Config, Draw, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray, build_method
from peft_ref.check.distributions import Law, constant
from peft_ref.check.mistake import Mistake, Suite, as_if_tensors, only, reread
from peft_ref.check.oracle import answer
from peft_ref.check.shared_mistakes import dropout, merging, only_first_adapter, other_delta
from peft_ref.check.tolerance import PRECISION
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer, Linear
from peft_ref.methods.vera import Params, VeRA, projections

PLAIN = {"r": 4, "widest_in": 8, "widest_out": 9}
ALONE = {"r": 4, "widest_in": 5, "widest_out": 7}
LARGE = {"r": 9, "widest_in": 14, "widest_out": 13}

VARIANTS = (
    Variant(name="plain", clause="VERA-C1", configs=(PLAIN,), layers=("linear", "transposed_linear")),
    Variant(name="small", clause="VERA-C1", configs=(PLAIN,), numbers="small"),
    Variant(name="alone", clause="VERA-C3", configs=(ALONE,)),
    Variant(name="rounded", clause="VERA-C1", configs=(LARGE,), layers=("linear-large",), numbers="rounded"),
    Variant(name="vector", clause="VERA-C1", configs=(PLAIN,), operations=RUN, rows=()),
    Variant(name="no-bias", clause="VERA-C2", configs=(PLAIN,), bias=False),
    Variant(name="dropout", clause="VERA-C17", configs=({**PLAIN, "vera_dropout": 0.75},), dropout=0.75, operations=RUN),
    Variant(name="two-adapters", clause="VERA-C7", configs=(PLAIN, {**PLAIN, "r": 2})),
)


def delta(layer: Layer, p: Params) -> Array:
    """The right one, of whatever parameters."""
    out, n_in = layer.shape
    return (column(p.b) * p.B[:out, :]) @ (column(p.d) * p.A[:, :n_in])


def _last(layer: Layer, method: Any, p: Params, W0: Array) -> Array | None:
    out, n_in = layer.shape
    if p.A.shape[1] == n_in and p.B.shape[0] == out:
        return None
    return delta(layer, p._replace(A=p.A[:, p.A.shape[1] - n_in :], B=p.B[p.B.shape[0] - out :, :]))


def _refilled(layer: Layer, method: Any, p: Params, W0: Array) -> Array | None:
    """The first numbers of A as a matrix of the layer's own width."""
    xp, (_, n_in), r = namespace(p.A), layer.shape, p.A.shape[0]
    return None if p.A.shape[1] == n_in else delta(layer, p._replace(A=xp.reshape(xp.reshape(p.A, (-1,))[: r * n_in], (r, n_in))))


def _drawn_again(key: str, v: NDArray, config: Mapping[str, Any]) -> NDArray:
    if key not in ("vera_A", "vera_B"):
        return v
    A, B = projections(0, config["r"], config["widest_in"], config["widest_out"])
    return np.asarray(A if key == "vera_A" else B, dtype=np.float64)


def _without_d(case: Case) -> Answer:
    """The gradient of b, and that of d, each without the other vector."""
    out = dict(answer(case))
    for i, a in enumerate(case.adapters):
        t = {**a.tensors, "vera_lambda_d": np.ones_like(a.tensors["vera_lambda_d"])}
        adapters = list(case.adapters)
        adapters[i] = replace(a, tensors=t)
        out[f"{i}.vera_lambda_b"] = answer(replace(case, adapters=tuple(adapters)))[f"{i}.vera_lambda_b"]
    return out


def _without_b(case: Case) -> Answer:
    out = dict(answer(case))
    for i, a in enumerate(case.adapters):
        adapters = list(case.adapters)
        adapters[i] = replace(a, tensors={**a.tensors, "vera_lambda_b": np.ones_like(a.tensors["vera_lambda_b"])})
        out[f"{i}.vera_lambda_d"] = answer(replace(case, adapters=tuple(adapters)))[f"{i}.vera_lambda_d"]
    return out


def laws(config: Config, layer: Layer) -> Mapping[str, Law]:
    return {"vera_lambda_b": constant(0.0, "init-not-identity"), "vera_lambda_d": constant(config["d_initial"], "init-not-d-initial")}


def same_matrices(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    """The seed decides them: to the bit in float32, rounded once where the format is narrower."""
    method = build_method("vera", case.adapters[0].config)
    assert isinstance(method, VeRA)
    letters = method.dims(layer)
    want = projections(method.projection_prng_key, method.r, letters["widest_in"], letters["widest_out"])
    for key, right in zip(("vera_A", "vera_B"), want, strict=True):
        if not np.all(np.abs(draw[key] - right) <= 2.0 ** -min(PRECISION[dtype], 23) * np.abs(right)):
            return f"{key}: init-other-matrices: not what torch draws from projection_prng_key={method.projection_prng_key}"
    return ""


SUITE = Suite(
    variants=VARIANTS,
    mistakes=(
        Mistake(
            name="last-rows-and-columns",
            clause="VERA-C3",
            sentence="a narrow layer is given the last columns of A and the last rows of B instead of the first",
            replay=other_delta(_last),
        ),
        Mistake(
            name="matrix-refilled",
            clause="VERA-C3",
            sentence="the first r * in numbers of A are laid out as (r, in) instead of cutting its columns off",
            replay=other_delta(_refilled),
        ),
        Mistake(
            name="scale-is-one-over-r",
            clause="VERA-C4",
            sentence="the product is divided by r, as LoRA's is",
            replay=other_delta(lambda layer, method, p, W0: delta(layer, p) / method.r),
        ),
        Mistake(
            name="b-ignored",
            clause="VERA-C1",
            sentence="the vector b is left out",
            replay=other_delta(lambda layer, method, p, W0: delta(layer, p._replace(b=p.b * 0 + 1.0))),
        ),
        Mistake(
            name="d-ignored",
            clause="VERA-C1",
            sentence="the vector d is left out",
            replay=other_delta(lambda layer, method, p, W0: delta(layer, p._replace(d=p.d * 0 + 1.0))),
        ),
        Mistake(
            name="d-on-both",
            clause="VERA-C1",
            sentence="d scales the columns of B and the rows of A, so that it counts twice",
            replay=other_delta(lambda layer, method, p, W0: delta(layer, p._replace(d=p.d * p.d))),
        ),
        Mistake(
            name="b-on-the-frozen-too",
            clause="VERA-C1",
            sentence="b scales the frozen layer's output too, as one vector on the sum",
            replay=other_delta(lambda layer, method, p, W0: column(p.b) * W0 - W0 + delta(layer, p)),
        ),
        Mistake(
            name="A-reread",
            clause="VERA-C5",
            sentence="the numbers of vera_A are read as (widest in, r) instead of (r, widest in)",
            replay=reread("vera_A"),
        ),
        Mistake(
            name="B-reread",
            clause="VERA-C5",
            sentence="the numbers of vera_B are read as (r, widest out) instead of (widest out, r)",
            replay=reread("vera_B"),
        ),
        Mistake(
            name="drawn-again",
            clause="VERA-C6",
            sentence="A and B are drawn from the seed although the file holds them",
            replay=as_if_tensors(_drawn_again, lambda key, g, config: g),
        ),
        Mistake(name="grad-b-without-d", clause="VERA-C10", sentence="the gradient of b lacks d", replay=only(backward=_without_d)),
        Mistake(name="grad-d-without-b", clause="VERA-C11", sentence="the gradient of d lacks b", replay=only(backward=_without_b)),
        only_first_adapter("VERA-C7"),
        *merging("VERA-C8", "VERA-C9"),
        *dropout("VERA-C17"),
    ),
    fresh=Fresh(
        clause="VERA-C12",
        starts={
            "default": Start({"r": 4, "d_initial": 0.125}, ("linear", "transposed_linear"), 1),
            "wide": Start({**PLAIN, "d_initial": 0.25, "projection_prng_key": 7}, draws=1),
        },
        laws=laws,
        identity=same_matrices,
    ),
    files=Files(
        configs_clause="VERA-C14",
        keys_clause="VERA-C15",
        configs={
            "plain": {"r": 4, "save_projection": True},
            "default": {},
            "other-seed": {"r": 8, "projection_prng_key": 5, "d_initial": 0.25},
        },
        told={"r": "r"},
        saved_on={
            "model.layers.0.self_attn.v_proj": Linear(in_features=5, out_features=7),
            "model.layers.1.mlp.down_proj": Linear(in_features=7, out_features=5),
        },
    ),
)
