"""LoHa with `use_effective_conv2d`: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check import shared_mistakes as shared
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray, build_method
from peft_ref.check.distributions import Law, constant, uniform
from peft_ref.check.mistake import Mistake, Suite, as_if_tensors, gradients_times, only, reread, with_scale
from peft_ref.check.oracle import answer, pose
from peft_ref.check.variants import RUN, Variant
from peft_ref.contracts import Delta
from peft_ref.layers import Conv, Layer
from peft_ref.methods.loha_effective import LoHaEffective, Params

PLAIN = {"r": 4, "alpha": 6}
KERNELS = ("conv1d", "conv2d")

VARIANTS = (
    Variant(name="plain", clause="LOHAEFFECTIVE-C1", configs=(PLAIN,), layers=("linear", *KERNELS, "conv2d-groups", "conv1d-dilation")),
    Variant(name="no-core", clause="LOHAEFFECTIVE-C6", configs=(PLAIN,), layers=("conv2d-pointwise",)),
    Variant(name="small", clause="LOHAEFFECTIVE-C1", configs=(PLAIN,), layers=("conv1d",), numbers="small"),
    Variant(name="rounded", clause="LOHAEFFECTIVE-C7", configs=({"r": 3, "alpha": 5},), layers=("conv1d",), numbers="rounded"),
    Variant(name="no-bias", clause="LOHAEFFECTIVE-C3", configs=(PLAIN,), layers=("conv1d",), bias=False),
    Variant(name="vector", clause="LOHAEFFECTIVE-C6", configs=(PLAIN,), operations=RUN, rows=()),
    Variant(name="two-adapters", clause="LOHAEFFECTIVE-C9", configs=(PLAIN, {"r": 2, "alpha": 8}), layers=KERNELS),
)


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    shapes = {s.key: s.stored_shape for s in build_method("loha_effective", config).spec(layer)}
    drawn = {key: uniform(1 / math.sqrt(math.prod(shape[1:]))) for key, shape in shapes.items()}
    return {**drawn, "hada_w2_b": constant(0.0, "init-not-identity")} if config["init_weights"] else drawn


FRESH = Fresh(
    clause="LOHAEFFECTIVE-C16",
    starts={"default": Start(PLAIN, (*KERNELS, "conv2d-groups")), "false": Start({**PLAIN, "init_weights": False}, ("conv1d",))},
    laws=laws,
)
FILES = Files(
    configs_clause="LOHAEFFECTIVE-C18",
    keys_clause="LOHAEFFECTIVE-C19",
    configs={
        "plain": {**PLAIN, "use_effective_conv2d": True},
        "alpha-missing": {"r": 4, "use_effective_conv2d": True},
        "rank-pattern": {**PLAIN, "use_effective_conv2d": True, "rank_pattern": {"v_proj": 16}},
    },
    saved_on={
        "unet.down.conv1": Conv(in_channels=3, out_channels=5, kernel_size=(3, 2)),
        "unet.up.conv2": Conv(in_channels=5, out_channels=3, kernel_size=(2,)),
    },
)


def changed(change: Callable[[Params], Params]) -> Callable[[Case], Answer | None]:
    """The delta of other tensors; None where there is no core."""

    def delta(layer: Layer, method: LoHaEffective, p: Params, W0: Array) -> Array | None:
        return None if p.t1 is None else method.delta(layer, change(p)).W

    return shared.other_delta(delta)


def of_products(wrong: Callable[[Array, Array], Array]) -> Callable[[Case], Answer | None]:
    """s times something else of the two products."""

    def delta(layer: Layer, method: LoHaEffective, p: Params, W0: Array) -> Array:
        first, second = method.products(layer, p)
        return method.scale * wrong(first, second)

    return shared.other_delta(delta)


def _backwards(key: str, v: NDArray, config: Mapping[str, Any]) -> NDArray:
    return np.flip(v, axis=(2, 3)) if "hada_t" in key else v


def _true_gradients(case: Case) -> Answer | None:
    p = pose(case)
    if all(a.params.t1 is None for a in p.adapters):
        return None
    d = Delta(p.layer.weight_vjp(p.x, p.dy))
    right = answer(case)
    for i, a in enumerate(p.adapters):
        assert isinstance(a.method, LoHaEffective)
        packed = a.method.pack(p.layer, a.method.delta_vjp_true(p.layer, a.params, d))
        right = {**right, **{f"{i}.{key}": packed[key] for key in ("hada_w1_a", "hada_w2_a")}}
    return right


SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="scale-is-alpha",
            clause="LOHAEFFECTIVE-C7",
            sentence="the scale is alpha instead of alpha / r",
            replay=with_scale(lambda alpha, r, rslora: alpha, "alpha"),
        ),
        Mistake(
            name="scale-is-one",
            clause="LOHAEFFECTIVE-C7",
            sentence="alpha is ignored: the product is added unscaled",
            replay=with_scale(lambda alpha, r, rslora: 1.0, "alpha"),
        ),
        Mistake(
            name="scale-on-both-products",
            clause="LOHAEFFECTIVE-C7",
            sentence="each of the two products is scaled, so the scale counts twice",
            replay=with_scale(lambda alpha, r, rslora: (alpha / r) ** 2, "alpha"),
        ),
        Mistake(
            name="scale-rooted",
            clause="LOHAEFFECTIVE-C7",
            sentence="the scale is alpha / sqrt(r) instead of alpha / r",
            replay=with_scale(lambda alpha, r, rslora: alpha / math.sqrt(r), "alpha"),
        ),
        Mistake(
            name="products-added",
            clause="LOHAEFFECTIVE-C1",
            sentence="the two products are added instead of multiplied element by element",
            replay=of_products(lambda first, second: first + second),
        ),
        Mistake(
            name="second-product-ignored",
            clause="LOHAEFFECTIVE-C1",
            sentence="only the first product is there",
            replay=of_products(lambda first, second: first),
        ),
        Mistake(
            name="factors-crossed",
            clause="LOHAEFFECTIVE-C1",
            sentence="the factors of the outputs are exchanged: W2a goes with T1 and W1b",
            replay=changed(lambda p: p._replace(w1_a=p.w2_a, w2_a=p.w1_a)),
        ),
        Mistake(
            name="cores-exchanged",
            clause="LOHAEFFECTIVE-C1",
            sentence="the cores are exchanged: T2 goes with W1a and W1b",
            replay=changed(lambda p: p._replace(t1=p.t2, t2=p.t1)),
        ),
        Mistake(
            name="first-core-for-both",
            clause="LOHAEFFECTIVE-C1",
            sentence="both products are made with the first core",
            replay=changed(lambda p: p._replace(t2=p.t1)),
        ),
        Mistake(
            name="core-transposed",
            clause="LOHAEFFECTIVE-C2",
            sentence="the first two axes of the cores are exchanged",
            replay=changed(lambda p: p._replace(t1=np.transpose(p.t1, (1, 0, 2)), t2=np.transpose(p.t2, (1, 0, 2)))),
        ),
        Mistake(
            name="kernel-backwards",
            clause="LOHAEFFECTIVE-C2",
            sentence="the kernel's points are in reverse order, as where a convolution is not a cross-correlation",
            replay=as_if_tensors(_backwards),
        ),
        Mistake(
            name="b-factors-transposed",
            clause="LOHAEFFECTIVE-C4",
            sentence="the numbers of hada_w1_b and hada_w2_b are read as (in, r) instead of (r, in)",
            replay=reread("_b"),
        ),
        Mistake(
            name="a-factors-transposed",
            clause="LOHAEFFECTIVE-C4",
            sentence="the numbers of hada_w1_a and hada_w2_a are read in the other order",
            replay=reread("_a"),
        ),
        Mistake(
            name="grad-scale-missing",
            clause="LOHAEFFECTIVE-C13",
            sentence="the gradients lack the scale",
            replay=gradients_times(lambda config: config["r"] / config["alpha"]),
        ),
        Mistake(
            name="a-gradients-true",
            clause="LOHAEFFECTIVE-C14",
            sentence="the gradients of hada_w1_a and hada_w2_a are the derivative, and not what HF PEFT computes for it",
            replay=only(backward=_true_gradients),
            dialect=True,
        ),
        shared.input_gradient_missing("LOHAEFFECTIVE-C15"),
        shared.only_first_adapter("LOHAEFFECTIVE-C9"),
        *shared.merging("LOHAEFFECTIVE-C11", "LOHAEFFECTIVE-C12"),
    ),
)
