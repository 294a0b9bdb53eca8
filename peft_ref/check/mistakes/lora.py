"""LoRA: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from peft_ref import stack
from peft_ref.arrays import Array
from peft_ref.check.asked import Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.lora_family import DROPOUT, GRADIENTS, KINDS, LAYOUT, LINEAR_AND_TABLE, MERGING, PLAIN, RSLORA, SCALING, scale_of
from peft_ref.check.lora_starts import WITH_TABLE, identity, laws
from peft_ref.check.mistake import (
    AsIf,
    Formula,
    Mistake,
    Replay,
    Suite,
    as_if,
    as_if_tensors,
    one_by_one,
    only,
    stored,
    with_scale,
    with_tensors,
)
from peft_ref.check.oracle import Problem, answer, pose, static_delta
from peft_ref.check.shared_mistakes import only_first_adapter
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer, Linear
from peft_ref.stack import Adapter

BIASED = {**PLAIN, "lora_bias": True}
DROPPED = {**PLAIN, "lora_dropout": 0.75}
SECOND = {"r": 2, "lora_alpha": 8}

VARIANTS = (
    Variant(name="plain", clause="LORA-C1", configs=(PLAIN,), layers=(*KINDS, "conv2d-groups", "conv1d-dilation")),
    Variant(name="small", clause="LORA-C3", configs=(PLAIN,), layers=("linear", "embedding"), numbers="small"),
    Variant(name="rounded", clause="LORA-C3", configs=({"r": 9, "lora_alpha": 5},), layers=("linear-large",), numbers="rounded"),
    Variant(name="no-bias", clause="LORA-C6", configs=(PLAIN,), bias=False),
    Variant(name="vector", clause="LORA-C6", configs=(PLAIN,), layers=("linear", "transposed_linear"), operations=RUN, rows=()),
    Variant(name="matrix", clause="LORA-C6", configs=(PLAIN,), layers=LINEAR_AND_TABLE, operations=RUN, rows=(3,)),
    Variant(name="rslora", clause="LORA-C5", configs=(RSLORA,), layers=("linear", "transposed_linear", "conv2d")),
    Variant(name="lora-bias", clause="LORA-C8", configs=(BIASED,), layers=("linear", "transposed_linear", "conv1d", "conv2d-groups")),
    Variant(name="lora-bias-alone", clause="LORA-C9", configs=(BIASED,), layers=("linear", "conv1d"), bias=False),
    Variant(name="dropout", clause="LORA-C11", configs=(DROPPED,), layers=("linear", "transposed_linear", "conv1d"), dropout=0.75),
    Variant(name="dropout-lora-bias", clause="LORA-C11", configs=({**BIASED, **DROPPED},), dropout=0.75),
    Variant(name="dropout-two-adapters", clause="LORA-C11", configs=(DROPPED, {**SECOND, "lora_dropout": 0.75}), dropout=0.75),
    Variant(
        name="two-adapters",
        clause="LORA-C10",
        configs=(PLAIN, SECOND),
        layers=("linear", "transposed_linear", "embedding", "conv1d"),
    ),
)


def lora_bias(factor: Callable[[Mapping[str, Any]], float]) -> Replay:
    """The right answer with `lora_B.bias` times a factor of the adapter's configuration."""
    return as_if_tensors(lambda key, v, config: v * factor(config) if key == "lora_B.bias" else v)


def _unscaled(config: Mapping[str, Any]) -> float:
    return 1 / scale_of(config)


def _first_scale(case: Case) -> Case | None:
    if len(case.adapters) < 2:
        return None
    scale = scale_of(case.adapters[0].config)
    adapters = (replace(a, config={**a.config, "lora_alpha": scale * a.config["r"]}) for a in case.adapters)
    return replace(case, adapters=tuple(adapters))


def _base_scaled(case: Case) -> Answer | None:
    if case.operation not in ("forward", "backward", "merge") or case.weight is None:
        return None
    if len(case.adapters) == 1:
        return answer(replace(case, weight=case.weight * scale_of(case.adapters[0].config)))
    return Formula(weight=one_by_one(_base_scaled_step))(case)


def _base_scaled_step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
    after, shifted = stack.merge(layer, W, b, [a])
    return after - W + a.method.scale * W, shifted  # type: ignore[attr-defined]  # every method of this suite has a scale


def _summed_factors(p: Problem) -> Array:
    """(B1 + B2)(A1 + A2), the scales in B, the smaller rank filled up with nothing."""
    delta = p.W * 0
    for a in p.adapters:
        for other in p.adapters:
            r = min(a.params.A.shape[0], other.params.A.shape[0])
            delta = delta + a.method.scale * (a.params.B[:, :r] @ other.params.A[:r, :])  # type: ignore[attr-defined]
    return delta


CROSSED = Formula(
    weight=lambda p: (p.W + _summed_factors(p), p.b),
    unmerge=lambda p: (p.merged_W - _summed_factors(p), p.merged_b),
)


def _several(replay: Replay) -> Replay:
    """Only where several adapters read the same x: with a mask each, their factors have nothing to be summed for."""
    return lambda case: replay(case) if len(case.adapters) > 1 and not any(a.dropout for a in case.adapters) else None


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
    if not isinstance(layer, Linear) or not layer.transposed or weight is None:
        return None
    plain = replace(layer, transposed=False)
    merged = None if case.merged_weight is None else case.merged_weight.reshape(plain.weight_shape)
    out = answer(replace(case, layer=plain, weight=weight.reshape(plain.weight_shape), merged_weight=merged))
    return {k: v.reshape(layer.weight_shape) if k == "weight" else v for k, v in out.items()}


def _dealt_out(r: int, groups: int) -> NDArray:
    """Which stored rank channel each group's blocks hold, in order, when channel j goes to group j % groups."""
    return np.arange(r).reshape(-1, groups).T.reshape(-1)


def _interleaved(case: Case) -> Case | None:
    """Rank channel j belongs to group j % groups instead of j // (r / groups)."""
    if case.layer is None or case.layer.groups == 1:
        return None
    groups = case.layer.groups
    return with_tensors(case, lambda key, v, config: v[_dealt_out(config["r"], groups)] if key == "lora_A.weight" else v)


def _interleaved_undo(case: Case, gradients: Answer) -> Answer:
    assert case.layer is not None
    order = np.argsort(_dealt_out(case.adapters[0].config["r"], case.layer.groups))
    return {name: g[order] if name.endswith("lora_A.weight") else g for name, g in gradients.items()}


def _no_bias(case: Case) -> Answer | None:
    return None if case.bias is None else answer(replace(case, bias=None))


DRAWN: Mapping[str, bool | str] = {"gaussian": "gaussian", "false": False, "orthogonal": "orthogonal"}
FRESH = Fresh(
    clause="LORA-C25",
    starts={
        **{label: Start({**PLAIN, "init_lora_weights": init}) for label, init in DRAWN.items()},
        **{label: Start({**PLAIN, "init_lora_weights": label}, draws=1) for label in ("pissa", "olora")},
        "default": Start(PLAIN, ("linear", "transposed_linear", "embedding", "conv2d", "conv2d-groups")),
        "default-bias": Start(BIASED),
        "false-bias": Start({**BIASED, "init_lora_weights": False}, ("linear", "conv2d-groups")),
    },
    laws=laws,
    identity=identity,
)
FILES = Files(
    configs_clause="LORA-C33",
    keys_clause="LORA-C35",
    configs={
        "plain": {"r": 4, "lora_alpha": 6},
        "alpha-missing": {"r": 4},
        "rank-missing": {"lora_alpha": 6},
        "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
        "rank-pattern": {"r": 4, "lora_alpha": 6, "rank_pattern": {"v_proj": 16, r"layers\.1\..*q_proj": 2}},
        "alpha-pattern": {"r": 4, "lora_alpha": 6, "alpha_pattern": {"q_proj": 20}},
        "both-patterns": {
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {"mlp.up_proj": 16, "up_proj": 2},
            "alpha_pattern": {"up_proj": 24, "down_proj": 1},
            "use_rslora": True,
        },
    },
    saved_on=WITH_TABLE,
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        *SCALING,
        *LAYOUT,
        *GRADIENTS,
        *DROPOUT,
        *MERGING,
        Mistake(
            name="base-scaled-too",
            clause="LORA-C7",
            sentence="the scale multiplies the frozen weight too",
            replay=_base_scaled,
        ),
        Mistake(
            name="delta-transposed",
            clause="LORA-C20",
            sentence="the delta is laid out as (in, out) and added to a weight that is (out, in)",
            replay=_reread_delta,
            links=("https://github.com/vllm-project/vllm/issues/52194",),
        ),
        Mistake(
            name="fan-in-fan-out-ignored",
            clause="LORA-C14",
            sentence="a Conv1D weight, stored (in, out), is read as (out, in)",
            replay=_fan_in_fan_out,
            links=("https://github.com/axolotl-ai-cloud/axolotl/issues/3095",),
        ),
        Mistake(
            name="bias-lost",
            clause="LORA-C7",
            sentence="the frozen layer's bias is not added",
            replay=only(forward=_no_bias),
        ),
        Mistake(
            name="lora-bias-unscaled",
            clause="LORA-C8",
            sentence="lora_B.bias is added without the scale",
            replay=lora_bias(_unscaled),
        ),
        Mistake(
            name="lora-bias-unscaled-in-merge",
            clause="LORA-C8",
            sentence="lora_B.bias is scaled in the forward pass but not when merging",
            replay=only(merge=lora_bias(_unscaled)),
            links=("https://github.com/huggingface/peft/issues/2486",),
        ),
        Mistake(
            name="lora-bias-lost",
            clause="LORA-C8",
            sentence="lora_B.bias is not added",
            replay=lora_bias(lambda config: 0.0),
        ),
        Mistake(
            name="merge-without-scale",
            clause="LORA-C20",
            sentence="the forward pass scales the delta, merging does not",
            replay=only(
                merge=with_scale(lambda alpha, r, rslora: 1.0),
                delta=with_scale(lambda alpha, r, rslora: 1.0),
            ),
        ),
        only_first_adapter("LORA-C10"),
        Mistake(
            name="first-scale-for-all",
            clause="LORA-C10",
            sentence="every adapter is scaled by the first one's alpha / r",
            replay=as_if(_first_scale),
        ),
        Mistake(
            name="cross-terms",
            clause="LORA-C10",
            sentence="the factors of several adapters are summed before they are multiplied: (B1 + B2)(A1 + A2)",
            replay=_several(CROSSED),
            links=("https://github.com/kohya-ss/sd-scripts/issues/586",),
        ),
        Mistake(
            name="conv-groups-interleaved",
            clause="LORA-C17",
            sentence="the rank channels of a grouped convolution are dealt out to the groups in turn instead of in blocks",
            replay=AsIf(_interleaved, _interleaved_undo),
        ),
    ),
)
