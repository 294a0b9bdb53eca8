"""RandLoRA: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from peft_ref.arrays import Array, namespace
from peft_ref.check.asked import Config, Draw, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray, build_method
from peft_ref.check.distributions import Law, constant
from peft_ref.check.mistake import Mistake, Replay, Suite, as_if_tensors, gradients_times, only, reread, with_scale
from peft_ref.check.oracle import answer
from peft_ref.check.shared_mistakes import dropout, merging, only_first_adapter, other_delta
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer
from peft_ref.methods.randlora import RandLoRA, bases

PLAIN = {"r": 4, "randlora_alpha": 6, "widest_in": 8, "widest_out": 10}
ALONE = {"r": 4, "randlora_alpha": 6}

VARIANTS = (
    Variant(name="plain", clause="RANDLORA-C1", configs=(PLAIN,), layers=("linear", "transposed_linear", "linear-blocks")),
    Variant(name="small", clause="RANDLORA-C1", configs=(PLAIN,), numbers="small"),
    Variant(name="alone", clause="RANDLORA-C5", configs=(ALONE,), layers=("linear", "linear-blocks")),
    Variant(name="rounded", clause="RANDLORA-C6", configs=({"r": 9, "randlora_alpha": 5},), layers=("linear-large",), numbers="rounded"),
    Variant(name="vector", clause="RANDLORA-C1", configs=(PLAIN,), operations=RUN, rows=()),
    Variant(name="no-bias", clause="RANDLORA-C4", configs=(PLAIN,), bias=False),
    Variant(name="dropout", clause="RANDLORA-C17", configs=({**PLAIN, "randlora_dropout": 0.75},), dropout=0.75, operations=RUN),
    Variant(name="two-adapters", clause="RANDLORA-C8", configs=(PLAIN, {**PLAIN, "r": 2, "randlora_alpha": 8})),
)


def _orders_equal(layer: Layer, method: Any, p: Any, W0: Array) -> Array | None:
    """Rank k of basis b meets rank k of basis b."""
    if min(method.r, p.gamma.shape[0]) == 1:
        return None
    xp, small, large, n = namespace(p.A), min(layer.shape), max(layer.shape), p.gamma.shape[0]
    B = xp.permute_dims(p.B[:large, :n, :], (0, 2, 1))
    cube = xp.expand_dims(p.lam, axis=2) * p.A[:, :, :small] * xp.expand_dims(p.gamma, axis=0)
    W = method.scale * (xp.reshape(B, (large, n * method.r)) @ xp.reshape(cube, (n * method.r, small)))
    return W if layer.shape[1] <= layer.shape[0] else xp.matrix_transpose(W)


def _changed(change: Callable[[Layer, Any], Any]) -> Replay:
    def delta(layer: Layer, method: Any, p: Any, W0: Array) -> Array | None:
        changed = change(layer, p)
        return None if changed is None else method.delta(layer, changed).W

    return other_delta(delta)


def _last(layer: Layer, p: Any) -> Any:
    small, large, n = min(layer.shape), max(layer.shape), p.gamma.shape[0]
    if (p.A.shape[2], *p.B.shape[:2]) == (small, large, n):
        return None
    A, B = p.A[:, :, p.A.shape[2] - small :], p.B[p.B.shape[0] - large :, p.B.shape[1] - n :, :]
    return p._replace(A=A, B=B)


def _without(asked: str, other: str) -> Replay:
    def backward(case: Case) -> Answer:
        """The gradient of `asked` as if all numbers of `other` were one."""
        ones = (replace(a, tensors={k: np.ones_like(v) if k == other else v for k, v in a.tensors.items()}) for a in case.adapters)
        without = answer(replace(case, adapters=tuple(ones)))
        return {name: without[name] if name.endswith(asked) else g for name, g in answer(case).items()}

    return only(backward=backward)


def _a_reread(key: str, v: NDArray, config: Mapping[str, Any]) -> NDArray:
    return v.reshape(v.shape[2], v.shape[0]).T.reshape(v.shape) if key == "randlora_A" else v


def laws(config: Config, layer: Layer) -> Mapping[str, Law]:
    return {"randlora_lambda": constant(0.0, "init-not-identity")}


def as_drawn(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    """The seed decides A and B, up to what a deviation is rounded to: they differ from another seed's everywhere."""
    method = build_method("randlora", case.adapters[0].config)
    assert isinstance(method, RandLoRA)
    letters = method.dims(layer)
    share = 1 / max(letters["bases"], letters["small"])
    if not np.all(np.abs(draw["randlora_gamma"] - share) <= 2.0**-7 * share):
        return f"randlora_gamma: init-other-gamma: it must be {share:.4g} everywhere, and is not"
    want = bases(method.projection_prng_key, method.r, letters["widest_small"], letters["widest_large"], 3.0 if method.sparse else None)
    for key, right in zip(("randlora_A", "randlora_B"), want, strict=True):
        if not np.all(np.abs(draw[key] - right) <= 2.0**-6 * np.abs(right)):
            return f"{key}: init-other-bases: not what torch draws from projection_prng_key={method.projection_prng_key}"
    return ""


SUITE = Suite(
    variants=VARIANTS,
    mistakes=(
        Mistake(
            name="orders-equal",
            clause="RANDLORA-C2",
            sentence="the columns of P are numbered like the rows of Q, so that rank k of basis b meets rank k of basis b, as in the paper",
            replay=other_delta(_orders_equal),
        ),
        Mistake(
            name="last-of-all",
            clause="RANDLORA-C5",
            sentence="a narrow layer is given the last numbers and bases of A and B instead of the first",
            replay=_changed(_last),
        ),
        Mistake(
            name="scale-is-alpha",
            clause="RANDLORA-C6",
            sentence="the scale is alpha instead of alpha / r",
            replay=with_scale(lambda alpha, r, rslora: alpha, "randlora_alpha"),
        ),
        Mistake(
            name="scale-is-one",
            clause="RANDLORA-C6",
            sentence="randlora_alpha is ignored: the product is added unscaled",
            replay=with_scale(lambda alpha, r, rslora: 1.0, "randlora_alpha"),
        ),
        Mistake(
            name="scale-rooted",
            clause="RANDLORA-C6",
            sentence="the scale is alpha / sqrt(r) instead of alpha / r",
            replay=with_scale(lambda alpha, r, rslora: alpha / math.sqrt(r), "randlora_alpha"),
        ),
        Mistake(
            name="lambda-ignored",
            clause="RANDLORA-C1",
            sentence="lambda is left out",
            replay=_changed(lambda layer, p: p._replace(lam=p.lam * 0 + 1.0)),
        ),
        Mistake(
            name="gamma-ignored",
            clause="RANDLORA-C1",
            sentence="gamma is left out",
            replay=_changed(lambda layer, p: p._replace(gamma=p.gamma * 0 + 1.0)),
        ),
        Mistake(
            name="first-basis-alone",
            clause="RANDLORA-C3",
            sentence="only the first basis acts: this is one product of rank r",
            replay=_changed(
                lambda layer, p: p._replace(
                    lam=namespace(p.lam).concat([p.lam[:, :1], p.lam[:, 1:] * 0], axis=1) if p.lam.shape[1] > 1 else p.lam * 1
                )
            ),
        ),
        Mistake(
            name="lambda-reread",
            clause="RANDLORA-C7",
            sentence="the numbers of randlora_lambda are read as (bases, r) instead of (r, bases)",
            replay=reread("randlora_lambda"),
        ),
        Mistake(
            name="gamma-reread",
            clause="RANDLORA-C7",
            sentence="the numbers of randlora_gamma are read as (small, bases) instead of (bases, small)",
            replay=reread("randlora_gamma"),
        ),
        Mistake(
            name="A-reread",
            clause="RANDLORA-C7",
            sentence="the numbers of randlora_A are read as (small, r) instead of (r, 1, small)",
            replay=as_if_tensors(_a_reread, lambda key, g, config: g),
        ),
        Mistake(
            name="grad-lambda-without-gamma",
            clause="RANDLORA-C11",
            sentence="the gradient of lambda lacks gamma",
            replay=_without("randlora_lambda", "randlora_gamma"),
        ),
        Mistake(
            name="grad-gamma-without-lambda",
            clause="RANDLORA-C12",
            sentence="the gradient of gamma lacks lambda",
            replay=_without("randlora_gamma", "randlora_lambda"),
        ),
        Mistake(
            name="grad-scale-missing",
            clause="RANDLORA-C11",
            sentence="the gradients lack the scale",
            replay=gradients_times(lambda config: config["r"] / config["randlora_alpha"]),
        ),
        only_first_adapter("RANDLORA-C8"),
        *merging("RANDLORA-C9", "RANDLORA-C10"),
        *dropout("RANDLORA-C17"),
    ),
    fresh=Fresh(
        clause="RANDLORA-C13",
        starts={
            "default": Start({"r": 2}, ("linear", "transposed_linear"), 1),
            "sparse": Start({**PLAIN, "sparse": True, "projection_prng_key": 7}, draws=1),
        },
        laws=laws,
        identity=as_drawn,
    ),
    files=Files(
        configs_clause="RANDLORA-C15",
        keys_clause="RANDLORA-C16",
        configs={
            "plain": {"r": 4, "randlora_alpha": 6, "save_projection": True},
            "default": {},
            "other": {"r": 8, "randlora_alpha": 4, "sparse": True},
        },
    ),
)
