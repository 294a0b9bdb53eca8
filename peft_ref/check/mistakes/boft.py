"""BOFT: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from peft_ref import stack
from peft_ref.arrays import Array, column
from peft_ref.check import distributions
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.mistake import (
    Formula,
    Mistake,
    Replay,
    Suite,
    as_if_tensors,
    gradients_times,
    merged_twice,
    one_by_one,
    only,
    stored,
    unmerge_that_merges,
    unmerge_the_frozen,
)
from peft_ref.check.oracle import Problem, pose
from peft_ref.check.shared_mistakes import input_gradient_missing, only_first_adapter
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer, Linear
from peft_ref.methods.boft import blocks, rotations
from peft_ref.methods.cayley import cayley, inverse
from peft_ref.stack import Adapter

ONE = {"boft_block_size": 4}
TWO = {"boft_block_size": 4, "boft_n_butterfly_factor": 2}
THREE = {"boft_block_size": 2, "boft_n_butterfly_factor": 3}
SMALL_BLOCKS = {"boft_block_size": 2}
NUMBER = {"boft_block_size": 0, "boft_block_num": 2}
KINDS = ("linear-blocks", "conv2d-square")


def units(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    """R whose Q is the product by a quaternion, Q^2 = -3 (blocks of two: a quarter turn), beside a symmetric part: C is short."""
    size, found = shape[-1], []
    for _ in range(shape[0] * shape[1]):
        a, b, c = rng.choice([-1.0, 1.0], 3)
        Q = np.asarray([[0, a, b, c], [-a, 0, -c, b], [-b, c, 0, -a], [-c, -b, a, 0]])[:size, :size]
        S = rng.choice([-2.0, -0.5, 0.5, 2.0], (size, size))
        S = np.triu(S) + np.triu(S).T  # added to ones this never leaves a zero
        found.append(Q + S)
    return np.reshape(np.asarray(found), shape)


def small_angles(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    return rng.choice([-0.25, -0.125, 0.125, 0.375], shape)


def scales(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    """Powers of two, which unmerging divides by."""
    return rng.choice([-2.0, -0.5, 0.5, 2.0, 4.0], shape)


UNITS: Mapping[str, Any] = {"R": units, "s": scales}
SMALL: Mapping[str, Any] = {"R": small_angles, "s": scales}

VARIANTS = (
    Variant(name="one", clause="BOFT-C1", configs=(ONE,), layers=KINDS, draws=UNITS),
    Variant(name="two", clause="BOFT-C6", configs=(TWO,), draws=UNITS, layers=KINDS[:1]),
    Variant(name="three", clause="BOFT-C6", configs=(THREE,), layers=KINDS[:1], draws=UNITS),
    Variant(name="two-small", clause="BOFT-C6", configs=({**THREE, "boft_n_butterfly_factor": 2},), layers=KINDS, draws=SMALL),
    Variant(name="three-any-angle", clause="BOFT-C6", configs=(THREE,), layers=KINDS[:1], draws=SMALL),
    Variant(name="any-angle", clause="BOFT-C4", configs=(ONE,), layers=KINDS, draws=SMALL),
    Variant(name="number", clause="BOFT-C3", configs=(NUMBER,), layers=KINDS[:1], draws=SMALL),
    Variant(name="rounded", clause="BOFT-C4", configs=(SMALL_BLOCKS,), layers=KINDS[:1], numbers="rounded", draws=SMALL),
    Variant(name="vector", clause="BOFT-C1", configs=(TWO,), layers=KINDS[:1], operations=RUN, rows=(), draws=SMALL),
    Variant(name="no-bias", clause="BOFT-C1", configs=(ONE,), layers=KINDS[:1], bias=False, draws=SMALL),
    Variant(name="two-adapters", clause="BOFT-C11", configs=(ONE, THREE), layers=KINDS[:1], draws=SMALL),
)

Deal: TypeAlias = Callable[[int, int, int], list[int]]  # inputs, size of a block, factor: which input comes at each place
Factors: TypeAlias = list[tuple[int, Array]]


def by_blocks(W: Array, C: Array) -> Array:
    """Every block of the columns of W times its C^T."""
    V = blocks(W, C.shape[0]) @ C.swapaxes(1, 2)
    return V.transpose(1, 0, 2).reshape(W.shape)


def turning(
    deal: Deal | None = None,
    factors: Callable[[Factors], Factors] = lambda Cs: Cs,
    blocks_of: Callable[[Array], list[Array]] = rotations,
    bias: Callable[[Array, Array], Array] = lambda b, s: b,
) -> Formula:
    """W' with the inputs dealt otherwise, factors in another order, other blocks from R, or another bias."""
    order = deal or right_deal

    def turned(W: Array, C: Array, i: int, back: bool) -> Array:
        at = np.asarray(order(W.shape[1], C.shape[1], i))
        return by_blocks(W[:, np.argsort(at)], C.swapaxes(1, 2) if back else C)[:, at]

    def step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        for i, C in factors(list(enumerate(blocks_of(a.params.R)))):
            W = turned(W, C, i, False)
        return column(a.params.s) * W, None if b is None else bias(b, a.params.s)

    def unmerge(p: Problem) -> tuple[Array, Array | None]:
        W, b = p.merged_W, p.merged_b
        for a in reversed(p.adapters):
            W = W / column(a.params.s)
            b = None if b is None else b / bias(np.ones(b.shape), a.params.s)
            for i, C in reversed(factors(list(enumerate(blocks_of(a.params.R))))):
                W = turned(W, C, i, True)
        return W, b

    return Formula(weight=one_by_one(step), unmerge=unmerge)


def right_deal(n: int, b: int, i: int) -> list[int]:
    """Which input comes at each place."""
    return pieces(n, b * 2**i, max(b // 2, 1)) if i else list(range(n))


def pieces(n: int, stretch: int, piece: int) -> list[int]:
    """In every stretch the pieces at even places, then the others."""
    out: list[int] = []
    for start in range(0, n, stretch):
        starts = list(range(start, start + stretch, piece))
        out += [at + k for at in starts[::2] + starts[1::2] for k in range(piece)]
    return out


def _beyond_the_first(change: Deal) -> Deal:
    return lambda n, b, i: change(n, b, i) if i else list(range(n))


def where_dealt(replay: Replay) -> Replay:
    """A mistake of more than one factor."""
    return lambda case: replay(case) if any(a.config["boft_n_butterfly_factor"] > 1 for a in case.adapters) else None


def _unskewed(R: Array) -> list[Array]:
    out = []
    for i in range(R.shape[0]):
        one = np.eye(R.shape[2])
        out.append((one - R[i]) @ inverse(R[i] + one))
    return out


def _upper(R: Array) -> list[Array]:
    """Q from the upper triangle alone, T - T^T."""
    keep = np.triu(np.ones(R.shape[2:]), 1)
    return [cayley(R[i] * keep - (R[i] * keep).swapaxes(1, 2)) for i in range(R.shape[0])]


def _unit_s(key: str, v: NDArray, config: Mapping[str, Any]) -> NDArray:
    return np.ones(v.shape) if key == "boft_s" else v


def _no_s(key: str, g: NDArray, config: Mapping[str, Any]) -> NDArray:
    return np.zeros(g.shape) if key == "boft_s" else g


def _transposed(key: str, v: NDArray, config: Mapping[str, Any]) -> NDArray:
    return v.swapaxes(2, 3) if key == "boft_R" else v


def _doubled(key: str, v: NDArray, config: Mapping[str, Any]) -> NDArray:
    return 2 * v if key == "boft_R" else v


def _adapters_reversed(case: Case) -> Answer | None:
    if len(case.adapters) < 2:
        return None
    return Formula(
        weight=lambda p: stack.merge(p.layer, p.W, p.b, p.adapters[::-1]),
        unmerge=lambda p: stack.unmerge(p.layer, p.merged_W, p.merged_b, p.adapters[::-1], p.W),
    )(case)


def _scaled_again(case: Case) -> Answer:
    """Turned back, and multiplied by s instead of divided."""
    p = pose(case)
    W = p.merged_W
    for a in reversed(p.adapters):
        W = a.method.unmerge(p.layer, a.params._replace(s=1 / a.params.s), W, None, p.W)[0]
    return stored(p.layer, W, p.merged_b)


def _where_small(replay: Replay) -> Replay:
    """I + R is sure to have an inverse."""
    return lambda case: replay(case) if all(np.all(np.abs(a.tensors["boft_R"]) < 0.5) for a in case.adapters) else None


def laws(config: Config, layer: Layer) -> dict[str, distributions.Law]:
    if config["init_weights"]:
        return {key: distributions.constant(v, "init-not-identity") for key, v in (("boft_R", 0.0), ("boft_s", 1.0))}
    return {"boft_R": distributions.normal(0.1), "boft_s": distributions.normal(0.1, 1.0)}


FRESH = Fresh(
    clause="BOFT-C20",
    starts={
        "default": Start(ONE, KINDS),
        "false": Start({**ONE, "init_weights": False}, KINDS[:1]),
    },
    laws=laws,
)
FILES = Files(
    configs_clause="BOFT-C22",
    keys_clause="BOFT-C23",
    configs={
        "plain": {"boft_block_size": 4},
        "size-missing": {},
        "by-number": {"boft_block_size": 0, "boft_block_num": 4},
        "one-factor": {"boft_block_size": 8, "boft_n_butterfly_factor": 1},
    },
    told={word: word for word in ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor")},
    saved_on={
        "model.layers.0.self_attn.v_proj": Linear(in_features=8, out_features=5),
        "model.layers.1.mlp.down_proj": Linear(in_features=4, out_features=7),
    },
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="turned-backwards",
            clause="BOFT-C4",
            sentence="every block is transposed, (I + Q) (I - Q)^-1: it turns the other way",
            replay=as_if_tensors(_transposed),
        ),
        Mistake(
            name="skew-not-halved",
            clause="BOFT-C5",
            sentence="Q is R - R^T, without the half",
            replay=as_if_tensors(_doubled),
        ),
        Mistake(
            name="upper-triangle",
            clause="BOFT-C5",
            sentence="Q is made of R's upper triangle alone, as OFT's is",
            replay=turning(blocks_of=_upper),
        ),
        Mistake(
            name="not-made-skew",
            clause="BOFT-C5",
            sentence="R itself is taken for Q, as if it were skew",
            replay=_where_small(turning(blocks_of=_unskewed)),
        ),
        Mistake(
            name="butterfly-ignored",
            clause="BOFT-C6",
            sentence="only the first factor acts, as if boft_n_butterfly_factor were 1",
            replay=where_dealt(turning(factors=lambda Cs: Cs[:1])),
        ),
        Mistake(
            name="factors-reversed",
            clause="BOFT-C6",
            sentence="the factors are multiplied last to first",
            replay=where_dealt(turning(factors=lambda Cs: Cs[::-1])),
        ),
        Mistake(
            name="not-dealt",
            clause="BOFT-C7",
            sentence="every factor turns neighbouring inputs, none is dealt",
            replay=where_dealt(turning(lambda n, b, i: list(range(n)))),
        ),
        Mistake(
            name="dealt-backwards",
            clause="BOFT-C7",
            sentence="the pieces are shuffled together where they should be dealt apart: P is transposed",
            replay=where_dealt(turning(lambda n, b, i: np.argsort(right_deal(n, b, i)).tolist())),
        ),
        Mistake(
            name="dealt-one-by-one",
            clause="BOFT-C7",
            sentence="single inputs are dealt instead of pieces of half a block",
            replay=where_dealt(turning(_beyond_the_first(lambda n, b, i: pieces(n, b * 2**i, 1)))),
        ),
        Mistake(
            name="dealt-over-all",
            clause="BOFT-C7",
            sentence="the pieces are dealt over all inputs instead of within stretches that double from factor to factor",
            replay=where_dealt(turning(_beyond_the_first(lambda n, b, i: pieces(n, n, b // 2)))),
        ),
        Mistake(
            name="scale-ignored",
            clause="BOFT-C2",
            sentence="boft_s is not read",
            replay=as_if_tensors(_unit_s, _no_s),
        ),
        Mistake(
            name="bias-scaled",
            clause="BOFT-C2",
            sentence="the bias is scaled by boft_s too",
            replay=turning(bias=lambda b, s: b * s),
        ),
        only_first_adapter("BOFT-C11"),
        Mistake(
            name="adapters-reversed",
            clause="BOFT-C11",
            sentence="several adapters are multiplied last to first",
            replay=_adapters_reversed,
        ),
        Mistake(name="double-merge", clause="BOFT-C13", sentence="the adapter is merged twice", replay=only(merge=merged_twice)),
        Mistake(
            name="unmerge-merges",
            clause="BOFT-C14",
            sentence="unmerge turns and scales again instead of back",
            replay=only(unmerge=unmerge_that_merges),
        ),
        Mistake(
            name="unmerge-scales-again",
            clause="BOFT-C14",
            sentence="unmerge turns back and multiplies by boft_s instead of dividing",
            replay=only(unmerge=_scaled_again),
        ),
        Mistake(
            name="unmerge-from-frozen",
            clause="BOFT-C14",
            sentence="unmerge starts from the frozen weight instead of the merged one it is given",
            replay=only(unmerge=unmerge_the_frozen),
        ),
        Mistake(
            name="grad-skew-not-halved",
            clause="BOFT-C17",
            sentence="the gradient of R is dQ - dQ^T, without the half",
            replay=gradients_times(lambda config: 2.0, "boft_R"),
        ),
        input_gradient_missing("BOFT-C19"),
    ),
)
