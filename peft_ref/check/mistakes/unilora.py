"""Uni-LoRA: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from peft_ref.arrays import Array, namespace
from peft_ref.check.asked import Config, Draw, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray, build_method
from peft_ref.check.distributions import Law, uniform
from peft_ref.check.mistake import Mistake, Replay, Suite, as_if_tensors, only, reread
from peft_ref.check.oracle import answer, pose
from peft_ref.check.shared_mistakes import dropout, merging, only_first_adapter, other_delta
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer
from peft_ref.methods.unilora import UniLoRA

PLAIN = {"r": 3, "theta_d_length": 7, "save_indices": True}
LARGE = {"r": 4, "theta_d_length": 11, "save_indices": True, "proj_seed": 5}

VARIANTS = (
    Variant(name="plain", clause="UNILORA-C1", configs=(PLAIN,), layers=("linear", "transposed_linear")),
    Variant(name="small", clause="UNILORA-C1", configs=(PLAIN,), numbers="small"),
    Variant(name="rounded", clause="UNILORA-C1", configs=(LARGE,), layers=("linear-large",), numbers="rounded"),
    Variant(name="vector", clause="UNILORA-C1", configs=(PLAIN,), operations=RUN, rows=()),
    Variant(name="no-bias", clause="UNILORA-C4", configs=(PLAIN,), bias=False),
    Variant(name="dropout", clause="UNILORA-C16", configs=({**PLAIN, "unilora_dropout": 0.75},), dropout=0.75, operations=RUN),
    Variant(name="two-adapters", clause="UNILORA-C6", configs=(PLAIN, {**PLAIN, "r": 2, "proj_seed": 9})),
)


def picked(theta: Array, indices: Array, scales: Array) -> Array:
    xp = namespace(theta)
    return xp.reshape(xp.take(theta, xp.reshape(indices, (-1,)), axis=0), indices.shape) * scales


def _changed(change: Callable[[Any], Any]) -> Replay:
    def delta(layer: Layer, method: Any, p: Any, W0: Array) -> Array:
        p = change(p)
        return picked(p.theta, p.indices_B, p.scales_B) @ picked(p.theta, p.indices_A, p.scales_A)

    return other_delta(delta)


def _in_turn(p: Any) -> Any:
    """Places counted through instead of read."""
    n = p.theta.shape[0]
    return p._replace(
        indices_A=np.arange(p.indices_A.size).reshape(p.indices_A.shape) % n,
        indices_B=np.arange(p.indices_B.size).reshape(p.indices_B.shape) % n,
    )


def _from_one(p: Any) -> Any:
    n = p.theta.shape[0]
    return p._replace(indices_A=(p.indices_A - 1) % n, indices_B=(p.indices_B - 1) % n)


def _both_reread(key: str, v: NDArray, config: Mapping[str, Any]) -> NDArray:
    return v.reshape(v.shape[::-1]).T if "indices" in key else v


def _theta(gradient: Callable[[Any, NDArray, NDArray], NDArray]) -> Replay:
    """Another gradient of theta, given the parameters, dA and dB, where one adapter has no dropout."""

    def backward(case: Case) -> Answer | None:
        if len(case.adapters) != 1 or case.adapters[0].dropout:
            return None
        p = pose(case)
        params, dW = p.adapters[0].params, p.layer.weight_vjp(p.x, p.dy)
        A, B = picked(params.theta, params.indices_A, params.scales_A), picked(params.theta, params.indices_B, params.scales_B)
        return {**answer(case), "0.unilora_theta_d": gradient(params, B.T @ dW, dW @ A.T)}

    return only(backward=backward)


def _added(p: Any, parts: list[tuple[NDArray, NDArray]]) -> NDArray:
    out = np.zeros(p.theta.shape)
    for indices, values in parts:
        np.add.at(out, indices.reshape(-1), values.reshape(-1))
    return out


def _last_wins(p: Any, dA: NDArray, dB: NDArray) -> NDArray:
    out = np.zeros((2, *p.theta.shape))
    for row, indices, values in ((0, p.indices_A, dA * p.scales_A), (1, p.indices_B, dB * p.scales_B)):
        out[row, indices.reshape(-1)] = values.reshape(-1)
    return np.asarray(out[0] + out[1])


def laws(config: Config, layer: Layer) -> Mapping[str, Law]:
    return {"unilora_theta_d": uniform(config.get("init_theta_d_bound", 0.02), "init-nothing-to-train")}


def as_dealt(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    """The places to the number; a scale is one over a root."""
    method = build_method("unilora", case.adapters[0].config)
    assert isinstance(method, UniLoRA)
    right = method.common({"": layer}, {"": np.zeros(layer.shape)}, np.random.default_rng(0))[""]
    for name in "AB":
        if not np.array_equal(draw[f"unilora_indices_{name}"], getattr(right, f"indices_{name}")):
            return f"unilora_indices_{name}: init-other-places: not what NumPy deals out from proj_seed={method.proj_seed}"
        want = getattr(right, f"scales_{name}")
        if not np.all(np.abs(draw[f"unilora_scales_{name}"] - want) <= 2.0**-7 * want):
            return f"unilora_scales_{name}: init-other-scales: one over the root of how often a number is used"
    return ""


SUITE = Suite(
    variants=VARIANTS,
    mistakes=(
        Mistake(
            name="scales-ignored",
            clause="UNILORA-C2",
            sentence="the scales are left out",
            replay=_changed(lambda p: p._replace(scales_A=p.scales_A * 0 + 1.0, scales_B=p.scales_B * 0 + 1.0)),
        ),
        Mistake(
            name="scales-squared",
            clause="UNILORA-C2",
            sentence="each scale counts twice: divided by how often, not by its root",
            replay=_changed(lambda p: p._replace(scales_A=p.scales_A * p.scales_A, scales_B=p.scales_B * p.scales_B)),
        ),
        Mistake(
            name="places-in-turn",
            clause="UNILORA-C1",
            sentence="theta is laid out in turn, without looking at the places",
            replay=_changed(_in_turn),
        ),
        Mistake(
            name="places-from-one",
            clause="UNILORA-C1",
            sentence="the places are read as counted from one",
            replay=_changed(_from_one),
        ),
        Mistake(
            name="A-alone",
            clause="UNILORA-C1",
            sentence="theta makes A, and every number of B is one",
            replay=other_delta(
                lambda layer, method, p, W0: (p.scales_B * 0 + 1.0) @ picked(p.theta, p.indices_A, p.scales_A),
            ),
        ),
        Mistake(
            name="scale-is-one-over-r",
            clause="UNILORA-C3",
            sentence="the product is divided by r, as LoRA's is",
            replay=other_delta(lambda layer, method, p, W0: method.delta(layer, p).W / method.r),
        ),
        Mistake(
            name="places-reread",
            clause="UNILORA-C5",
            sentence="the places are read in the order of the transposed factors",
            replay=as_if_tensors(_both_reread, lambda key, g, config: g),
        ),
        Mistake(
            name="scales-A-reread",
            clause="UNILORA-C5",
            sentence="unilora_scales_A is read in the order of its transpose",
            replay=reread("unilora_scales_A"),
        ),
        Mistake(
            name="gradient-without-scales",
            clause="UNILORA-C9",
            sentence="the gradient of theta adds up dA and dB without their scales",
            replay=_theta(lambda p, dA, dB: _added(p, [(p.indices_A, dA), (p.indices_B, dB)])),
        ),
        Mistake(
            name="gradient-of-A-alone",
            clause="UNILORA-C9",
            sentence="the gradient of theta has A's part and lacks B's",
            replay=_theta(lambda p, dA, dB: _added(p, [(p.indices_A, dA * p.scales_A)])),
        ),
        Mistake(
            name="gradient-overwritten",
            clause="UNILORA-C9",
            sentence="of the places of one number the last one's gradient overwrites the others instead of being added",
            replay=_theta(_last_wins),
        ),
        only_first_adapter("UNILORA-C6"),
        *merging("UNILORA-C7", "UNILORA-C8"),
        *dropout("UNILORA-C16"),
    ),
    fresh=Fresh(
        clause="UNILORA-C11",
        starts={
            "default": Start({**PLAIN}, ("linear", "transposed_linear")),
            "wide": Start({**LARGE, "init_theta_d_bound": 0.25}),
        },
        laws=laws,
        identity=as_dealt,
    ),
    files=Files(
        configs_clause="UNILORA-C13",
        keys_clause="UNILORA-C14",
        configs={"plain": {**PLAIN}, "default": {}, "other": {"r": 8, "theta_d_length": 90}},
        told={"r": "r"},
    ),
)
