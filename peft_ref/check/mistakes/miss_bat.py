"""MiSS bat: what is asked, and what ports get wrong.

Unmerging inverts I + D. It is asked with blocks for which I + D is triangular, with powers of two on the diagonal that no other entry
exceeds: elimination with or without pivots then rounds nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from peft_ref.arrays import Array, right_divide
from peft_ref.check import shared_mistakes as shared
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.distributions import Law, constant
from peft_ref.check.mistake import Formula, Mistake, Suite, as_if_tensors, one_by_one, only, stored
from peft_ref.check.oracle import Problem, answer, pose
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer, Linear
from peft_ref.stack import Adapter

PLAIN = {"r": 4}
BLOCKS = ("linear-both",)


def triangular(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    upper = np.triu(rng.choice([-1.0, -0.5, 0.5, 1.0], shape), 1)
    diagonal = rng.choice([-2.0, 2.0], shape[:-1])[..., None] * np.eye(shape[-1])
    return np.asarray(upper + diagonal - np.eye(shape[-1]))


D = {"D": triangular}
NOT_BACK = (*RUN, "merge")

VARIANTS = (
    Variant(name="plain", clause="MISSBAT-C1", configs=(PLAIN,), layers=BLOCKS, draws=D),
    Variant(name="two", clause="MISSBAT-C1", configs=({"r": 2},), layers=BLOCKS, draws=D),
    Variant(name="full", clause="MISSBAT-C1", configs=(PLAIN,), layers=BLOCKS, operations=NOT_BACK),
    Variant(name="small", clause="MISSBAT-C1", configs=(PLAIN,), layers=BLOCKS, operations=NOT_BACK, numbers="small"),
    Variant(name="rounded", clause="MISSBAT-C1", configs=(PLAIN,), layers=BLOCKS, operations=NOT_BACK, numbers="rounded"),
    Variant(name="rounded-two", clause="MISSBAT-C8", configs=(PLAIN, {"r": 2}), layers=BLOCKS, operations=NOT_BACK, numbers="rounded"),
    Variant(name="vector", clause="MISSBAT-C4", configs=(PLAIN,), layers=BLOCKS, operations=RUN, rows=(), draws=D),
    Variant(name="no-bias", clause="MISSBAT-C3", configs=(PLAIN,), layers=BLOCKS, bias=False, draws=D),
    Variant(name="two-adapters", clause="MISSBAT-C8", configs=(PLAIN, {"r": 2}), layers=BLOCKS, draws=D),
)

Block = Callable[[Array, Array, int, int, Array], Array]  # the block of W, its D, its row and column, all of D


def blockwise(W: Array, D: Array, what: Block) -> Array:
    """Every (r, r) block of W by `what`."""
    r = D.shape[-1]
    rows = []
    for a in range(W.shape[0] // r):
        row = W[a * r : a * r + r]
        cut = [row[:, c * r : c * r + r] for c in range(W.shape[1] // r)]
        rows.append(np.concatenate([what(w, D[a], a, c, D) for c, w in enumerate(cut)], axis=1))
    return np.concatenate(rows, axis=0)


def wrong(what: Block) -> Formula:
    def step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return blockwise(W, a.params.D, what), b

    return Formula(weight=one_by_one(step))


def back(what: Block) -> Callable[[Case], Answer]:
    """A wrong way back, block by block."""

    def unmerge(case: Case) -> Answer:
        p = pose(case)
        W = p.merged_W
        for a in reversed(p.adapters):
            W = blockwise(W, a.params.D, what)
        return stored(p.layer, W, p.merged_b)

    return unmerge


def _inverse(D: Array) -> Array:
    return right_divide(np.eye(len(D)), np.eye(len(D)) + D)


def _summed(p: Problem) -> tuple[Array, Array | None]:
    W = p.W
    for a in p.adapters:
        W = W + blockwise(p.W, a.params.D, lambda w, D, a, c, all_of: w @ D + D)
    return W, p.b


def _summed_adapters(case: Case) -> Answer | None:
    return Formula(weight=_summed)(case) if len(case.adapters) > 1 else None


def _added_part_without_gradient(case: Case) -> Answer | None:
    """dD = sum W^T G, without the G of the D that is added."""
    p = pose(case)
    if len(p.adapters) != 1:
        return None
    r, G = p.adapters[0].params.D.shape[-1], p.layer.weight_vjp(p.x, p.dy)
    own = answer(case)["0.miss_block"]
    added = np.stack([sum(G[a * r : a * r + r, c : c + r] for c in range(0, G.shape[1], r)) for a in range(G.shape[0] // r)])
    return {**answer(case), "0.miss_block": own - added}


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    return {"miss_block": constant(0.0, "init-not-identity")}


FRESH = Fresh(clause="MISSBAT-C15", starts={"default": Start(PLAIN, BLOCKS)}, laws=laws)
FILES = Files(
    configs_clause="MISSBAT-C16",
    keys_clause="MISSBAT-C17",
    configs={"plain": {"r": 4, "init_weights": "bat"}},
    told={"r": "r"},
    saved_on={
        "model.layers.0.self_attn.v_proj": Linear(in_features=8, out_features=12),
        "model.layers.1.mlp.down_proj": Linear(in_features=12, out_features=8),
    },
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="block-from-the-left",
            clause="MISSBAT-C1",
            sentence="the blocks are multiplied from the left: (I + D) W + D",
            replay=wrong(lambda w, D, a, c, all_of: w + D @ w + D),
        ),
        Mistake(
            name="block-not-added",
            clause="MISSBAT-C1",
            sentence="the blocks only multiply, W (I + D): D itself is not added",
            replay=wrong(lambda w, D, a, c, all_of: w + w @ D),
        ),
        Mistake(
            name="block-only-added",
            clause="MISSBAT-C1",
            sentence="the blocks are only added, W + D, as in plain MiSS",
            replay=wrong(lambda w, D, a, c, all_of: w + D),
        ),
        Mistake(
            name="identity-forgotten",
            clause="MISSBAT-C1",
            sentence="the frozen weight is lost: W D + D instead of W (I + D) + D",
            replay=wrong(lambda w, D, a, c, all_of: w @ D + D),
        ),
        Mistake(
            name="block-of-the-column",
            clause="MISSBAT-C2",
            sentence="a block of the weight gets the D of its column of blocks instead of its row's",
            replay=wrong(lambda w, D, a, c, all_of: w + w @ all_of[c % len(all_of)] + all_of[c % len(all_of)]),
        ),
        Mistake(
            name="block-backwards",
            clause="MISSBAT-C2",
            sentence="the rows of blocks get the Ds in reverse",
            replay=wrong(lambda w, D, a, c, all_of: w + w @ all_of[-1 - a] + all_of[-1 - a]),
        ),
        Mistake(
            name="block-transposed",
            clause="MISSBAT-C5",
            sentence="every block of miss_block is transposed",
            replay=as_if_tensors(lambda key, v, config: v.transpose(0, 2, 1)),
        ),
        Mistake(
            name="adapters-summed",
            clause="MISSBAT-C8",
            sentence="a second adapter acts on the frozen weight instead of what the first one made of it, and the two are summed",
            replay=_summed_adapters,
        ),
        shared.only_first_adapter("MISSBAT-C8"),
        Mistake(
            name="grad-of-added-missing",
            clause="MISSBAT-C13",
            sentence="the gradient of D lacks what flows through the D that is added",
            replay=only(backward=_added_part_without_gradient),
        ),
        shared.input_gradient_missing("MISSBAT-C14"),
        *shared.merging("MISSBAT-C10", "MISSBAT-C11"),
        Mistake(
            name="unmerge-subtracts",
            clause="MISSBAT-C11",
            sentence="unmerge subtracts W' D + D, made from the merged weight, instead of inverting",
            replay=only(unmerge=back(lambda w, D, a, c, all_of: w - (w @ D + D))),
        ),
        Mistake(
            name="unmerge-not-inverted",
            clause="MISSBAT-C11",
            sentence="unmerge only subtracts D, and does not multiply by the inverse of I + D",
            replay=only(unmerge=back(lambda w, D, a, c, all_of: w - D)),
        ),
        Mistake(
            name="unmerge-subtracts-last",
            clause="MISSBAT-C11",
            sentence="unmerge multiplies by the inverse first and subtracts D then",
            replay=only(unmerge=back(lambda w, D, a, c, all_of: w @ _inverse(D) - D)),
        ),
        Mistake(
            name="unmerge-from-the-left",
            clause="MISSBAT-C11",
            sentence="unmerge multiplies by the inverse of I + D from the left",
            replay=only(unmerge=back(lambda w, D, a, c, all_of: _inverse(D) @ (w - D))),
        ),
    ),
)
