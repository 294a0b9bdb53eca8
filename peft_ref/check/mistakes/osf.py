"""OSF: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check.asked import Config, Draw, Files, Fresh, Start
from peft_ref.check.case import Answer, Case
from peft_ref.check.distributions import Law, normal
from peft_ref.check.mistake import Formula, Mistake, Replay, Suite, first_adapter_alone, one_by_one, only, stored
from peft_ref.check.oracle import Problem, answer, pose
from peft_ref.check.shared_mistakes import input_gradient_missing, merging, other_delta
from peft_ref.check.tolerance import PRECISION
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer
from peft_ref.stack import Adapter

HALF: Config = {}
TWO: Config = {"effective_rank": 2}
SHARE: Config = {"effective_rank": 0.6}
KINDS = ("linear", "linear-blocks")  # tall and wide
SQUARE = "linear-square"

VARIANTS = (
    Variant(name="plain", clause="OSF-C1", configs=(HALF,), layers=KINDS),
    Variant(name="two", clause="OSF-C4", configs=(TWO,), layers=KINDS),
    Variant(name="share", clause="OSF-C4", configs=(SHARE,), layers=KINDS),
    Variant(name="square", clause="OSF-C10", configs=(TWO,), layers=(SQUARE,)),
    Variant(name="rounded", clause="OSF-C1", configs=(TWO,), numbers="rounded"),
    Variant(name="vector", clause="OSF-C1", configs=(HALF,), operations=RUN, rows=()),
    Variant(name="no-bias", clause="OSF-C1", configs=(HALF,), bias=False),
    Variant(name="two-adapters", clause="OSF-C6", configs=(TWO, {"effective_rank": 3})),
)

Part = Callable[[Any], Array]


def now(p: Any) -> Array:
    return (p.U * p.S) @ p.V


def start(p: Any) -> Array:
    return (p.U_0 * p.S_0) @ p.V_0


def delta(made: Part) -> Replay:
    """Another delta; the gradients of U and V are projected all the same."""
    wrong = other_delta(lambda layer, method, p, W0: made(p))

    def replay(case: Case) -> Answer | None:
        out = wrong(case)
        return out if out is None or case.operation != "backward" else projected(case, out)

    return replay


def projected(case: Case, out: Answer) -> Answer:
    """`out` with what OSF makes of the gradients of U and V."""
    p = pose(case)
    for i, a in enumerate(p.adapters):
        m: Any = a.method
        out = {
            **out,
            f"{i}.osf_svd_params.U_low": m._left(a.params, out[f"{i}.osf_svd_params.U_low"]),
            f"{i}.osf_svd_params.V_low": m._right(a.params, out[f"{i}.osf_svd_params.V_low"]),
        }
    return out


def gradients(left: Callable[[Any, Array], Array] | None = None, right: Callable[[Any, Array], Array] | None = None) -> Replay:
    """The derivative of U and of V, each with another projection; None leaves it as OSF's."""

    def backward(case: Case) -> Answer:
        p, out = pose(case), dict(answer(case))
        dW = p.layer.weight_vjp(p.x, p.dy)
        for i, a in enumerate(p.adapters):
            q = a.params
            if left is not None:
                out[f"{i}.osf_svd_params.U_low"] = left(q, (dW @ q.V.T) * q.S)
            if right is not None:
                out[f"{i}.osf_svd_params.V_low"] = right(q, (q.U * q.S).T @ dW)
        return out

    return only(backward=backward)


def _left_by_U_0(q: Any, d: Array) -> Array:
    return q.U_0 @ (q.U_0.T @ d)


def _right_by_V_0(q: Any, d: Array) -> Array:
    return (d @ q.V_0.T) @ q.V_0


def _away(kept: Array, d: Array) -> Array:
    """The part that is thrown away, in place of the one that is kept."""
    return kept @ (kept.T @ d)


def _left_thrown(q: Any, d: Array) -> Array:
    return d - _left_by_U_0(q, d) if q.U_high is None else _away(q.U_high, d)


def _right_thrown(q: Any, d: Array) -> Array:
    return d - _right_by_V_0(q, d) if q.V_high is None else _away(q.V_high.T, d.T).T


def _s_projected_too(case: Case) -> Answer:
    """S of the projected gradient, as if dS came after dU."""
    p, out = pose(case), dict(answer(case))
    for i, a in enumerate(p.adapters):
        m: Any = a.method
        dUS = p.layer.weight_vjp(p.x, p.dy) @ a.params.V.T
        out[f"{i}.osf_svd_params.S_low"] = (m._left(a.params, dUS) * a.params.U).sum(axis=0)
    return out


def _unscaled(case: Case) -> Answer:
    """dU without S."""
    p, out = pose(case), dict(answer(case))
    for i, a in enumerate(p.adapters):
        m: Any = a.method
        out[f"{i}.osf_svd_params.U_low"] = m._left(a.params, p.layer.weight_vjp(p.x, p.dy) @ a.params.V.T)
    return out


def _replacing(case: Case) -> Answer | None:
    """The forward pass of a port that takes W' for U diag(S) V alone."""

    def step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return now(a.params), b

    def unmerge(p: Problem) -> tuple[Array, Array | None]:
        return p.W, p.merged_b

    if len(case.adapters) > 1:
        return None
    out = Formula(weight=one_by_one(step), unmerge=unmerge)(case)
    return projected(case, out) if case.operation == "backward" and out is not None else out


def _not_unmerged(case: Case) -> Answer:
    p = pose(case)
    return stored(p.layer, p.merged_W, p.merged_b)


FIRST_ALONE = Mistake(
    name="only-first-adapter",
    clause="OSF-C6",
    sentence="in the forward pass the first of several active adapters acts alone, as in HF PEFT, which merges all of them",
    replay=only(forward=first_adapter_alone, backward=first_adapter_alone),
    dialect=True,
)


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    return {} if config["init_weights"] else {f"osf_svd_params.{name}_low": normal(1.0) for name in "USV"}


def small_part(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    """U_0 diag(S_0) V_0 is the part of W with its small singular values, whatever the signs; U, S and V start there."""
    assert case.weight is not None
    U, S, V = np.linalg.svd(layer.fold(case.weight), full_matrices=False)
    k = len(S) - draw["_osf_S_low_init"].shape[0]
    u = (len(S) + 4) * 2.0 ** -PRECISION[dtype]  # every factor is rounded once

    def off(made: tuple[Array, Array], want: Array) -> bool:
        """Whether a product of two differs by more than rounding; HF works the factors out in float32."""
        left, right = made
        allowed = u * (np.abs(left) @ np.abs(right)) + 400 * 2.0**-24 * max(1.0, S[0])
        return bool(np.any(np.abs(left @ right - want) > allowed))

    low = (U[:, k:] * S[k:]) @ V[k:]
    frozen = draw["_osf_U_low_init"] * draw["_osf_S_low_init"], draw["_osf_V_low_init"]
    if off(frozen, low):
        return "init-wrong-part: the frozen low part must be what the small singular values make of the weight"
    started = draw["osf_svd_params.U_low"] * draw["osf_svd_params.S_low"], draw["osf_svd_params.V_low"]
    if case.adapters[0].config["init_weights"] and off(started, low):
        return "init-not-identity: what is trained must start as the frozen low part"
    high = draw.get("_osf_U_high")
    if high is not None and off((high, high.T), U[:, :k] @ U[:, :k].T):
        return "init-wrong-subspace: _osf_U_high must span the large left singular vectors"
    high = draw.get("_osf_V_high")
    if high is not None and off((high.T, high), V[:k].T @ V[:k]):
        return "init-wrong-subspace: _osf_V_high must span the large right singular vectors"
    return ""


FRESH = Fresh(
    clause="OSF-C14",
    starts={
        "default": Start(TWO, (*KINDS, SQUARE), 1),
        "false": Start({"effective_rank": 2, "init_weights": False}),
    },
    laws=laws,
    identity=small_part,
)
FILES = Files(
    configs_clause="OSF-C16",
    keys_clause="OSF-C17",
    configs={
        "plain": {"effective_rank": 2},
        "rank-pattern": {"effective_rank": 2, "rank_pattern": {"v_proj": 3, r"layers\.1\.": 5}},
    },
    told={"effective_rank": "effective_rank"},
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="start-not-subtracted",
            clause="OSF-C2",
            sentence="U diag(S) V is added to the whole frozen weight, whose low part is still in it",
            replay=delta(now),
        ),
        Mistake(
            name="high-part-missing",
            clause="OSF-C2",
            sentence="U diag(S) V stands for the whole weight: the high part is missing",
            replay=_replacing,
        ),
        Mistake(
            name="singular-values-ignored",
            clause="OSF-C1",
            sentence="the trained singular values are not read: the frozen ones are used",
            replay=delta(lambda p: (p.U * p.S_0 + 0.0 * p.S) @ p.V - start(p)),
        ),
        Mistake(
            name="singular-values-squared",
            clause="OSF-C1",
            sentence="the singular values are multiplied into U and into V, so they count twice",
            replay=delta(lambda p: (p.U * p.S) @ (p.S.reshape(-1, 1) * p.V) - start(p)),
        ),
        Mistake(
            name="gradient-not-projected",
            clause="OSF-C8",
            sentence="the gradients of U and V are the derivatives: nothing is projected",
            replay=gradients(lambda q, d: d, lambda q, d: d),
        ),
        Mistake(
            name="left-not-projected",
            clause="OSF-C8",
            sentence="the gradient of U is the derivative, that of V is projected",
            replay=gradients(left=lambda q, d: d),
        ),
        Mistake(
            name="right-not-projected",
            clause="OSF-C9",
            sentence="the gradient of V is the derivative, that of U is projected",
            replay=gradients(right=lambda q, d: d),
        ),
        Mistake(
            name="projected-onto-low",
            clause="OSF-C10",
            sentence="the gradients are always projected onto U_0 and V_0, also where these do not fill the complement of the high part",
            replay=gradients(_left_by_U_0, _right_by_V_0),
        ),
        Mistake(
            name="projected-onto-high",
            clause="OSF-C8",
            sentence="the gradients are projected onto the high subspace instead of away from it",
            replay=gradients(_left_thrown, _right_thrown),
        ),
        Mistake(
            name="singular-values-projected",
            clause="OSF-C7",
            sentence="the gradient of S is that of a projected gradient of U",
            replay=only(backward=_s_projected_too),
        ),
        Mistake(
            name="grad-singular-values-missing",
            clause="OSF-C8",
            sentence="the gradient of U lacks the singular values",
            replay=only(backward=_unscaled),
        ),
        FIRST_ALONE,
        *merging("OSF-C12", "OSF-C13"),
        Mistake(
            name="unmerge-does-nothing",
            clause="OSF-C13",
            sentence="unmerge leaves the weight merged, as HF PEFT does, which only warns",
            replay=only(unmerge=_not_unmerged),
            dialect=True,
        ),
        input_gradient_missing("OSF-C11"),
    ),
)
