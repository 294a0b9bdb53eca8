"""C3A: what is asked, and what ports get wrong.

HF PEFT has two dialects. Its gradient of x goes through H[t, s] = K[(s + t) mod b], which it did not compute with, and of several
adapters each reads what the one before it added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.distributions import Law, constant, normal, uniform
from peft_ref.check.mistake import (
    Formula,
    Mistake,
    Suite,
    as_if_tensors,
    merged_twice,
    one_by_one,
    only,
    stored,
    unmerge_that_merges,
    unmerge_the_frozen,
)
from peft_ref.check.oracle import Problem, answer, mixed, name_gradients, null_answer, pose
from peft_ref.check.shared_mistakes import only_first_adapter
from peft_ref.check.variants import RUN, Variant
from peft_ref.contracts import Delta
from peft_ref.layers import Layer, Linear
from peft_ref.methods.c3a import C3A
from peft_ref.stack import Adapter

At = Callable[[NDArray, NDArray, int], NDArray]  # the place in a row of K, given row t, column s and b

VARIANTS = (
    Variant(name="plain", clause="C3A-C1", configs=({"block_size": 3},), layers=("linear-thirds",)),
    Variant(name="square", clause="C3A-C1", configs=({"block_size": 4},), layers=("linear-square",)),
    Variant(name="small", clause="C3A-C1", configs=({"block_size": 4},), layers=("linear-square",), numbers="small"),
    Variant(name="rounded", clause="C3A-C2", configs=({"block_size": 3},), layers=("linear-thirds",), numbers="rounded"),
    Variant(name="vector", clause="C3A-C4", configs=({"block_size": 3},), layers=("linear-thirds",), operations=RUN, rows=()),
    Variant(name="no-bias", clause="C3A-C3", configs=({"block_size": 3},), layers=("linear-thirds",), bias=False),
    Variant(name="two-adapters", clause="C3A-C8", configs=({"block_size": 3}, {"block_size": 1}), layers=("linear-thirds",)),
    Variant(name="two-on-square", clause="C3A-C8", configs=({"block_size": 4}, {"block_size": 2}), layers=("linear-square",)),
)


def dense(
    layer: Layer, K: Array, at: Callable[[NDArray, NDArray, int], NDArray], keep: Callable[[NDArray, NDArray], Any] | None = None
) -> Array:
    """The blocks' entries K[a, c, at(t, s, b)] at (a b + t, c b + s), not divided; zero where `keep` says no."""
    m, n, b = K.shape
    t, s = np.divmod(np.arange(b * b), b)
    blocks = K[:, :, at(t, s, b) % b]
    if keep is not None:
        blocks = blocks * np.where(keep(t, s), 1.0, 0.0)
    return blocks.reshape(m, n, b, b).transpose(0, 2, 1, 3).reshape(layer.shape)


def right(layer: Layer, K: Array) -> Array:
    return dense(layer, K, lambda t, s, b: s - t) / layer.shape[1]


def hankel(layer: Layer, K: Array) -> Array:
    return dense(layer, K, lambda t, s, b: s + t) / layer.shape[1]


def interleaved(layer: Layer, K: Array) -> Array:
    """Block (a, c) on every m-th row and every n-th column, as if the sizes were (b, out/b) and (b, in/b)."""
    m, n, b = K.shape
    return right(layer, K).reshape(m, b, n, b).transpose(1, 0, 3, 2).reshape(layer.shape)


def other_delta(delta: Callable[[Layer, Array], Array]) -> Callable[[Case], Answer | None]:
    """A wrong matrix of blocks."""

    def step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return W + delta(layer, a.params.K), b

    def unmerge(p: Problem) -> tuple[Array, Array | None]:
        assert p.merged_W is not None
        return p.merged_W - sum(delta(p.layer, a.params.K) for a in p.adapters), p.merged_b

    formula = Formula(weight=one_by_one(step), unmerge=unmerge)

    def replay(case: Case) -> Answer | None:
        if case.operation != "delta":
            return formula(case)
        p = pose(case)
        return stored(p.layer, delta(p.layer, p.adapters[0].params.K), None)

    return replay


def blocks_in_the_other_order(key: str, v: NDArray, config: Mapping[str, Any]) -> NDArray:
    m, n, b = v.shape
    return v.reshape(n, m, b).transpose(1, 0, 2)


def and_back(key: str, g: NDArray, config: Mapping[str, Any]) -> NDArray:
    m, n, b = g.shape
    return g.transpose(1, 0, 2).reshape(m, n, b)


def undivided_gradient(case: Case) -> Answer:
    assert case.layer is not None
    return {name: g if name == "x" else g * case.layer.shape[1] for name, g in answer(case).items()}


def chains(p: Problem) -> bool:
    """Several adapters on a square layer: on any other PEFT crashes."""
    return len(p.adapters) > 1 and p.layer.shape[0] == p.layer.shape[1]


def _chained_weight(p: Problem) -> tuple[Array, Array | None]:
    W, path = p.W, None
    for a in p.adapters:
        D = right(p.layer, a.params.K)
        path = D if path is None else D @ path
        W = W + path
    return W, p.b


def chained(case: Case) -> Answer | None:
    return Formula(weight=_chained_weight)(case) if case.operation in RUN and chains(pose(case)) else None


def backward_as_peft(case: Case) -> Answer | None:
    """dx by PEFT's own rule and, where it chains adapters, every gradient with it."""
    p = pose(case)
    if len(p.adapters) > 1 and not chains(p):
        return None
    xs, rows = [p.x], p.dy
    for a in p.adapters[:-1]:
        xs.append(xs[-1] @ right(p.layer, a.params.K).T)
    through: Array = 0.0
    grads: list[Any] = []
    for a, x in zip(reversed(p.adapters), reversed(xs), strict=True):
        assert isinstance(a.method, C3A)
        g = rows + through
        grads.insert(0, a.method.delta_vjp(p.layer, a.params, Delta(p.layer.weight_vjp(x, g))))
        through = g @ hankel(p.layer, a.params.K)
    return {"x": p.dy @ p.W + through, **name_gradients(p.layer, p.adapters, tuple(grads))}


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    n_in, out = layer.channels, layer.shape[0]
    drawn: dict[Any, Law] = {
        True: constant(0.0, "init-not-identity"),
        "gaussian": normal(1.0),
        "kaiming_uniform": uniform(math.sqrt(1 / n_in)),
    }
    return {"c3a_kernel": drawn.get(config["init_weights"], uniform(math.sqrt(6 / (n_in + out))))}


WAYS: dict[str, Config] = {
    "default": {},
    **{str(way).lower(): {"init_weights": way} for way in (True, False, "gaussian", "kaiming_uniform")},
}
FRESH = Fresh(
    clause="C3A-C15",
    starts={label: Start({"block_size": 3, **way}, ("linear-thirds",)) for label, way in WAYS.items()},
    laws=laws,
)
FILES = Files(
    configs_clause="C3A-C17",
    keys_clause="C3A-C19",
    configs={
        "plain": {"block_size": 2},
        "block-missing": {},
        "block-pattern": {"block_size": 2, "block_size_pattern": {"v_proj": 1, "xq_proj": 4, r"layers\.10\.mlp\.up_proj": 8}},
    },
    told={"block_size": "block_size"},
    saved_on={
        "model.layers.0.self_attn.v_proj": Linear(in_features=6, out_features=4),
        "model.layers.1.mlp.down_proj": Linear(in_features=4, out_features=6),
    },
)


SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    transformed=mixed,
    mistakes=(
        Mistake(
            name="c3a-ignored",
            clause="C3A-C1",
            sentence="the adapter is not there at all: this is the frozen layer",
            replay=null_answer,
        ),
        Mistake(
            name="c3a-convolution",
            clause="C3A-C1",
            sentence="the blocks are transposed, read at t - s instead of s - t: a convolution instead of a correlation",
            replay=other_delta(lambda layer, K: dense(layer, K, lambda t, s, b: t - s) / layer.shape[1]),
        ),
        Mistake(
            name="c3a-hankel",
            clause="C3A-C1",
            sentence="row t of a block is the kernel turned to the left, read at s + t, instead of to the right",
            replay=other_delta(hankel),
        ),
        Mistake(
            name="c3a-not-wrapped",
            clause="C3A-C1",
            sentence="what is turned out of a row on the right does not come in on the left: entries below a block's diagonal are zero",
            replay=other_delta(lambda layer, K: dense(layer, K, lambda t, s, b: s - t, lambda t, s: s >= t) / layer.shape[1]),
        ),
        Mistake(
            name="c3a-not-divided",
            clause="C3A-C2",
            sentence="the sum is not divided by the layer's inputs",
            replay=other_delta(lambda layer, K: right(layer, K) * layer.shape[1]),
        ),
        Mistake(
            name="c3a-divided-by-block",
            clause="C3A-C2",
            sentence="the sum is divided by the block's size instead of the layer's inputs",
            replay=other_delta(lambda layer, K: right(layer, K) * (layer.shape[1] / K.shape[2])),
        ),
        Mistake(
            name="c3a-divided-by-outputs",
            clause="C3A-C2",
            sentence="the sum is divided by the layer's outputs instead of its inputs",
            replay=other_delta(lambda layer, K: right(layer, K) * (layer.shape[1] / layer.shape[0])),
        ),
        Mistake(
            name="c3a-blocks-transposed",
            clause="C3A-C5",
            sentence="the numbers of c3a_kernel are read as (in/b, out/b, b) instead of (out/b, in/b, b)",
            replay=as_if_tensors(blocks_in_the_other_order, and_back),
        ),
        Mistake(
            name="c3a-interleaved",
            clause="C3A-C5",
            sentence="the blocks are interleaved: one takes every (out/b)-th row and (in/b)-th column instead of neighbours",
            replay=other_delta(interleaved),
        ),
        only_first_adapter("C3A-C8"),
        Mistake(
            name="c3a-chained",
            clause="C3A-C8",
            sentence="of several adapters each reads what the one before it added instead of the layer's input, as in HF PEFT",
            replay=chained,
            dialect=True,
        ),
        Mistake(
            name="double-merge",
            clause="C3A-C10",
            sentence="the adapter is merged twice",
            replay=only(merge=merged_twice),
        ),
        Mistake(
            name="unmerge-adds",
            clause="C3A-C11",
            sentence="unmerge adds the blocks again instead of taking them out",
            replay=only(unmerge=unmerge_that_merges),
        ),
        Mistake(
            name="unmerge-from-frozen",
            clause="C3A-C11",
            sentence="unmerge starts from the frozen weight instead of the merged one it is given",
            replay=only(unmerge=unmerge_the_frozen),
        ),
        Mistake(
            name="c3a-gradient-not-divided",
            clause="C3A-C12",
            sentence="the gradient of c3a_kernel is not divided by the layer's inputs",
            replay=only(backward=undivided_gradient),
        ),
        Mistake(
            name="c3a-input-gradient",
            clause="C3A-C13",
            sentence="the gradient of x is taken through the blocks turned to the left, as in HF PEFT, instead of through their transpose",
            replay=only(backward=backward_as_peft),
            dialect=True,
        ),
    ),
)
