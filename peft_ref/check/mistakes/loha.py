"""LoHa: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

from peft_ref.arrays import Array
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case
from peft_ref.check.distributions import Law, constant, uniform
from peft_ref.check.mistake import (
    Formula,
    Mistake,
    Suite,
    gradients_times,
    one_by_one,
    reread,
    stored,
    with_scale,
)
from peft_ref.check.oracle import Problem, pose
from peft_ref.check.shared_mistakes import merging, only_first_adapter
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer
from peft_ref.methods.loha import LoHa, Params
from peft_ref.stack import Adapter

PLAIN = {"r": 4, "alpha": 6}

VARIANTS = (
    Variant(name="plain", clause="LOHA-C1", configs=(PLAIN,), layers=("linear", "conv1d", "conv2d", "conv2d-groups", "conv1d-dilation")),
    Variant(name="small", clause="LOHA-C1", configs=(PLAIN,), numbers="small"),
    Variant(name="rounded", clause="LOHA-C5", configs=({"r": 9, "alpha": 5},), layers=("linear-large",), numbers="rounded"),
    Variant(name="vector", clause="LOHA-C3", configs=(PLAIN,), operations=RUN, rows=()),
    Variant(name="no-bias", clause="LOHA-C2", configs=(PLAIN,), bias=False),
    Variant(name="two-adapters", clause="LOHA-C10", configs=(PLAIN, {"r": 2, "alpha": 8}), layers=("linear", "conv1d")),
)


def other_delta(delta: Callable[[float, Params], Array]) -> Callable[[Case], Answer | None]:
    """A wrong delta, given the scale and the four factors."""

    def step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        assert isinstance(a.method, LoHa)
        return W + delta(a.method.scale, a.params), b

    def unmerge(p: Problem) -> tuple[Array, Array | None]:
        W = p.merged_W
        for a in p.adapters:
            assert isinstance(a.method, LoHa)
            W = W - delta(a.method.scale, a.params)
        return W, p.merged_b

    formula = Formula(weight=one_by_one(step), unmerge=unmerge)

    def replay(case: Case) -> Answer | None:
        if case.operation != "delta":
            return formula(case)
        p = pose(case)
        a = p.adapters[0]
        assert isinstance(a.method, LoHa)
        return stored(p.layer, delta(a.method.scale, a.params), None)

    return replay


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    into, of_r = uniform(1 / math.sqrt(layer.shape[1])), uniform(1 / math.sqrt(config["r"]))
    return {"hada_w1_a": of_r, "hada_w1_b": into, "hada_w2_a": of_r, "hada_w2_b": constant(0.0, "init-not-identity")}


FRESH = Fresh(
    clause="LOHA-C17",
    starts={"default": Start(PLAIN, ("linear", "conv2d"))},
    laws=laws,
)
FILES = Files(
    configs_clause="LOHA-C19",
    keys_clause="LOHA-C21",
    configs={
        "plain": {"r": 4, "alpha": 6},
        "alpha-missing": {"r": 4},
        "rank-pattern": {"r": 4, "alpha": 6, "rank_pattern": {"v_proj": 16}},
    },
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="scale-is-alpha",
            clause="LOHA-C5",
            sentence="the scale is alpha instead of alpha / r",
            replay=with_scale(lambda alpha, r, rslora: alpha, "alpha"),
        ),
        Mistake(
            name="scale-is-one",
            clause="LOHA-C5",
            sentence="alpha is ignored: the product is added unscaled",
            replay=with_scale(lambda alpha, r, rslora: 1.0, "alpha"),
        ),
        Mistake(
            name="scale-on-both-products",
            clause="LOHA-C6",
            sentence="each of the two products is scaled, so the scale counts twice",
            replay=with_scale(lambda alpha, r, rslora: (alpha / r) ** 2, "alpha"),
        ),
        Mistake(
            name="scale-rooted",
            clause="LOHA-C5",
            sentence="the scale is alpha / sqrt(r) instead of alpha / r",
            replay=with_scale(lambda alpha, r, rslora: alpha / math.sqrt(r), "alpha"),
        ),
        Mistake(
            name="products-added",
            clause="LOHA-C1",
            sentence="the two low-rank products are added instead of multiplied element by element",
            replay=other_delta(lambda s, p: s * (p.w1_a @ p.w1_b + p.w2_a @ p.w2_b)),
        ),
        Mistake(
            name="second-product-ignored",
            clause="LOHA-C1",
            sentence="only the first product is there: this is plain LoRA",
            replay=other_delta(lambda s, p: s * (p.w1_a @ p.w1_b)),
        ),
        Mistake(
            name="factors-crossed",
            clause="LOHA-C1",
            sentence="the factors are paired wrongly: (W1a W2b) * (W2a W1b)",
            replay=other_delta(lambda s, p: s * ((p.w1_a @ p.w2_b) * (p.w2_a @ p.w1_b))),
        ),
        Mistake(
            name="b-factors-transposed",
            clause="LOHA-C4",
            sentence="the numbers of hada_w1_b and hada_w2_b are read as (in, r) instead of (r, in)",
            replay=reread("_b"),
        ),
        Mistake(
            name="a-factors-transposed",
            clause="LOHA-C4",
            sentence="the numbers of hada_w1_a and hada_w2_a are read as (r, out) instead of (out, r)",
            replay=reread("_a"),
        ),
        Mistake(
            name="grad-scale-missing",
            clause="LOHA-C14",
            sentence="the gradients lack the scale",
            replay=gradients_times(lambda config: config["r"] / config["alpha"]),
        ),
        only_first_adapter("LOHA-C10"),
        *merging("LOHA-C12", "LOHA-C13"),
    ),
)
