"""OFT: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check import distributions
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.mistake import (
    Formula,
    Mistake,
    Replay,
    Suite,
    as_if,
    as_if_tensors,
    autograd,
    base_alone_backward,
    merged_twice,
    one_by_one,
    only,
    stored,
    unmerge_that_merges,
    unmerge_the_frozen,
    with_config,
)
from peft_ref.check.oracle import Problem, answer, pose
from peft_ref.check.shared_mistakes import only_first_adapter
from peft_ref.check.tape import constant
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer
from peft_ref.methods.cayley import cayley, coefficients, neumann, skew
from peft_ref.stack import Adapter

SERIES = {"r": 2, "oft_block_size": 0}
SOLVED = {**SERIES, "use_cayley_neumann": False}
SHARED = {"oft_block_size": 4, "block_share": True}
HELD = {"oft_block_size": 4, "block_share": True, "coft": True, "eps": 0.5}
KINDS = ("linear-blocks", "embedding-blocks", "conv2d-pointwise")


def units(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    """Blocks of four whose Q is the product by a quaternion: Q^2 = -3, so that (I - Q) (I + Q)^-1 has entries of one half."""
    rows = []
    for _ in range(shape[0]):
        a, b, c = rng.choice([-1.0, 1.0], 3)
        rows.append([a, b, c, -c, b, -a])
    return np.asarray(rows)


def small_angles(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    return rng.choice([-0.25, -0.125, 0.125, 0.25], shape)


UNITS, SMALL = {"R": units}, {"R": small_angles}

VARIANTS = (
    Variant(name="series", clause="OFT-C6", configs=(SERIES,), layers=KINDS, draws=SMALL),
    Variant(name="solved", clause="OFT-C5", configs=(SOLVED,), layers=KINDS, draws=UNITS),
    Variant(name="shared", clause="OFT-C9", configs=(SHARED,), layers=KINDS, draws=SMALL),
    *(
        Variant(name=f"terms-{n}", clause="OFT-C7", configs=({**SERIES, "num_cayley_neumann_terms": n},), layers=KINDS[:1], draws=SMALL)
        for n in (2, 3, 4, 6)
    ),
    Variant(name="any-angle", clause="OFT-C5", configs=(SOLVED,), layers=KINDS[:1], draws=SMALL),
    Variant(name="divisor", clause="OFT-C3", configs=({"oft_block_size": 3},), layers=KINDS[:1], draws=SMALL),
    Variant(name="held", clause="OFT-C10", configs=(HELD,), layers=KINDS, draws=SMALL),
    Variant(name="held-twice", clause="OFT-C10", configs=({**SERIES, "coft": True, "eps": 0.5},), layers=KINDS[:1], draws=SMALL),
    Variant(name="rounded", clause="OFT-C6", configs=(SERIES,), layers=KINDS[:1], numbers="rounded", draws=SMALL),
    Variant(name="vector", clause="OFT-C1", configs=(SERIES,), layers=KINDS[:1], operations=RUN, rows=(), draws=SMALL),
    Variant(name="no-bias", clause="OFT-C1", configs=(SERIES,), layers=KINDS[:1], bias=False, draws=SMALL),
    Variant(
        name="two-adapters",
        clause="OFT-C13",
        configs=(SERIES, {"r": 4, "oft_block_size": 0}),
        layers=KINDS[:2],
        draws=SMALL,
    ),
)

Rotate = Callable[[Adapter, Array], Array]


def rotation(a: Adapter, Q: Array) -> Array:
    m = a.method
    return neumann(Q, m.num_cayley_neumann_terms) if m.use_cayley_neumann else cayley(Q)  # type: ignore[attr-defined]  # OFT's


def acting(a: Adapter, layer: Layer) -> Array:
    """The numbers that act, the projection held constant."""
    R = a.params.R
    return R + constant(a.method.acting(a.params).R - R) if a.method.coft else R  # type: ignore[attr-defined]


def turning(
    rotate: Rotate = rotation, matrix: Callable[[Array, int], Array] = skew, mix: Callable[[int, int], list[int]] | None = None
) -> Formula:
    """W' by other rotations, by another matrix from the numbers, or with the inputs dealt to the blocks in another order."""

    def factor(layer: Layer, a: Adapter) -> Array:
        R = rotate(a, matrix(acting(a, layer), a.method.blocks(layer)[1]))  # type: ignore[attr-defined]
        return R if layer.kind == "embedding" else R.swapaxes(1, 2)

    def turned(layer: Layer, a: Adapter, W: Array, F: Array) -> Array:
        if mix is None:
            return a.method._turned(layer, W, F)  # type: ignore[attr-defined]
        n, b = a.method.blocks(layer)  # type: ignore[attr-defined]
        at: NDArray = np.asarray(mix(int(n), int(b)), dtype=np.int64)
        back = np.argsort(at)
        if layer.kind == "embedding":
            return a.method._turned(layer, W[at, :], F)[back, :]  # type: ignore[attr-defined]
        return a.method._turned(layer, W[:, at], F)[:, back]  # type: ignore[attr-defined]

    def unmerge(p: Problem) -> tuple[Array, Array | None]:
        W = p.merged_W
        for a in reversed(p.adapters):
            W = turned(p.layer, a, W, np.linalg.inv(factor(p.layer, a)))
        return W, p.merged_b

    return Formula(
        weight=one_by_one(lambda layer, a, W, b, W0: (turned(layer, a, W, factor(layer, a)), b)),
        unmerge=unmerge,
    )


def _series(coefficient: Callable[[int], list[float]]) -> Rotate:
    def rotate(a: Adapter, Q: Array) -> Array:
        if not a.method.use_cayley_neumann:  # type: ignore[attr-defined]
            return cayley(Q)
        R, power = np.eye(Q.shape[1]) + 0.0 * Q, None
        for c in coefficient(a.method.num_cayley_neumann_terms):  # type: ignore[attr-defined]
            power = Q if power is None else power @ Q
            R = R + c * power
        return R

    return rotate


def _cut(terms: int) -> list[float]:
    return [2.0, 1.0] if terms == 3 else coefficients(terms)


def where(asked: Callable[[dict[str, object]], bool], replay: Replay) -> Replay:
    return lambda case: replay(case) if any(asked(dict(a.config)) for a in case.adapters) else None


def series(config: dict[str, object]) -> bool:
    return bool(config["use_cayley_neumann"])


def held(config: dict[str, object]) -> bool:
    return bool(config["coft"])


def _by_columns(elements: int) -> list[int]:
    """Which number stands where if the triangle is filled column by column."""
    b = (1 + math.isqrt(1 + 8 * elements)) // 2
    reading = [(i, j) for i in range(b) for j in range(i + 1, b)]
    columns = sorted(reading, key=lambda at: (at[1], at[0]))
    return [columns.index(at) for at in reading]


def _config(**changes: object) -> Replay:
    return as_if(lambda case: with_config(case, lambda config: {**config, **changes}))


def _eps(factor: Callable[[int], float]) -> Replay:
    def change(case: Case) -> Case | None:
        rows = next(iter(case.adapters[0].tensors.values())).shape[0]
        return with_config(case, lambda config: {**config, "eps": config["eps"] * factor(rows)} if config["coft"] else config)

    return as_if(change)


def _through(p: Problem) -> Array:
    """The right forward with a projection that takes part in the gradient."""
    W = p.W
    for a in p.adapters:
        W = a.method.weight(p.layer, a.params, W, None, p.W)[0]
    return p.layer.apply(p.x, W, p.b)


def _reversed(case: Case) -> Answer | None:
    if len(case.adapters) < 2 or case.layer is None or case.layer.kind == "embedding":
        return None
    out, last = answer(replace(case, adapters=case.adapters[::-1])), len(case.adapters) - 1
    return {f"{last - int(k.split('.')[0])}.{k.partition('.')[2]}" if k[0].isdigit() else k: v for k, v in out.items()}


def _transposed(case: Case) -> Answer:
    p = pose(case)
    W = p.merged_W
    for a in reversed(p.adapters):
        m: Any = a.method
        F = m._factor(p.layer, m.acting(a.params))
        W = m._turned(p.layer, W, F.swapaxes(1, 2))
    return stored(p.layer, W, p.merged_b)


def _negative(key: str, v: NDArray, config: object) -> NDArray:
    return -v


def laws(config: Config, layer: Layer) -> dict[str, distributions.Law]:
    key = "oft_embedding_R.weight" if layer.kind == "embedding" else "oft_R.weight"
    return {key: distributions.constant(0.0, "init-not-identity") if config["init_weights"] else distributions.normal(0.1)}


FRESH = Fresh(
    clause="OFT-C22",
    starts={
        "default": Start({"oft_block_size": 4}, ("linear-blocks", "embedding-blocks", "conv2d-pointwise")),
        "false": Start({"oft_block_size": 4, "init_weights": False}, ("linear-blocks",)),
    },
    laws=laws,
)
FILES = Files(
    configs_clause="OFT-C23",
    keys_clause="OFT-C25",
    configs={
        "plain": {"oft_block_size": 4},
        "block-size-missing": {"num_cayley_neumann_terms": 3},
        "by-number": {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False, "block_share": True},
        "held": {"oft_block_size": 8, "coft": True},
    },
    told={word: word for word in ("r", "oft_block_size", "coft", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms")},
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="turned-backwards",
            clause="OFT-C1",
            sentence="every block is transposed: it turns the other way",
            replay=as_if_tensors(_negative),
        ),
        Mistake(
            name="inputs-dealt-in-turn",
            clause="OFT-C2",
            sentence="a block takes every n-th input instead of the next b",
            replay=turning(mix=lambda n, b: [j * n + i for i in range(n) for j in range(b)]),
        ),
        Mistake(
            name="triangle-by-columns",
            clause="OFT-C4",
            sentence="the upper triangle is filled column by column instead of row by row",
            replay=as_if_tensors(
                lambda key, v, config: v[:, _by_columns(v.shape[1])],
                lambda key, g, config: g[:, np.argsort(_by_columns(g.shape[1]))],
            ),
        ),
        Mistake(
            name="triangle-alone",
            clause="OFT-C4",
            sentence="Q is the upper triangle alone, without minus its transposed",
            replay=turning(matrix=lambda v, b: skew(v, b) * np.triu(np.ones((b, b)), 1)),
        ),
        Mistake(
            name="forms-turn-alike",
            clause="OFT-C5",
            sentence="without use_cayley_neumann it turns the way that the series does, (I + Q) (I - Q)^-1",
            replay=where(lambda c: not series(c), as_if_tensors(_negative)),
        ),
        Mistake(
            name="neumann-ignored",
            clause="OFT-C6",
            sentence="use_cayley_neumann is not read: (I - Q) (I + Q)^-1 is solved for",
            replay=_config(use_cayley_neumann=False),
        ),
        Mistake(
            name="neumann-solved",
            clause="OFT-C6",
            sentence="the series is not cut off: (I + Q) (I - Q)^-1 is solved for",
            replay=where(series, turning(lambda a, Q: cayley(-Q) if a.method.use_cayley_neumann else cayley(Q))),  # type: ignore[attr-defined]
        ),
        Mistake(
            name="neumann-last-doubled",
            clause="OFT-C6",
            sentence="the last power of the series has the factor 2 instead of 1",
            replay=where(series, turning(_series(lambda t: [2.0] * len(coefficients(t))))),
        ),
        Mistake(
            name="neumann-not-doubled",
            clause="OFT-C6",
            sentence="the powers of the series have the factor 1: that is (I - Q)^-1",
            replay=where(series, turning(_series(lambda t: [1.0] * len(coefficients(t))))),
        ),
        Mistake(
            name="three-terms-cut",
            clause="OFT-C7",
            sentence="three terms end with Q^2, where HF adds Q^3 as for four",
            replay=where(lambda c: series(c) and c["num_cayley_neumann_terms"] == 3, turning(_series(_cut))),
        ),
        Mistake(
            name="terms-ignored",
            clause="OFT-C7",
            sentence="num_cayley_neumann_terms is not read: there are always five",
            replay=_config(num_cayley_neumann_terms=5),
        ),
        Mistake(
            name="coft-ignored",
            clause="OFT-C10",
            sentence="coft is not read",
            replay=_config(coft=False),
        ),
        Mistake(
            name="eps-not-shared",
            clause="OFT-C10",
            sentence="every block may be as large as eps, which is not divided by the square root of their number",
            replay=_eps(math.sqrt),
        ),
        Mistake(
            name="norm-of-the-numbers",
            clause="OFT-C10",
            sentence="the norm is that of the stored numbers, not that of Q, in which each of them stands twice",
            replay=_eps(lambda rows: math.sqrt(2)),
        ),
        only_first_adapter("OFT-C13"),
        Mistake(
            name="adapters-reversed",
            clause="OFT-C13",
            sentence="in the forward pass the first adapter turns the inputs first, as in HF PEFT, whose merged weight is another",
            replay=only(forward=_reversed, backward=_reversed),
            dialect=True,
        ),
        Mistake(
            name="double-merge",
            clause="OFT-C15",
            sentence="the adapter is merged twice",
            replay=only(merge=merged_twice),
        ),
        Mistake(
            name="unmerge-transposed",
            clause="OFT-C16",
            sentence="unmerge takes the transposed for the inverse, which a series that is cut off does not have",
            replay=where(series, only(unmerge=_transposed)),
        ),
        Mistake(
            name="unmerge-merges",
            clause="OFT-C16",
            sentence="unmerge turns again instead of back",
            replay=only(unmerge=unmerge_that_merges),
        ),
        Mistake(
            name="unmerge-from-frozen",
            clause="OFT-C16",
            sentence="unmerge starts from the frozen weight instead of the merged one it is given",
            replay=only(unmerge=unmerge_the_frozen),
        ),
        Mistake(
            name="grad-through-projection",
            clause="OFT-C20",
            sentence="the projection of coft takes part in the gradient",
            replay=where(held, only(backward=lambda case: autograd(case, _through))),
        ),
        Mistake(
            name="input-grad-missing",
            clause="OFT-C21",
            sentence="the input's gradient is that of the frozen layer alone",
            replay=only(backward=base_alone_backward),
        ),
    ),
)
