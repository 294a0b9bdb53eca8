"""LoKr: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from peft_ref.arrays import Array, tile
from peft_ref.check import shared_mistakes as shared
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import build_method
from peft_ref.check.distributions import Law, constant, uniform
from peft_ref.check.mistake import Mistake, Suite, gradients_times, reread, with_scale
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer
from peft_ref.methods.lokr import LoKr, Params

PLAIN = {"r": 2, "alpha": 3, "decompose_factor": 2}
FULL = {"r": 16, "alpha": 40}
BLOCKS = ("linear-both", "conv1d-both", "conv2d-both")

VARIANTS = (
    Variant(name="plain", clause="LOKR-C1", configs=(PLAIN,), layers=(*BLOCKS, "conv2d-groups")),
    Variant(name="full", clause="LOKR-C4", configs=(FULL,), layers=(*BLOCKS, "conv2d-groups")),
    Variant(name="both", clause="LOKR-C5", configs=({**PLAIN, "decompose_both": True, "decompose_factor": 6},), layers=("linear-both",)),
    Variant(name="effective", clause="LOKR-C8", configs=({"r": 2, "alpha": 3, "use_effective_conv2d": True},), layers=BLOCKS[1:]),
    Variant(name="default-factor", clause="LOKR-C6", configs=({"r": 2, "alpha": 3},), layers=("linear-both",)),
    Variant(name="small", clause="LOKR-C1", configs=({**PLAIN, "alpha": 4},), layers=("linear-both",), numbers="small"),
    Variant(name="rounded", clause="LOKR-C10", configs=({"r": 3, "alpha": 5},), layers=("linear-both",), numbers="rounded"),
    Variant(name="one-vector", clause="LOKR-C3", configs=(PLAIN,), layers=("linear-both",), operations=RUN, rows=()),
    Variant(name="no-bias", clause="LOKR-C2", configs=(PLAIN,), layers=("linear-both",), bias=False),
    Variant(name="two-adapters", clause="LOKR-C14", configs=(PLAIN, FULL), layers=("linear-both", "conv1d-both")),
)


def product(wrong: Callable[[Layer, Array, Array], Array | None]) -> Callable[[Layer, LoKr, Params, Array], Array | None]:
    """A delta from another product of W1 and s W2."""
    return lambda layer, method, p, W0: wrong(layer, method.first(p), method.scale * method.second(p))


def _swapped(layer: Layer, w1: Array, w2: Array) -> Array | None:
    """W2 (x) W1."""
    if layer.kernel_size:
        return None
    blocks = (w2.reshape(-1, 1) * w1.reshape(1, -1)).reshape(*w2.shape, *w1.shape)
    return np.transpose(blocks, (0, 2, 1, 3)).reshape(layer.shape)


def _of_tiles(layer: Layer, w1: Array, w2: Array) -> Array | None:
    return None if layer.kernel_size else tile(w1, layer.shape) * tile(w2, layer.shape)


def _second_alone(layer: Layer, method: LoKr, p: Params, W0: Array) -> Array:
    w1 = method.first(p)
    return method.kronecker(layer, np.ones(w1.shape), method.scale * method.second(p))


def _second_crossed(layer: Layer, method: LoKr, p: Params, W0: Array) -> Array | None:
    """A flattened kernel read with its axes before the inputs: (k, i2) for (i2, k)."""
    n = method.dims(layer)
    if n["k"] == 1 or not n["low2"] or n["core"]:
        return None
    w2 = method.second(p).reshape(n["o2"], n["k"], n["i2"])
    return method.kronecker(layer, method.first(p), method.scale * np.transpose(w2, (0, 2, 1)).reshape(n["o2"], -1))


def _core_transposed(layer: Layer, method: LoKr, p: Params, W0: Array) -> Array | None:
    if p.t2 is None:
        return None
    return method.delta(layer, p._replace(t2=np.transpose(p.t2, (1, 0, 2)))).W


def _true_kronecker(layer: Layer, method: LoKr, p: Params, W0: Array) -> Array | None:
    n = method.dims(layer)
    if layer.kind != "conv1d" or not n["full2"]:
        return None
    w1, w2 = method.first(p), method.scale * method.second(p)
    blocks = (w1.reshape(-1, 1) * w2.reshape(1, -1)).reshape(*w1.shape, *w2.shape)
    return np.transpose(blocks, (0, 2, 1, 3)).reshape(layer.shape)


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    """Everything uniform within 1 / sqrt(numbers of a row), but for the one that starts at zero."""
    first, second = ("lokr_w1", "lokr_w1_a"), ("lokr_w2", "lokr_w2_b")
    zeros = {True: first, False: (), "lycoris": second}[config["init_weights"]]
    shapes = {s.key: s.stored_shape for s in build_method("lokr", config).spec(layer)}
    return {
        key: constant(0.0, "init-not-identity") if key in zeros else uniform(1 / math.sqrt(math.prod(shape[1:])))
        for key, shape in shapes.items()
    }


FRESH = Fresh(
    clause="LOKR-C20",
    starts={
        "default": Start(PLAIN, ("linear-both", "conv2d-both")),
        "lycoris": Start({**PLAIN, "init_weights": "lycoris"}, ("linear-both",)),
        "false": Start({**PLAIN, "init_weights": False}, ("linear-both",)),
        "both": Start({**PLAIN, "decompose_factor": 6, "decompose_both": True}, ("linear-both",)),
        "core": Start({"r": 2, "use_effective_conv2d": True}, ("conv1d-both",)),
    },
    laws=laws,
)
FILES = Files(
    configs_clause="LOKR-C23",
    keys_clause="LOKR-C24",
    configs={
        "plain": {"r": 4, "alpha": 6},
        "alpha-missing": {"r": 4},
        "rank-pattern": {"r": 4, "alpha": 6, "rank_pattern": {"v_proj": 16}},
        "alpha-pattern": {"r": 4, "alpha": 6, "alpha_pattern": {"q_proj": 20}},
    },
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="scale-is-alpha",
            clause="LOKR-C10",
            sentence="the scale is alpha instead of alpha / r",
            replay=with_scale(lambda alpha, r, rslora: alpha, "alpha"),
        ),
        Mistake(
            name="scale-is-one",
            clause="LOKR-C10",
            sentence="alpha is ignored: the product is added unscaled",
            replay=with_scale(lambda alpha, r, rslora: 1.0, "alpha"),
        ),
        Mistake(
            name="scale-on-both-factors",
            clause="LOKR-C11",
            sentence="each of the two factors is scaled, so the scale counts twice",
            replay=with_scale(lambda alpha, r, rslora: (alpha / r) ** 2, "alpha"),
        ),
        Mistake(
            name="scale-rooted",
            clause="LOKR-C10",
            sentence="the scale is alpha / sqrt(r) instead of alpha / r",
            replay=with_scale(lambda alpha, r, rslora: alpha / math.sqrt(r), "alpha"),
        ),
        Mistake(
            name="factors-swapped",
            clause="LOKR-C1",
            sentence="the Kronecker product is W2 (x) W1 instead of W1 (x) W2",
            replay=shared.other_delta(product(_swapped)),
        ),
        Mistake(
            name="tiles-multiplied",
            clause="LOKR-C1",
            sentence="W1 and W2 are both repeated as they are and multiplied element by element",
            replay=shared.other_delta(product(_of_tiles)),
        ),
        Mistake(
            name="first-factor-ignored",
            clause="LOKR-C1",
            sentence="W1 is not looked at: W2 is repeated all over the weight",
            replay=shared.other_delta(_second_alone),
        ),
        Mistake(
            name="first-factor-transposed",
            clause="LOKR-C7",
            sentence="the numbers of lokr_w1 are read as (i1, o1) instead of (o1, i1)",
            replay=reread("lokr_w1"),
        ),
        Mistake(
            name="a-factors-transposed",
            clause="LOKR-C7",
            sentence="the numbers of the factors ending in _a are read in the other order",
            replay=reread("_a"),
        ),
        Mistake(
            name="b-factors-transposed",
            clause="LOKR-C7",
            sentence="the numbers of the factors ending in _b are read in the other order",
            replay=reread("_b"),
        ),
        Mistake(
            name="kernel-before-inputs",
            clause="LOKR-C7",
            sentence="the columns of lokr_w2_b on a convolution are read as (*k, i2) instead of (i2, *k)",
            replay=shared.other_delta(_second_crossed),
        ),
        Mistake(
            name="core-transposed",
            clause="LOKR-C8",
            sentence="the first two axes of lokr_t2 are exchanged",
            replay=shared.other_delta(_core_transposed),
        ),
        Mistake(
            name="conv1d-true-kronecker",
            clause="LOKR-C9",
            sentence="a 1-d convolution with a full W2 gets the Kronecker product, as LyCORIS has it, and not what HF PEFT makes of it",
            replay=shared.other_delta(_true_kronecker),
            dialect=True,
        ),
        Mistake(
            name="grad-scale-missing",
            clause="LOKR-C18",
            sentence="the gradients lack the scale",
            replay=gradients_times(lambda config: config["r"] / config["alpha"]),
        ),
        shared.input_gradient_missing("LOKR-C19"),
        shared.only_first_adapter("LOKR-C14"),
        *shared.merging("LOKR-C16", "LOKR-C17"),
    ),
)
