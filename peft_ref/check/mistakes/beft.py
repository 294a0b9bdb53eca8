"""BEFT: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case
from peft_ref.check.distributions import Law, constant, normal
from peft_ref.check.mistake import (
    Formula,
    Mistake,
    Suite,
    merged_twice,
    one_by_one,
    only,
    stored,
    unmerge_that_merges,
    unmerge_the_frozen,
)
from peft_ref.check.oracle import Problem, answer, null_answer, pose
from peft_ref.check.shared_mistakes import only_first_adapter
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer
from peft_ref.stack import Adapter

STEPS = ("forward", "backward", "merge", "unmerge")  # W' - W is zero

VARIANTS = (
    Variant(name="plain", clause="BEFT-C1", configs=({},), operations=STEPS),
    Variant(name="small", clause="BEFT-C1", configs=({},), operations=STEPS, numbers="small"),
    Variant(name="rounded", clause="BEFT-C1", configs=({},), operations=STEPS, layers=("linear-large",), numbers="rounded"),
    Variant(name="vector", clause="BEFT-C2", configs=({},), operations=RUN, rows=()),
    Variant(name="no-bias", clause="BEFT-C3", configs=({},), operations=RUN, bias=False),
    Variant(name="two-adapters", clause="BEFT-C6", configs=({}, {}), operations=STEPS),
)


def other_bias(change: Callable[[Array | None, Array], Array]) -> Callable[[Case], Answer | None]:
    """The bias that comes out, given the frozen one and c; unmerging stays right."""

    def step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return W, change(b, a.params.c)

    return Formula(weight=one_by_one(step))


def plus(b: Array | None, c: Array) -> Array:
    return c if b is None else b + c


def before_the_layer(case: Case) -> Answer | None:
    """W (x + c) with as many entries of c as the input has."""
    if case.operation in ("merge", "unmerge") or case.layer is None or case.layer.shape[0] < case.layer.shape[1]:
        return None
    return Formula(weight=_into_the_input)(case)


def _into_the_input(p: Problem) -> tuple[Array, Array | None]:
    b = p.b
    for a in p.adapters:
        b = plus(b, p.W @ a.params.c[: p.layer.shape[1]])
    return p.W, b


def one_row_gradient(case: Case) -> Answer:
    """dc from the last row of dy alone: the sum over the rows is forgotten."""
    assert case.dy is not None
    last = case.dy.reshape(-1, case.dy.shape[-1])[-1:]
    return {name: last if name != "x" else v for name, v in answer(case).items()}


def mean_gradient(case: Case) -> Answer:
    assert case.dy is not None
    rows = case.dy.size // case.dy.shape[-1]
    return {name: v / rows if name != "x" else v for name, v in answer(case).items()}


def frozen_bias_kept(case: Case) -> Answer | None:
    p = pose(case)
    return None if p.b is None else stored(p.layer, p.W, p.b)


def merged_bias_replaced(case: Case) -> Answer:
    p = pose(case)
    return stored(p.layer, p.W, np.sum([a.params.c for a in p.adapters], axis=0))


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    return {"beft_bias": constant(0.0, "init-not-identity") if config["init_weights"] else normal(1.0)}


FRESH = Fresh(clause="BEFT-C13", starts={"default": Start({}), "false": Start({"init_weights": False})}, laws=laws)
FILES = Files(configs_clause="BEFT-C14", keys_clause="BEFT-C15", configs={"plain": {}}, told={})


SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="beft-ignored",
            clause="BEFT-C1",
            sentence="beft_bias is not added at all: this is the frozen layer",
            replay=null_answer,
        ),
        Mistake(
            name="beft-replaces-bias",
            clause="BEFT-C1",
            sentence="beft_bias takes the place of the frozen bias instead of being added to it",
            replay=other_bias(lambda b, c: c),
        ),
        Mistake(
            name="beft-subtracted",
            clause="BEFT-C1",
            sentence="beft_bias is subtracted",
            replay=other_bias(lambda b, c: plus(b, -c)),
        ),
        Mistake(
            name="beft-scales",
            clause="BEFT-C1",
            sentence="the output is multiplied by 1 + beft_bias, like IA3's, instead of shifted",
            replay=Formula(
                weight=one_by_one(lambda layer, a, W, b, W0: ((a.params.c[:, None] + 1) * W, None if b is None else (a.params.c + 1) * b))
            ),
        ),
        Mistake(
            name="beft-before-layer",
            clause="BEFT-C2",
            sentence="beft_bias is added to the layer's input, not to its output",
            replay=before_the_layer,
        ),
        Mistake(
            name="beft-reversed",
            clause="BEFT-C4",
            sentence="the entries of beft_bias are read from the last to the first",
            replay=other_bias(lambda b, c: plus(b, c[::-1])),
        ),
        only_first_adapter("BEFT-C6"),
        Mistake(
            name="beft-not-merged",
            clause="BEFT-C8",
            sentence="the forward pass is right, and merging leaves the bias as it was",
            replay=only(merge=frozen_bias_kept),
        ),
        Mistake(
            name="beft-merge-replaces",
            clause="BEFT-C8",
            sentence="the forward pass is right, and merging puts beft_bias in the place of the bias",
            replay=only(merge=merged_bias_replaced),
        ),
        Mistake(
            name="double-merge",
            clause="BEFT-C8",
            sentence="the adapter is merged twice",
            replay=only(merge=merged_twice),
        ),
        Mistake(
            name="unmerge-adds",
            clause="BEFT-C10",
            sentence="unmerge adds beft_bias again instead of taking it out",
            replay=only(unmerge=unmerge_that_merges),
        ),
        Mistake(
            name="unmerge-from-frozen",
            clause="BEFT-C10",
            sentence="unmerge starts from the frozen bias instead of the merged one it is given",
            replay=only(unmerge=unmerge_the_frozen),
        ),
        Mistake(
            name="beft-gradient-one-row",
            clause="BEFT-C11",
            sentence="the gradient of beft_bias is the last row of dy instead of the sum over the rows",
            replay=only(backward=one_row_gradient),
        ),
        Mistake(
            name="beft-gradient-mean",
            clause="BEFT-C11",
            sentence="the gradient of beft_bias is the mean over the rows of dy instead of the sum",
            replay=only(backward=mean_gradient),
        ),
    ),
)
