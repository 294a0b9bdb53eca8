"""TinyLoRA: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from peft_ref.arrays import Array, namespace
from peft_ref.check.asked import Config, Draw, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray, build_method
from peft_ref.check.distributions import Law, constant, uniform
from peft_ref.check.mistake import Mistake, Replay, Suite, as_if, as_if_tensors, only, reread
from peft_ref.check.oracle import answer, pose
from peft_ref.check.shared_mistakes import dropout, input_gradient_missing, merging, only_first_adapter, other_delta
from peft_ref.check.tolerance import PRECISION
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer
from peft_ref.methods.tinylora import mixed, projections

PLAIN = {"r": 2, "u": 3}
LARGE = {"r": 4, "u": 6}

VARIANTS = (
    Variant(name="plain", clause="TINYLORA-C1", configs=(PLAIN,), layers=("linear", "transposed_linear", "embedding")),
    Variant(name="small", clause="TINYLORA-C1", configs=(PLAIN,), layers=("linear", "embedding"), numbers="small"),
    Variant(name="capped", clause="TINYLORA-C3", configs=({"r": 9, "u": 4},)),
    Variant(name="rounded", clause="TINYLORA-C1", configs=(LARGE,), layers=("linear-large",), numbers="rounded"),
    Variant(name="vector", clause="TINYLORA-C1", configs=(PLAIN,), operations=RUN, rows=()),
    Variant(name="no-bias", clause="TINYLORA-C4", configs=(PLAIN,), bias=False),
    Variant(name="dropout", clause="TINYLORA-C20", configs=({**PLAIN, "tinylora_dropout": 0.75},), dropout=0.75, operations=RUN),
    Variant(name="two-adapters", clause="TINYLORA-C9", configs=(PLAIN, {**PLAIN, "r": 3, "u": 4})),
)


def stored(layer: Layer, W: Array) -> Array:
    return namespace(W).matrix_transpose(W) if layer.kind == "embedding" else W


def _mixing(R: Callable[[Layer, Any, Array], Array | None]) -> Replay:
    """Another R, given layer, parameters and the right one; None where it is the right one."""

    def delta(layer: Layer, method: Any, p: Any, W0: Array) -> Array | None:
        wrong = R(layer, p, mixed(p.v, p.P))
        return None if wrong is None else stored(layer, p.B @ wrong @ p.A)

    return other_delta(delta)


def _turned(layer: Layer, p: Any, R: Array) -> Array:
    return namespace(R).matrix_transpose(R)


def _drawn_again(key: str, v: NDArray, config: Mapping[str, Any]) -> NDArray:
    return projections(config["projection_seed"], *v.shape[:2]).astype(np.float64) if key == "tinylora_P" else v


def _reread_P(key: str, v: NDArray, config: Mapping[str, Any]) -> NDArray:
    return v.reshape(v.shape[::-1]).transpose(2, 1, 0) if key == "tinylora_P" else v


def _same(key: str, g: NDArray, config: Mapping[str, Any]) -> NDArray:
    return g


def _worked_out(case: Case) -> Case:
    """A and B of the frozen weight instead of the file's."""
    assert case.weight is not None
    assert case.layer is not None
    adapters = []
    for a in case.adapters:
        method: Any = build_method(case.method, a.config)
        W = case.layer.fold(case.weight)
        made = method.start(case.layer, W, np.random.default_rng(0), method.to_params(v=a.tensors["tinylora_v"])).params
        adapters.append(replace(a, tensors={**a.tensors, "tinylora_A": made.A, "tinylora_B": made.B}))
    return replace(case, adapters=tuple(adapters))


def _gradient(dv: Callable[[Any, NDArray], NDArray]) -> Replay:
    """Another gradient of v, given the parameters and dR, where one adapter has no dropout."""

    def backward(case: Case) -> Answer | None:
        if len(case.adapters) != 1 or case.adapters[0].dropout:
            return None
        p = pose(case)
        params, G = p.adapters[0].params, stored(p.layer, p.layer.weight_vjp(p.x, p.dy))
        return {**answer(case), "0.tinylora_v": dv(params, params.B.T @ G @ params.A.T)}

    return only(backward=backward)


def laws(config: Config, layer: Layer) -> Mapping[str, Law]:
    drawn = config.get("init_weights") == "uniform"
    law = uniform(config["init_v_bound"], "init-nothing-to-train") if drawn else constant(0.0, "init-not-identity")
    return {"tinylora_v": law}


def as_made(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    """P as torch draws it; A and B the halves of the best part of the weight, whatever the signs."""
    assert case.weight is not None
    method: Any = build_method("tinylora", case.adapters[0].config)
    r, A, B = method.dims(layer)["r"], draw["tinylora_A"], draw["tinylora_B"]
    P = projections(method.projection_seed, method.u, r)
    if not np.all(np.abs(draw["tinylora_P"] - P) <= 2.0 ** -min(PRECISION[dtype], 21) * np.max(np.abs(P))):
        return f"tinylora_P: init-other-projections: not what torch draws from projection_seed={method.projection_seed}"
    U, S, V = np.linalg.svd(stored(layer, layer.fold(case.weight)), full_matrices=False)
    near = (r + 4) * 2.0 ** -PRECISION[dtype]  # the factors are rounded once; HF works them out in float32
    if np.any(np.abs(B @ A - (U[:, :r] * S[:r]) @ V[:r]) > near * (np.abs(B) @ np.abs(A)) + 400 * 2.0**-24 * S[0]):
        return "init-wrong-part: B A must be the part of the weight with its largest singular values"
    for name, found, size in (("A A^T", A @ A.T, np.abs(A) @ np.abs(A.T)), ("B^T B", B.T @ B, np.abs(B.T) @ np.abs(B))):
        if np.any(np.abs(found - np.diag(S[:r])) > near * size + 400 * 2.0**-24 * S[0]):
            return f"init-wrong-halves: {name} is not the diagonal of the singular values, whose roots both factors share"
    return ""


SUITE = Suite(
    variants=VARIANTS,
    mistakes=(
        Mistake(
            name="R-transposed",
            clause="TINYLORA-C1",
            sentence="R is transposed: x A^T R instead of x A^T R^T",
            replay=_mixing(_turned),
        ),
        Mistake(
            name="table-turned",
            clause="TINYLORA-C2",
            sentence="on an embedding R is applied as on a linear layer, transposed in the table",
            replay=_mixing(lambda layer, p, R: _turned(layer, p, R) if layer.kind == "embedding" else None),
        ),
        Mistake(
            name="v-ignored",
            clause="TINYLORA-C1",
            sentence="R is the sum of the random matrices, each once: v is left out",
            replay=_mixing(lambda layer, p, R: mixed(p.v * 0 + 1.0, p.P)),
        ),
        Mistake(
            name="first-matrix-alone",
            clause="TINYLORA-C1",
            sentence="R is v_1 P_1: the other random matrices are left out",
            replay=_mixing(lambda layer, p, R: mixed(p.v[:1], p.P[:1, :, :])),
        ),
        Mistake(
            name="R-diagonal",
            clause="TINYLORA-C1",
            sentence="only the diagonal of R counts, as if it scaled singular values",
            replay=_mixing(lambda layer, p, R: R * np.eye(R.shape[0])),
        ),
        Mistake(
            name="R-plus-identity",
            clause="TINYLORA-C1",
            sentence="B (I + R) A is added, with what B A already stands for in the frozen weight",
            replay=_mixing(lambda layer, p, R: R + np.eye(R.shape[0])),
        ),
        Mistake(
            name="mean-of-matrices",
            clause="TINYLORA-C4",
            sentence="R is the mean over the u random matrices instead of their sum",
            replay=_mixing(lambda layer, p, R: R / p.v.shape[0]),
        ),
        Mistake(
            name="scale-is-one-over-r",
            clause="TINYLORA-C4",
            sentence="the product is divided by r, as LoRA's is",
            replay=_mixing(lambda layer, p, R: R / R.shape[0]),
        ),
        Mistake(
            name="A-reread",
            clause="TINYLORA-C5",
            sentence="the numbers of tinylora_A are read in the order of its transpose",
            replay=reread("tinylora_A"),
        ),
        Mistake(
            name="B-reread",
            clause="TINYLORA-C5",
            sentence="the numbers of tinylora_B are read in the order of its transpose",
            replay=reread("tinylora_B"),
        ),
        Mistake(
            name="P-reread",
            clause="TINYLORA-C5",
            sentence="the numbers of tinylora_P are read as (r, r, u)",
            replay=as_if_tensors(_reread_P, _same),
        ),
        Mistake(
            name="drawn-again",
            clause="TINYLORA-C6",
            sentence="P is drawn from the seed although the file holds it",
            replay=as_if_tensors(_drawn_again, _same),
        ),
        Mistake(
            name="worked-out-again",
            clause="TINYLORA-C6",
            sentence="A and B are worked out of the frozen weight although the file holds them, and with them the signs",
            replay=as_if(_worked_out),
        ),
        Mistake(
            name="gradient-transposed",
            clause="TINYLORA-C12",
            sentence="the gradient of v_k sums P_k * dR^T",
            replay=_gradient(lambda p, dR: np.asarray([np.sum(P * dR.T) for P in p.P])),
        ),
        Mistake(
            name="gradient-of-the-diagonal",
            clause="TINYLORA-C12",
            sentence="the gradient of v_k sums the diagonal of P_k * dR alone",
            replay=_gradient(lambda p, dR: np.asarray([np.sum(np.diag(P * dR)) for P in p.P])),
        ),
        input_gradient_missing("TINYLORA-C13"),
        only_first_adapter("TINYLORA-C9"),
        *merging("TINYLORA-C10", "TINYLORA-C11"),
        *dropout("TINYLORA-C20"),
    ),
    fresh=Fresh(
        clause="TINYLORA-C14",
        starts={
            "default": Start({**PLAIN}, ("linear", "transposed_linear", "embedding"), 1),
            "other-seed": Start({"r": 3, "u": 7, "projection_seed": 5}, draws=1),
            "capped": Start({"r": 9, "u": 2}, draws=1),
            "uniform": Start({**LARGE, "init_weights": "uniform", "init_v_bound": 0.25}),
        },
        laws=laws,
        identity=as_made,
    ),
    files=Files(
        configs_clause="TINYLORA-C17",
        keys_clause="TINYLORA-C18",
        configs={
            "plain": {**PLAIN},
            "default": {},
            "tied": {"r": 2, "u": 5, "weight_tying": 1.0, "projection_seed": 7},
            "seeded": {"r": 2, "u": 5, "save_projection": False},
        },
        told={"r": "r", "u": "u"},
    ),
)
