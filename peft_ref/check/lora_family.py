"""What the methods of LoRA's family get wrong alike: scale, layout, gradient, dropout, merging."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from peft_ref import stack
from peft_ref.arrays import Array
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.mistake import (
    Mistake,
    as_if,
    as_if_tensors,
    autograd,
    base_alone_backward,
    dropped,
    gradients_times,
    merged_twice,
    only,
    reread,
    unmerge_that_merges,
    unmerge_the_frozen,
    with_scale,
    without_dropout,
)
from peft_ref.check.oracle import Problem, answer, pose
from peft_ref.contracts import LowRank

PLAIN = {"r": 4, "lora_alpha": 6}
RSLORA = {**PLAIN, "use_rslora": True}
LINEAR_AND_TABLE = ("linear", "transposed_linear", "embedding")
KINDS = ("linear", "transposed_linear", "embedding", "conv1d", "conv2d", "conv3d")


def scale_of(config: Mapping[str, Any]) -> float:
    return float(config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"]))


def _not_rescaled(case: Case) -> Case | None:
    return _with_dropout(case, lambda mask, p: (mask, 0.0))


def _dropped_everywhere(p: Problem) -> Array:
    """The first adapter's mask on the frozen layer's input, which has to be somebody's; every adapter has its own."""
    y = stack.forward(p.layer, p.W, p.b, p.adapters, p.x)
    return y + p.layer.apply(dropped(p.x, p.adapters[0]) - p.x, p.W, None)


def divided_by_p(case: Case) -> Case | None:
    return _with_dropout(case, lambda mask, p: (mask, 1 - p))


def first_mask_for_all(case: Case) -> Case | None:
    first = case.adapters[0].dropout if case.adapters else None
    return None if first is None else _with_dropout(case, lambda mask, p: first)


def _with_dropout(case: Case, change: Callable[[NDArray, float], tuple[NDArray, float]]) -> Case | None:
    if not any(a.dropout for a in case.adapters):
        return None
    adapters = (a if a.dropout is None else replace(a, dropout=change(*a.dropout)) for a in case.adapters)
    return replace(case, adapters=tuple(adapters))


def unmasked_input_gradient(case: Case) -> Answer | None:
    """The adapter's part of dx passes where dropout let nothing in."""
    p = pose(case)
    if p.dy is None or not any(a.dropout for a in p.adapters) or not all(isinstance(a.method, LowRank) for a in p.adapters):
        return None
    free = tuple(a._replace(dropout=None) for a in p.adapters)
    dx = stack.vjp(p.layer, p.W, p.b, free, p.x, p.dy).x
    return None if dx is None else {**answer(case), "x": dx}


def dropout_on_base_too(case: Case) -> Answer | None:
    if not case.adapters or not case.adapters[0].dropout:
        return None
    if case.operation == "forward":
        return {"y": _dropped_everywhere(pose(case))}
    return autograd(case, _dropped_everywhere) if case.operation == "backward" else None


MLX_VLM = ("https://github.com/Blaizzy/mlx-vlm/issues/845", "https://github.com/Blaizzy/mlx-vlm/issues/986")
RSLORA_LINKS = ("https://github.com/NVIDIA/TensorRT-LLM/issues/1668", "https://github.com/vllm-project/vllm/issues/10798")

SCALING = (
    Mistake(
        name="scale-is-alpha",
        clause="LORA-C3",
        sentence="the scale is alpha instead of alpha / r",
        replay=with_scale(lambda alpha, r, rslora: alpha),
        links=MLX_VLM,
    ),
    Mistake(
        name="scale-is-one",
        clause="LORA-C3",
        sentence="alpha is ignored: the low-rank product is added unscaled",
        replay=with_scale(lambda alpha, r, rslora: 1.0),
        links=("https://github.com/mflux-community/mflux/issues/449", "https://github.com/cloneofsimo/lora/issues/187"),
    ),
    Mistake(
        name="scale-inverted",
        clause="LORA-C3",
        sentence="the scale is r / alpha instead of alpha / r",
        replay=with_scale(lambda alpha, r, rslora: r / alpha),
    ),
    Mistake(
        name="scale-twice",
        clause="LORA-C4",
        sentence="the scale is applied twice, once to each factor",
        replay=as_if_tensors(lambda key, v, config: v * scale_of(config) if "_A" in key else v),
    ),
    Mistake(
        name="rslora-ignored",
        clause="LORA-C5",
        sentence="use_rslora is not read: the scale is alpha / r instead of alpha / sqrt(r)",
        replay=with_scale(lambda alpha, r, rslora: alpha / r),
        links=RSLORA_LINKS,
    ),
    Mistake(
        name="rslora-always",
        clause="LORA-C5",
        sentence="the scale is alpha / sqrt(r) without use_rslora",
        replay=with_scale(lambda alpha, r, rslora: alpha / math.sqrt(r)),
    ),
    Mistake(
        name="rslora-wrong-root",
        clause="LORA-C5",
        sentence="with use_rslora the scale is sqrt(alpha / r) instead of alpha / sqrt(r)",
        replay=with_scale(lambda alpha, r, rslora: math.sqrt(alpha / r) if rslora else alpha / r),
    ),
)

LAYOUT = (
    Mistake(
        name="A-transposed",
        clause="LORA-C2",
        sentence="lora_A's numbers are read as (in, r) instead of (r, in)",
        replay=reread("_A"),
        links=("https://github.com/paiml/aprender/issues/2138",),
    ),
    Mistake(
        name="B-transposed",
        clause="LORA-C2",
        sentence="lora_B's numbers are read as (r, out) instead of (out, r)",
        replay=reread("_B"),
        links=("https://github.com/osaurus-ai/vmlx-swift/issues/320",),
    ),
)

GRADIENTS = (
    Mistake(
        name="input-grad-missing",
        clause="LORA-C24",
        sentence="the gradient of x stops at the adapter: only the frozen weight's part is there",
        replay=only(backward=base_alone_backward),
    ),
    Mistake(
        name="grad-scale-missing",
        clause="LORA-C22",
        sentence="the gradients of the adapter's tensors lack the scale",
        replay=gradients_times(lambda config: 1 / scale_of(config)),
    ),
    Mistake(
        name="grad-A-scale-missing",
        clause="LORA-C22",
        sentence="the gradient of A lacks the scale",
        replay=gradients_times(lambda config: 1 / scale_of(config), "_A"),
    ),
    Mistake(
        name="grad-B-scale-missing",
        clause="LORA-C22",
        sentence="the gradient of B lacks the scale",
        replay=gradients_times(lambda config: 1 / scale_of(config), "_B.weight"),
    ),
    Mistake(
        name="grad-scale-twice",
        clause="LORA-C22",
        sentence="the gradients of the adapter's tensors carry the scale twice",
        replay=gradients_times(scale_of),
    ),
)

DROPOUT = (
    Mistake(
        name="dropout-missing",
        clause="LORA-C11",
        sentence="dropout is not applied",
        replay=as_if(without_dropout),
        links=("https://github.com/paiml/aprender/issues/2170",),
    ),
    Mistake(
        name="dropout-not-rescaled",
        clause="LORA-C12",
        sentence="what dropout keeps is not divided by 1 - p",
        replay=as_if(_not_rescaled),
    ),
    Mistake(
        name="dropout-divided-by-p",
        clause="LORA-C12",
        sentence="what dropout keeps is divided by p instead of 1 - p",
        replay=as_if(divided_by_p),
    ),
    Mistake(
        name="dropout-first-mask-for-all",
        clause="LORA-C11",
        sentence="every adapter's input is dropped by the first one's mask",
        replay=as_if(first_mask_for_all),
    ),
    Mistake(
        name="dropout-mask-missing-in-gradient",
        clause="LORA-C24",
        sentence="the adapter's part of the gradient of x is not masked",
        replay=only(backward=unmasked_input_gradient),
    ),
    Mistake(
        name="dropout-on-base-too",
        clause="LORA-C11",
        sentence="dropout reaches the frozen layer's input as well, instead of the adapter's only",
        replay=dropout_on_base_too,
    ),
)

MERGING = (
    Mistake(
        name="double-merge",
        clause="LORA-C20",
        sentence="the adapter is merged twice",
        replay=only(merge=merged_twice),
    ),
    Mistake(
        name="unmerge-from-frozen",
        clause="LORA-C21",
        sentence="unmerge starts from the frozen weight instead of the merged one it is given",
        replay=only(unmerge=unmerge_the_frozen),
    ),
    Mistake(
        name="unmerge-adds",
        clause="LORA-C21",
        sentence="unmerge adds the delta again instead of taking it out",
        replay=only(unmerge=unmerge_that_merges),
    ),
)
