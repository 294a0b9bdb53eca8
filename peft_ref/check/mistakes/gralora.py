"""GraLoRA: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check import shared_mistakes as shared
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.distributions import Law, constant, uniform
from peft_ref.check.mistake import Mistake, Suite, as_if, as_if_tensors, gradients_times, with_config
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer, Linear
from peft_ref.methods.gralora import GraLoRA, Params

PLAIN = {"r": 4, "alpha": 6}
HYBRID = {"r": 4, "hybrid_r": 4, "alpha": 12}
SECOND = {"r": 2, "hybrid_r": 2, "alpha": 3}
BLOCKS = ("linear-both", "transposed-both")

VARIANTS = (
    Variant(name="plain", clause="GRALORA-C1", configs=(PLAIN,), layers=BLOCKS),
    Variant(name="four", clause="GRALORA-C2", configs=({**PLAIN, "gralora_k": 4},), layers=("linear-both",)),
    Variant(name="hybrid", clause="GRALORA-C4", configs=(HYBRID,), layers=BLOCKS),
    Variant(name="small", clause="GRALORA-C1", configs=({**PLAIN, "alpha": 8},), layers=("linear-both",), numbers="small"),
    Variant(name="rounded", clause="GRALORA-C7", configs=({"r": 6, "alpha": 10},), layers=("linear-both",), numbers="rounded"),
    Variant(name="matrix", clause="GRALORA-C5", configs=(PLAIN,), layers=BLOCKS, operations=RUN, rows=(3,)),
    Variant(name="no-bias", clause="GRALORA-C3", configs=(PLAIN,), layers=("linear-both",), bias=False),
    Variant(name="dropout", clause="GRALORA-C11", configs=({**HYBRID, "gralora_dropout": 0.75},), layers=BLOCKS, dropout=0.75),
    Variant(name="two-adapters", clause="GRALORA-C10", configs=(PLAIN, SECOND), layers=BLOCKS),
)

Pair = Callable[[Array, Array, int, int, int, int], Array]  # A, B, block row j, block column n, k and r / k: the block (out/k, in/k)


def assembled(pair: Pair, hybrid: float | None = None) -> Callable[[Case], Answer | None]:
    """A delta from other blocks, and the right all-over part, or that times `hybrid`."""

    def delta(layer: Layer, method: GraLoRA, p: Params, W0: Array) -> Array:
        k, t = method.gralora_k, method.r // method.gralora_k
        rows = [np.concatenate([pair(p.A, p.B, j, n, k, t) for n in range(k)], axis=1) for j in range(k)]
        D = method.scale * np.concatenate(rows, axis=0)
        return D if p.Ag is None else D + (method.scale if hybrid is None else hybrid) * (p.Bg @ p.Ag)

    return shared.other_delta(delta)


def right(A: Array, B: Array, j: int, n: int, k: int, t: int) -> Array:
    return B[j][n * t : n * t + t].T @ A[n][:, j * t : j * t + t].T


def _with_hybrid(factor: float | None) -> Callable[[Case], Answer | None]:
    replay = assembled(right, factor)
    return lambda case: replay(case) if any(a.config["hybrid_r"] for a in case.adapters) else None


def _turned(part: str) -> Callable[[Case], Answer | None]:
    """The last two axes of a stack of matrices read in the other order."""

    def change(key: str, v: NDArray, config: Mapping[str, Any]) -> NDArray:
        return v.reshape(v.shape[0], v.shape[2], v.shape[1]).transpose(0, 2, 1) if key == part else v

    def undo(key: str, g: NDArray, config: Mapping[str, Any]) -> NDArray:
        return g.transpose(0, 2, 1).reshape(g.shape) if key == part else g

    return as_if_tensors(change, undo)


def _scaled(scale: Callable[[float, int, int], float]) -> Callable[[Case], Answer | None]:
    """Another scale, given alpha, r and hybrid_r."""

    def change(config: dict[str, Any]) -> dict[str, Any]:
        wrong = scale(config["alpha"], config["r"], config["hybrid_r"])
        return {**config, "alpha": wrong * (config["r"] + config["hybrid_r"])}

    return as_if(lambda case: with_config(case, change))


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    (_, n_in), k, r, h = layer.shape, config["gralora_k"], config["r"], config["hybrid_r"]
    zero = constant(0.0, "init-not-identity") if config["init_weights"] else None
    found = {"gralora_A": uniform(1 / math.sqrt(n_in // k)), "gralora_B": zero or uniform(1 / math.sqrt(r))}
    if h:
        found["gralora_A_general.weight"] = uniform(1 / math.sqrt(n_in))
        found["gralora_B_general.weight"] = zero or uniform(1 / math.sqrt(h))
    return found


FRESH = Fresh(
    clause="GRALORA-C17",
    starts={
        "default": Start(PLAIN, BLOCKS),
        "hybrid": Start({**PLAIN, "hybrid_r": 2}, ("linear-both",)),
        "false-hybrid": Start({**PLAIN, "hybrid_r": 2, "init_weights": False}, ("linear-both",)),
    },
    laws=laws,
)
FILES = Files(
    configs_clause="GRALORA-C19",
    keys_clause="GRALORA-C20",
    configs={
        "plain": PLAIN,
        "alpha-missing": {"r": 4},
        "rank-missing": {"alpha": 6},
        "hybrid": {"r": 4, "alpha": 6, "hybrid_r": 2, "gralora_k": 4},
    },
    saved_on={
        "model.layers.0.self_attn.v_proj": Linear(in_features=10, out_features=14),
        "model.layers.1.mlp.down_proj": Linear(in_features=14, out_features=10),
    },
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="ranks-not-split",
            clause="GRALORA-C1",
            sentence="every block takes all r ranks of its two factors instead of r / k of them",
            replay=assembled(lambda A, B, j, n, k, t: B[j].T @ A[n].T),
        ),
        Mistake(
            name="ranks-not-exchanged",
            clause="GRALORA-C2",
            sentence="block (j, n) takes part j of B_j and part n of A_n instead of part n and part j",
            replay=assembled(lambda A, B, j, n, k, t: B[j][j * t : j * t + t].T @ A[n][:, n * t : n * t + t].T),
        ),
        Mistake(
            name="ranks-interleaved",
            clause="GRALORA-C2",
            sentence="the parts of the ranks are every k-th one instead of r / k in a row",
            replay=assembled(lambda A, B, j, n, k, t: B[j][n::k].T @ A[n][:, j::k].T),
        ),
        Mistake(
            name="blocks-transposed",
            clause="GRALORA-C2",
            sentence="the block of row j and column n stands in row n and column j",
            replay=assembled(lambda A, B, j, n, k, t: right(A, B, n, j, k, t)),
        ),
        Mistake(
            name="diagonal-blocks-only",
            clause="GRALORA-C1",
            sentence="only the blocks on the diagonal are adapted",
            replay=assembled(lambda A, B, j, n, k, t: right(A, B, j, n, k, t) * float(j == n)),
        ),
        Mistake(
            name="A-transposed",
            clause="GRALORA-C6",
            sentence="the numbers of gralora_A are read as (k, r, in / k) instead of (k, in / k, r)",
            replay=_turned("gralora_A"),
        ),
        Mistake(
            name="B-transposed",
            clause="GRALORA-C6",
            sentence="the numbers of gralora_B are read as (k, out / k, r) instead of (k, r, out / k)",
            replay=_turned("gralora_B"),
        ),
        Mistake(
            name="hybrid-ignored",
            clause="GRALORA-C4",
            sentence="the part all over the weight, of rank hybrid_r, is left out",
            replay=_with_hybrid(0.0),
        ),
        Mistake(
            name="hybrid-unscaled",
            clause="GRALORA-C4",
            sentence="the part all over the weight is not scaled",
            replay=_with_hybrid(1.0),
        ),
        Mistake(
            name="scale-without-hybrid",
            clause="GRALORA-C7",
            sentence="the scale is alpha / r instead of alpha / (r + hybrid_r)",
            replay=_scaled(lambda alpha, r, h: alpha / r),
        ),
        Mistake(
            name="scale-is-alpha",
            clause="GRALORA-C7",
            sentence="the scale is alpha",
            replay=_scaled(lambda alpha, r, h: alpha),
        ),
        Mistake(
            name="scale-is-one",
            clause="GRALORA-C7",
            sentence="alpha is ignored: the blocks are added unscaled",
            replay=_scaled(lambda alpha, r, h: 1.0),
        ),
        Mistake(
            name="grad-scale-missing",
            clause="GRALORA-C15",
            sentence="the gradients lack the scale",
            replay=gradients_times(lambda config: (config["r"] + config["hybrid_r"]) / config["alpha"]),
        ),
        shared.input_gradient_missing("GRALORA-C16"),
        *shared.dropout("GRALORA-C11"),
        shared.only_first_adapter("GRALORA-C10"),
        *shared.merging("GRALORA-C13", "GRALORA-C14"),
    ),
)
