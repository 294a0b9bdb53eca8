"""LoRA: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from peft_ref import stack
from peft_ref.arrays import Array
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.mistake import (
    Formula,
    Mistake,
    Replay,
    Suite,
    as_if,
    autograd,
    base_alone_backward,
    dropped,
    first_adapter_alone,
    gradients_times,
    merged_twice,
    one_by_one,
    only,
    reread,
    stored,
    unmerge_that_merges,
    with_scale,
    without_dropout,
)
from peft_ref.check.oracle import Problem, answer, pose, static_delta
from peft_ref.check.variants import Variant
from peft_ref.layers import Layer, Linear
from peft_ref.stack import Adapter

PLAIN = {"r": 4, "lora_alpha": 6}
RSLORA = {**PLAIN, "use_rslora": True}
KINDS = ("linear", "transposed_linear", "embedding", "conv1d", "conv2d", "conv3d")

VARIANTS = (
    Variant(name="plain", clause="LORA-scale", configs=(PLAIN,), layers=(*KINDS, "conv2d-groups", "conv1d-dilation")),
    Variant(name="small", clause="LORA-scale", configs=(PLAIN,), layers=("linear", "embedding"), numbers="small"),
    Variant(name="rounded", clause="LORA-scale", configs=({"r": 3, "lora_alpha": 5},), layers=("linear-large",), numbers="rounded"),
    Variant(name="no-bias", clause="LORA-forward", configs=(PLAIN,), bias=False),
    Variant(name="rslora", clause="LORA-rslora", configs=(RSLORA,), layers=("linear", "conv2d")),
    Variant(
        name="lora-bias",
        clause="LORA-bias",
        configs=({**PLAIN, "lora_bias": True},),
        layers=("linear", "conv1d", "conv2d-groups"),
    ),
    Variant(
        name="dropout",
        clause="LORA-dropout",
        configs=({**PLAIN, "lora_dropout": 0.5},),
        layers=("linear", "conv1d"),
        dropout=0.5,
    ),
    Variant(
        name="two-adapters",
        clause="LORA-several",
        configs=(PLAIN, {"r": 2, "lora_alpha": 1}),
        layers=("linear", "embedding", "conv1d"),
    ),
)


def scale_of(config: Mapping[str, Any]) -> float:
    return float(config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"]))


def lora_bias(change: Callable[[NDArray, Mapping[str, Any]], NDArray]) -> Callable[[Case], Case | None]:
    """The case with another `lora_B.bias`, given the bias and the adapter's configuration."""

    def changed(case: Case) -> Case | None:
        if not any("lora_B.bias" in a.tensors for a in case.adapters):
            return None
        adapters = (
            replace(a, tensors={k: change(v, a.config) if k == "lora_B.bias" else v for k, v in a.tensors.items()}) for a in case.adapters
        )
        return replace(case, adapters=tuple(adapters))

    return changed


def _unscaled(bias: NDArray, config: Mapping[str, Any]) -> NDArray:
    return bias / scale_of(config)


def _not_rescaled(case: Case) -> Case | None:
    if not any(a.dropout for a in case.adapters):
        return None
    adapters = (a if a.dropout is None else replace(a, dropout=(a.dropout[0], 0.0)) for a in case.adapters)
    return replace(case, adapters=tuple(adapters))


def _dropped_everywhere(p: Problem) -> Array:
    a = p.adapters[0]
    return stack.forward(p.layer, p.W, p.b, [a._replace(dropout=None)], dropped(p.x, a))


def dropout_on_base_too(case: Case) -> Answer | None:
    if not case.adapters[0].dropout:
        return None
    if case.operation == "forward":
        return {"y": _dropped_everywhere(pose(case))}
    return autograd(case, _dropped_everywhere) if case.operation == "backward" else None


def _first_scale(case: Case) -> Case | None:
    if len(case.adapters) < 2:
        return None
    scale = scale_of(case.adapters[0].config)
    adapters = (replace(a, config={**a.config, "lora_alpha": scale * a.config["r"]}) for a in case.adapters)
    return replace(case, adapters=tuple(adapters))


def _base_scaled(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
    after, shifted = stack.merge(layer, W, b, [a])
    return after - W + a.method.scale * W, shifted  # type: ignore[attr-defined]  # every method of this suite has a scale


def _summed_factors(p: Problem) -> tuple[Array, Array | None]:
    """(B1 + B2)(A1 + A2), the scales in B, the smaller rank filled up with nothing."""
    W = p.W
    for a in p.adapters:
        for other in p.adapters:
            r = min(a.params.A.shape[0], other.params.A.shape[0])
            W = W + a.method.scale * (a.params.B[:, :r] @ other.params.A[:r, :])  # type: ignore[attr-defined]
    return W, p.b


def _several(replay: Replay) -> Replay:
    return lambda case: replay(case) if len(case.adapters) > 1 else None


def _groupless(replay: Replay) -> Replay:
    return lambda case: None if case.layer is None or case.layer.groups > 1 else replay(case)


def _reread_delta(case: Case) -> Answer | None:
    """The delta's numbers written out as (in, out) and added to (out, in) in that order."""
    p = pose(case)
    if case.operation not in ("merge", "delta") or not isinstance(p.layer, Linear):
        return None
    deltas = [static_delta(p.layer, a) for a in p.adapters]
    delta = sum(d.T.reshape(d.shape) for d in deltas)
    if case.operation == "delta":
        return stored(p.layer, delta, None)
    return stored(p.layer, p.W + delta, stack.merge(p.layer, p.W, p.b, p.adapters)[1])


def _fan_in_fan_out(case: Case) -> Answer | None:
    """The stored (in, out) read as (out, in)."""
    layer, weight = case.layer, case.weight
    if not isinstance(layer, Linear) or not layer.transposed or weight is None or case.operation in ("unmerge", "delta"):
        return None
    plain = replace(layer, transposed=False)
    out = answer(replace(case, layer=plain, weight=weight.reshape(plain.weight_shape)))
    return {k: v.reshape(layer.weight_shape) if k == "weight" else v for k, v in out.items()}


def _interleaved_groups(case: Case) -> Case | None:
    """Rank channel j belongs to group j % groups instead of j // (r / groups)."""
    if case.layer is None or case.layer.groups == 1:
        return None
    g, adapters = case.layer.groups, []
    for a in case.adapters:
        A = a.tensors["lora_A.weight"]
        order = np.arange(A.shape[0]).reshape(-1, g).T.reshape(-1)
        adapters.append(replace(a, tensors={**a.tensors, "lora_A.weight": A[order]}))
    return replace(case, adapters=tuple(adapters))


def _no_bias(case: Case) -> Answer | None:
    return None if case.bias is None else answer(replace(case, bias=None))


MLX_VLM = ("https://github.com/Blaizzy/mlx-vlm/issues/845", "https://github.com/Blaizzy/mlx-vlm/issues/986")
RSLORA_LINKS = ("https://github.com/NVIDIA/TensorRT-LLM/issues/1668", "https://github.com/vllm-project/vllm/issues/10798")

SCALING = (
    Mistake(
        name="scale-is-alpha",
        clause="LORA-scale",
        sentence="the scale is alpha instead of alpha / r",
        replay=with_scale(lambda alpha, r, rslora: alpha),
        links=MLX_VLM,
    ),
    Mistake(
        name="scale-is-one",
        clause="LORA-scale",
        sentence="alpha is ignored: the low-rank product is added unscaled",
        replay=with_scale(lambda alpha, r, rslora: 1.0),
        links=("https://github.com/mflux-community/mflux/issues/449", "https://github.com/cloneofsimo/lora/issues/187"),
    ),
    Mistake(
        name="scale-inverted",
        clause="LORA-scale",
        sentence="the scale is r / alpha instead of alpha / r",
        replay=with_scale(lambda alpha, r, rslora: r / alpha),
    ),
    Mistake(
        name="scale-twice",
        clause="LORA-scale",
        sentence="the scale is applied twice, once to each factor",
        replay=with_scale(lambda alpha, r, rslora: (alpha / (math.sqrt(r) if rslora else r)) ** 2),
    ),
    Mistake(
        name="rslora-ignored",
        clause="LORA-rslora",
        sentence="use_rslora is not read: the scale is alpha / r instead of alpha / sqrt(r)",
        replay=with_scale(lambda alpha, r, rslora: alpha / r),
        links=RSLORA_LINKS,
    ),
    Mistake(
        name="rslora-always",
        clause="LORA-rslora",
        sentence="the scale is alpha / sqrt(r) without use_rslora",
        replay=with_scale(lambda alpha, r, rslora: alpha / math.sqrt(r)),
    ),
    Mistake(
        name="rslora-wrong-root",
        clause="LORA-rslora",
        sentence="with use_rslora the scale is sqrt(alpha / r) instead of alpha / sqrt(r)",
        replay=with_scale(lambda alpha, r, rslora: math.sqrt(alpha / r) if rslora else alpha / r),
    ),
)

LAYOUT = (
    Mistake(
        name="A-transposed",
        clause="LORA-shapes",
        sentence="lora_A's numbers are read as (in, r) instead of (r, in)",
        replay=reread("_A"),
        links=("https://github.com/paiml/aprender/issues/2138",),
    ),
    Mistake(
        name="B-transposed",
        clause="LORA-shapes",
        sentence="lora_B's numbers are read as (r, out) instead of (out, r)",
        replay=reread("_B"),
        links=("https://github.com/osaurus-ai/vmlx-swift/issues/320",),
    ),
)

GRADIENTS = (
    Mistake(
        name="input-grad-missing",
        clause="LORA-gradient",
        sentence="the gradient of x stops at the adapter: only the frozen weight's part is there",
        replay=only(backward=base_alone_backward),
    ),
    Mistake(
        name="grad-scale-missing",
        clause="LORA-gradient",
        sentence="the gradients of A and B lack the scale",
        replay=gradients_times(lambda config: 1 / scale_of(config)),
    ),
    Mistake(
        name="grad-scale-twice",
        clause="LORA-gradient",
        sentence="the gradients of A and B carry the scale twice",
        replay=gradients_times(scale_of),
    ),
)

DROPOUT = (
    Mistake(
        name="dropout-missing",
        clause="LORA-dropout",
        sentence="dropout is not applied",
        replay=as_if(without_dropout),
        links=("https://github.com/paiml/aprender/issues/2170",),
    ),
    Mistake(
        name="dropout-not-rescaled",
        clause="LORA-dropout",
        sentence="what dropout keeps is not divided by 1 - p",
        replay=as_if(_not_rescaled),
    ),
    Mistake(
        name="dropout-on-base-too",
        clause="LORA-dropout",
        sentence="dropout reaches the frozen layer's input as well, instead of the adapter's only",
        replay=dropout_on_base_too,
    ),
)

MERGING = (
    Mistake(
        name="double-merge",
        clause="LORA-merge",
        sentence="the adapter is merged twice",
        replay=only(merge=merged_twice),
    ),
    Mistake(
        name="unmerge-adds",
        clause="LORA-unmerge",
        sentence="unmerge adds the delta again instead of taking it out",
        replay=only(unmerge=unmerge_that_merges),
    ),
)

SUITE = Suite(
    variants=VARIANTS,
    mistakes=(
        *SCALING,
        *LAYOUT,
        *GRADIENTS,
        *DROPOUT,
        *MERGING,
        Mistake(
            name="base-scaled-too",
            clause="LORA-forward",
            sentence="the scale multiplies the frozen weight too",
            replay=_groupless(Formula(weight=one_by_one(_base_scaled))),
        ),
        Mistake(
            name="delta-transposed",
            clause="LORA-merge",
            sentence="the delta is laid out as (in, out) and added to a weight that is (out, in)",
            replay=_reread_delta,
            links=("https://github.com/vllm-project/vllm/issues/52194",),
        ),
        Mistake(
            name="fan-in-fan-out-ignored",
            clause="LORA-transposed",
            sentence="a Conv1D weight, stored (in, out), is read as (out, in)",
            replay=_fan_in_fan_out,
            links=("https://github.com/axolotl-ai-cloud/axolotl/issues/3095",),
        ),
        Mistake(
            name="bias-lost",
            clause="LORA-forward",
            sentence="the frozen layer's bias is not added",
            replay=only(forward=_no_bias),
        ),
        Mistake(
            name="lora-bias-unscaled",
            clause="LORA-bias",
            sentence="lora_B.bias is added without the scale",
            replay=only(forward=as_if(lora_bias(_unscaled)), merge=as_if(lora_bias(_unscaled)), unmerge=as_if(lora_bias(_unscaled))),
        ),
        Mistake(
            name="lora-bias-unscaled-in-merge",
            clause="LORA-bias",
            sentence="lora_B.bias is scaled in the forward pass but not when merging",
            replay=only(merge=as_if(lora_bias(_unscaled))),
            links=("https://github.com/huggingface/peft/issues/2486",),
        ),
        Mistake(
            name="lora-bias-lost",
            clause="LORA-bias",
            sentence="lora_B.bias is not added",
            replay=only(
                forward=as_if(lora_bias(lambda bias, config: bias * 0)),
                merge=as_if(lora_bias(lambda bias, config: bias * 0)),
                unmerge=as_if(lora_bias(lambda bias, config: bias * 0)),
            ),
        ),
        Mistake(
            name="merge-without-scale",
            clause="LORA-merge",
            sentence="the forward pass scales the delta, merging does not",
            replay=only(
                merge=with_scale(lambda alpha, r, rslora: 1.0),
                delta=with_scale(lambda alpha, r, rslora: 1.0),
            ),
        ),
        Mistake(
            name="only-first-adapter",
            clause="LORA-several",
            sentence="of several active adapters only the first one acts",
            replay=only(forward=first_adapter_alone, merge=first_adapter_alone, unmerge=first_adapter_alone),
        ),
        Mistake(
            name="first-scale-for-all",
            clause="LORA-several",
            sentence="every adapter is scaled by the first one's alpha / r",
            replay=as_if(_first_scale),
        ),
        Mistake(
            name="cross-terms",
            clause="LORA-several",
            sentence="the factors of several adapters are summed before they are multiplied: (B1 + B2)(A1 + A2)",
            replay=_several(Formula(weight=_summed_factors)),
            links=("https://github.com/kohya-ss/sd-scripts/issues/586",),
        ),
        Mistake(
            name="conv-groups-interleaved",
            clause="LORA-convolution",
            sentence="the rank channels of a grouped convolution are dealt out to the groups in turn instead of in blocks",
            replay=as_if(_interleaved_groups),
        ),
    ),
)
