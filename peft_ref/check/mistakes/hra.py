"""HRA: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from peft_ref import stack
from peft_ref.arrays import Array, outer, row_norm
from peft_ref.check.asked import Config, Draw, Files, Fresh, Start
from peft_ref.check.case import Answer, Case
from peft_ref.check.distributions import Law, uniform
from peft_ref.check.dyadic_vectors import orthonormal_start, whole_norms
from peft_ref.check.mistake import (
    Formula,
    Mistake,
    Replay,
    Suite,
    as_if,
    autograd,
    base_alone_backward,
    merged_twice,
    one_by_one,
    only,
    reread,
    unmerge_that_merges,
    unmerge_the_frozen,
    with_config,
)
from peft_ref.check.oracle import Problem
from peft_ref.check.shared_mistakes import only_first_adapter
from peft_ref.check.tape import constant
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer
from peft_ref.methods.normals import columns, norm, orthonormal, unit
from peft_ref.stack import Adapter

PLAIN = {"r": 4}
ODD = {"r": 3}
TWO = {"r": 2}
ORTHOGONAL = {"r": 3, "apply_GS": True}
TWO_ORTHOGONAL = {"r": 2, "apply_GS": True}
KINDS = ("linear", "conv2d-square")
EXACT = {"u": whole_norms}
ORTHONORMAL = {"u": orthonormal_start}
WITHOUT_GRADIENT = ("forward", "merge", "unmerge")  # that of three projections has a bound which leaves too few digits in float32

VARIANTS = (
    Variant(name="plain", clause="HRA-C1", configs=(PLAIN,), layers=KINDS, draws=EXACT),
    Variant(name="odd", clause="HRA-C3", configs=(ODD,), layers=KINDS, draws=EXACT),
    Variant(name="orthogonal", clause="HRA-C5", configs=(TWO_ORTHOGONAL,), layers=KINDS, draws=ORTHONORMAL),
    Variant(name="orthogonal-three", clause="HRA-C5", configs=(ORTHOGONAL,), operations=WITHOUT_GRADIENT, draws=ORTHONORMAL),
    Variant(name="orthogonal-any", clause="HRA-C5", configs=(TWO_ORTHOGONAL,)),
    Variant(name="any-norm", clause="HRA-C2", configs=(PLAIN,), layers=KINDS),
    Variant(name="small", clause="HRA-C1", configs=(TWO,), numbers="small", draws=EXACT),
    Variant(name="rounded", clause="HRA-C2", configs=(ODD,), layers=("linear-large",), numbers="rounded"),
    Variant(name="vector", clause="HRA-C1", configs=(PLAIN,), operations=RUN, rows=(), draws=EXACT),
    Variant(name="no-bias", clause="HRA-C1", configs=(PLAIN,), bias=False, draws=EXACT),
    Variant(name="two-adapters", clause="HRA-C11", configs=(ODD, TWO), layers=KINDS, draws=EXACT),
    Variant(name="two-kinds", clause="HRA-C11", configs=(TWO, ORTHOGONAL), operations=WITHOUT_GRADIENT, draws=ORTHONORMAL),
)


def normals_of(a: Adapter) -> list[Array]:
    return (orthonormal if a.method.apply_GS else unit)(columns(a.params.u))  # type: ignore[attr-defined]  # every method here is HRA


def reflecting(
    normals: Callable[[Adapter], list[Array]] = normals_of,
    product: Callable[[Array, list[Array]], Array] | None = None,
) -> Formula:
    """W' from other vectors, or from another product with them; unmerging takes them in reverse."""

    def reflect(W: Array, vectors: list[Array]) -> Array:
        for n in vectors:
            W = W - 2.0 * outer(W @ n, n)
        return W

    act = product or reflect

    def step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return act(W, normals(a)), b

    def unmerge(p: Problem) -> tuple[Array, Array | None]:
        W = p.merged_W
        for a in reversed(p.adapters):
            W = act(W, normals(a)[::-1])
        return W, p.merged_b

    return Formula(weight=one_by_one(step), unmerge=unmerge)


def where(asked: Callable[[Mapping[str, object]], bool], replay: Replay) -> Replay:
    """A mistake that shows only in adapters of some configurations."""
    return lambda case: replay(case) if any(asked(a.config) for a in case.adapters) else None


def plain(config: Mapping[str, object]) -> bool:
    return not config["apply_GS"]


def instead(vectors: Callable[[Adapter], list[Array]]) -> Callable[[Adapter], list[Array]]:
    """Other vectors where Gram-Schmidt is off."""
    return lambda a: normals_of(a) if a.method.apply_GS else vectors(a)  # type: ignore[attr-defined]


def _project(W: Array, vectors: list[Array]) -> Array:
    for n in vectors:
        W = W - outer(W @ n, n)
    return W


def _added(W: Array, vectors: list[Array]) -> Array:
    return W - sum(2.0 * outer(W @ n, n) for n in vectors)


def _rows_normalised(a: Adapter) -> list[Array]:
    u = a.params.u
    return columns(u / row_norm(u).reshape(-1, 1))


def _held(a: Adapter) -> list[Array]:
    return [u / constant(norm(u)) for u in columns(a.params.u)]


def _reversed(p: Problem) -> tuple[Adapter, ...]:
    return p.adapters[::-1]


OTHER_ORDER = Formula(
    weight=lambda p: stack.merge(p.layer, p.W, p.b, _reversed(p)),
    unmerge=lambda p: stack.unmerge(p.layer, p.merged_W, p.merged_b, _reversed(p), p.W),
)


def _adapters_reversed(case: Case) -> Answer | None:
    return OTHER_ORDER(case) if len(case.adapters) > 1 else None


def _switched(on: bool) -> Replay:
    return as_if(lambda case: with_config(case, lambda config: {**config, "apply_GS": on}))


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    drawn = config["r"] // 2 if _in_pairs(config) else config["r"]
    return {"hra_u": uniform(1 / math.sqrt(drawn))}


def paired(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    if not _in_pairs(case.adapters[0].config) or np.array_equal(draw["hra_u"][:, ::2], draw["hra_u"][:, 1::2]):
        return ""
    return "init-not-in-pairs: with r even every second column of hra_u must repeat the one before it"


def _in_pairs(config: Config) -> bool:
    return bool(config["init_weights"] and config["r"] % 2 == 0)


FRESH = Fresh(
    clause="HRA-C19",
    starts={
        "default": Start({"r": 4}, ("linear", "conv2d-square")),
        "odd": Start({"r": 3}),
        "false": Start({"r": 4, "init_weights": False}),
        "orthogonal": Start({"r": 4, "apply_GS": True}),
    },
    laws=laws,
    identity=paired,
)
FILES = Files(
    configs_clause="HRA-C21",
    keys_clause="HRA-C22",
    configs={
        "plain": {"r": 4},
        "rank-missing": {},
        "odd-orthogonal": {"r": 5, "apply_GS": True},
    },
    told={"r": "r", "apply_GS": "apply_GS"},
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="reflections-reversed",
            clause="HRA-C4",
            sentence="the reflections are multiplied last to first: the matrix is transposed",
            replay=where(plain, reflecting(lambda a: normals_of(a)[::-1])),
        ),
        Mistake(
            name="reflections-added",
            clause="HRA-C3",
            sentence="the reflections are added up, I - 2 sum n n^T, without being made orthogonal first",
            replay=where(plain, reflecting(product=_added)),
        ),
        Mistake(
            name="not-normalised",
            clause="HRA-C2",
            sentence="the vectors are not divided by their norm",
            replay=where(plain, reflecting(instead(lambda a: columns(a.params.u)))),
        ),
        Mistake(
            name="norm-not-squared",
            clause="HRA-C2",
            sentence="u u^T is divided by the norm of u once, not by its square",
            replay=where(plain, reflecting(instead(lambda a: [u / np.sqrt(norm(u)) for u in columns(a.params.u)]))),
        ),
        Mistake(
            name="rows-normalised",
            clause="HRA-C2",
            sentence="the norm is taken over the rows of u (in, r) instead of its columns",
            replay=where(plain, reflecting(instead(_rows_normalised))),
        ),
        Mistake(
            name="projected",
            clause="HRA-C1",
            sentence="a projection I - n n^T stands for the reflection I - 2 n n^T",
            replay=reflecting(product=_project),
        ),
        Mistake(
            name="u-reread",
            clause="HRA-C6",
            sentence="the numbers of u are read as (r, in) instead of (in, r)",
            replay=reread("hra_u"),
        ),
        Mistake(
            name="odd-one-left-out",
            clause="HRA-C3",
            sentence="of an odd number of reflections the last one is left out, as if they came in pairs",
            replay=where(lambda c: int(str(c["r"])) % 2 == 1, reflecting(lambda a: normals_of(a)[: a.params.u.shape[1] // 2 * 2])),
        ),
        Mistake(
            name="gs-ignored",
            clause="HRA-C5",
            sentence="apply_GS is not read: the vectors are reflected as they are",
            replay=_switched(False),
        ),
        Mistake(
            name="gs-always",
            clause="HRA-C5",
            sentence="the vectors are made orthogonal where apply_GS is off",
            replay=_switched(True),
        ),
        only_first_adapter("HRA-C11"),
        Mistake(
            name="adapters-reversed",
            clause="HRA-C11",
            sentence="several adapters are multiplied last to first",
            replay=_adapters_reversed,
        ),
        Mistake(
            name="double-merge",
            clause="HRA-C13",
            sentence="the adapter is merged twice",
            replay=only(merge=merged_twice),
        ),
        Mistake(
            name="unmerge-same-order",
            clause="HRA-C14",
            sentence="unmerge multiplies the reflections first to last, as merge does, instead of last to first",
            replay=where(plain, only(unmerge=unmerge_that_merges)),
        ),
        Mistake(
            name="unmerge-from-frozen",
            clause="HRA-C14",
            sentence="unmerge starts from the frozen weight instead of the merged one it is given",
            replay=only(unmerge=unmerge_the_frozen),
        ),
        Mistake(
            name="grad-norm-held",
            clause="HRA-C16",
            sentence="the norm of u is held constant in the gradient",
            replay=where(plain, only(backward=lambda case: autograd(case, reflecting(instead(_held)).forward))),
        ),
        Mistake(
            name="input-grad-missing",
            clause="HRA-C18",
            sentence="the input's gradient is that of the frozen layer alone",
            replay=only(backward=base_alone_backward),
        ),
    ),
)
