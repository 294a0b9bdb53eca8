"""VB-LoRA: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from peft_ref.arrays import Array, namespace
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.distributions import Law, normal, uniform
from peft_ref.check.mistake import Mistake, Replay, Suite, as_if, only, reread, with_config
from peft_ref.check.oracle import answer, pose
from peft_ref.check.shared_mistakes import dropout, merging, only_first_adapter, other_delta
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer, Linear
from peft_ref.methods.vblora import largest

PLAIN = {"r": 3, "num_vectors": 5, "vector_length": 4, "topk": 2}
BOTH = ("linear-both", "transposed-both")


def apart(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    """Logits of which no two of a piece are equal or near."""
    n = shape[-1]
    return rng.permuted(np.broadcast_to(np.arange(n) / 2 - 0.75, shape), axis=-1)


DRAWS = {"logits_A": apart, "logits_B": apart}

VARIANTS = (
    Variant(name="plain", clause="VBLORA-C1", configs=(PLAIN,), layers=BOTH, draws=DRAWS),
    Variant(name="small", clause="VBLORA-C1", configs=({**PLAIN, "vector_length": 2},), layers=BOTH[:1], numbers="small", draws=DRAWS),
    Variant(name="three-of-six", clause="VBLORA-C2", configs=({**PLAIN, "num_vectors": 6, "topk": 3},), layers=BOTH[:1], draws=DRAWS),
    Variant(name="rounded", clause="VBLORA-C1", configs=(PLAIN,), layers=BOTH[:1], numbers="rounded", draws=DRAWS),
    Variant(name="vector", clause="VBLORA-C1", configs=(PLAIN,), layers=BOTH[:1], operations=RUN, rows=(), draws=DRAWS),
    Variant(name="no-bias", clause="VBLORA-C6", configs=(PLAIN,), layers=BOTH[:1], bias=False, draws=DRAWS),
    Variant(
        name="dropout",
        clause="VBLORA-C17",
        configs=({**PLAIN, "vblora_dropout": 0.75},),
        layers=BOTH[:1],
        dropout=0.75,
        operations=RUN,
        draws=DRAWS,
    ),
    Variant(name="two-adapters", clause="VBLORA-C8", configs=(PLAIN, {**PLAIN, "r": 2, "topk": 3}), layers=BOTH[:1], draws=DRAWS),
)

Weights = Callable[[Any, Array], Array]


def _right(method: Any, logits: Array) -> Array:
    return method._weights(logits)


def _of_all(method: Any, logits: Array) -> Array:
    """The softmax over all, of which the k largest are taken as they are."""
    xp, n = namespace(logits), logits.shape[-1]
    flat = xp.reshape(logits, (-1, n))
    powers = xp.exp(flat)
    return xp.where(largest(flat, method.topk), powers / xp.sum(powers, axis=1, keepdims=True), 0 * powers)


def _raw(method: Any, logits: Array) -> Array:
    xp, n = namespace(logits), logits.shape[-1]
    flat = xp.reshape(logits, (-1, n))
    return xp.where(largest(flat, method.topk), flat, 0 * flat)


def _smallest(method: Any, logits: Array) -> Array:
    xp, n = namespace(logits), logits.shape[-1]
    flat = xp.reshape(logits, (-1, n))
    powers = xp.where(largest(0 - flat, method.topk), xp.exp(flat), 0 * flat)
    return powers / xp.sum(powers, axis=1, keepdims=True)


def _right_A(pieces: Array) -> Array:
    """(r, tiles, L) as (r, in)."""
    return namespace(pieces).reshape(pieces, (pieces.shape[0], -1))


def _right_B(pieces: Array) -> Array:
    """(tiles, r, L) as (out, r)."""
    xp = namespace(pieces)
    return xp.reshape(xp.matrix_transpose(pieces), (-1, pieces.shape[1]))


def _product(
    weights: Weights = _right, A: Callable[[Array], Array] = _right_A, B: Callable[[Array], Array] = _right_B, scale: bool = False
) -> Replay:
    def delta(layer: Layer, method: Any, p: Any, W0: Array) -> Array:
        xp, L = namespace(p.bank), method.vector_length
        pieces_A = xp.reshape(weights(method, p.logits_A) @ p.bank, (*p.logits_A.shape[:2], L))
        pieces_B = xp.reshape(weights(method, p.logits_B) @ p.bank, (*p.logits_B.shape[:2], L))
        W = B(pieces_B) @ A(pieces_A)
        return W / method.r if scale else W

    return other_delta(delta)


def _swapped(pieces: Array) -> Array:
    """A's pieces counted tile by tile."""
    xp, (r, tiles, L) = namespace(pieces), pieces.shape
    return xp.reshape(xp.permute_dims(pieces, (1, 0, 2)), (r, tiles * L))


def _flat(pieces: Array) -> Array:
    xp, (tiles, r, L) = namespace(pieces), pieces.shape
    return xp.reshape(pieces, (tiles * L, r))


def _interleaved(pieces: Array) -> Array:
    xp, (tiles, r, L) = namespace(pieces), pieces.shape
    return xp.reshape(xp.permute_dims(pieces, (2, 0, 1)), (tiles * L, r))


def _bank_from_A_alone(case: Case) -> Answer | None:
    if len(case.adapters) != 1 or case.adapters[0].dropout:
        return None
    p = pose(case)
    method: Any = p.adapters[0].method
    params = p.adapters[0].params
    B, _ = method._factors(p.layer, params)
    pieces = (B.T @ p.layer.weight_vjp(p.x, p.dy)).reshape(-1, method.vector_length)
    return {**answer(case), "0.vblora_vector_bank": method._mixed_vjp(params.logits_A, params.bank, pieces)[1]}


def _without_mean(case: Case) -> Answer | None:
    """The softmax's gradient as if every weight were an exponential alone."""
    if len(case.adapters) != 1 or case.adapters[0].dropout:
        return None
    p = pose(case)
    method: Any = p.adapters[0].method
    params, dW, L = p.adapters[0].params, p.layer.weight_vjp(p.x, p.dy), p.adapters[0].method.vector_length  # type: ignore[attr-defined]
    B, A = method._factors(p.layer, params)
    pieces_B = np.swapaxes((dW @ A.T).reshape(-1, L, method.r), 1, 2).reshape(-1, L)
    out = dict(answer(case))
    for key, logits, d in (("A", params.logits_A, (B.T @ dW).reshape(-1, L)), ("B", params.logits_B, pieces_B)):
        out[f"0.vblora_logits_{key}"] = (method._weights(logits) * (d @ params.bank.T)).reshape(logits.shape)
    return out


def laws(config: Config, layer: Layer) -> Mapping[str, Law]:
    spread = config.get("init_logits_std", 0.1)
    return {
        "vblora_logits_A": normal(spread),
        "vblora_logits_B": normal(spread),
        "vblora_vector_bank": uniform(config.get("init_vector_bank_bound", 0.02), "init-nothing-to-train"),
    }


SUITE = Suite(
    variants=VARIANTS,
    mistakes=(
        Mistake(
            name="softmax-before-the-choice",
            clause="VBLORA-C2",
            sentence="the softmax is taken over all n logits and the k largest are used as they are, so that they do not add up to one",
            replay=_product(_of_all),
        ),
        Mistake(
            name="all-vectors",
            clause="VBLORA-C2",
            sentence="topk is not read: every vector of the bank is mixed in",
            replay=as_if(lambda case: with_config(case, lambda config: {**config, "topk": config["num_vectors"]})),
        ),
        Mistake(
            name="the-largest-alone",
            clause="VBLORA-C2",
            sentence="only the vector with the largest logit is used",
            replay=as_if(lambda case: with_config(case, lambda config: {**config, "topk": 1})),
        ),
        Mistake(
            name="smallest-logits",
            clause="VBLORA-C2",
            sentence="the k smallest logits are chosen",
            replay=_product(_smallest),
        ),
        Mistake(
            name="logits-as-weights",
            clause="VBLORA-C2",
            sentence="the k largest logits themselves are the weights, without a softmax",
            replay=_product(_raw),
        ),
        Mistake(
            name="A-tile-by-tile",
            clause="VBLORA-C3",
            sentence="A's pieces are laid out tile by tile instead of row by row",
            replay=_product(A=_swapped),
        ),
        Mistake(
            name="B-not-turned",
            clause="VBLORA-C4",
            sentence="B's pieces are laid out in rows, as they come, instead of in columns",
            replay=_product(B=_flat),
        ),
        Mistake(
            name="B-interleaved",
            clause="VBLORA-C4",
            sentence="the pieces of a column of B alternate number by number instead of following one another",
            replay=_product(B=_interleaved),
        ),
        Mistake(name="scale-is-one-over-r", clause="VBLORA-C5", sentence="the product is divided by r", replay=_product(scale=True)),
        Mistake(
            name="bank-reread",
            clause="VBLORA-C7",
            sentence="the numbers of vblora_vector_bank are read as (L, n) instead of (n, L)",
            replay=reread("vblora_vector_bank"),
        ),
        Mistake(
            name="bank-gradient-of-A-alone",
            clause="VBLORA-C11",
            sentence="the gradient of the bank has A's part and lacks B's",
            replay=only(backward=_bank_from_A_alone),
        ),
        Mistake(
            name="softmax-gradient-without-mean",
            clause="VBLORA-C12",
            sentence="the gradient of the logits is w * u, without taking off w . u",
            replay=only(backward=_without_mean),
        ),
        only_first_adapter("VBLORA-C8"),
        *merging("VBLORA-C9", "VBLORA-C10"),
        *dropout("VBLORA-C17"),
    ),
    fresh=Fresh(
        clause="VBLORA-C13",
        starts={
            "default": Start({**PLAIN}, BOTH),
            "wide": Start({**PLAIN, "init_logits_std": 0.5, "init_vector_bank_bound": 0.25}, BOTH[:1]),
        },
        laws=laws,
    ),
    files=Files(
        configs_clause="VBLORA-C15",
        keys_clause="VBLORA-C16",
        configs={"plain": {**PLAIN}, "other": {"r": 8, "num_vectors": 90, "vector_length": 64, "topk": 3}},
        told={"r": "r", "topk": "topk"},
        saved_on={
            "model.layers.0.self_attn.v_proj": Linear(in_features=8, out_features=12),
            "model.layers.1.mlp.down_proj": Linear(in_features=12, out_features=4),
        },
    ),
)
