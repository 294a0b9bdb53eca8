"""Which subspaces of AdaMSS stay trained: a state machine that is asked after every step of the optimiser (use_asa).

    I   = |p * g|                                   for every entry p of A_i and B_i, with its gradient g
    U   = beta_u U + (1 - beta_u) |I - S|           how far the importance varies; S is still the old one
    S   = beta_i S + (1 - beta_i) I                 the importance, smoothed
    score of subspace i  =  mean of S U over A_i  +  mean of S U over B_i

    target(t) = T + (all - T) (1 - (t - t0) / (t1 - t0))^e, rounded down;  T = asa_target_subspaces, t0 = init_warmup, t1 = final_warmup,
    e = asa_schedule_exponent, all = the number of subspaces of all modules together

    t0 <= t <= t1 alone counts: there S and U are kept up to date. Where t is a multiple of mask_interval, those of the subspaces still
    trained whose score is above the K-th largest, K = target(t), stay; all of them if they are no more than K. Then S and U start anew.
    What does not stay is frozen as it is, and stays frozen.

HF      AdamssModel.update_and_allocate(step), after optimizer.step() and before zero_grad(). Above the K-th largest there are only K - 1:
        `after_step` does as HF does, and with `whole` keeps the K-th too.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from peft_ref.arrays import Array, namespace
from peft_ref.methods.adamss import MOST, AdaMSS

Averages: TypeAlias = Mapping[str, Mapping[str, Array]]  # by module, then by the parameter's field: A0, B0, ...
NOTHING: Mapping[str, Any] = MappingProxyType({})


class State(NamedTuple):
    """What is remembered between steps. Everything is empty at first, and the averages are again after an allocation."""

    importance: Averages = NOTHING
    uncertainty: Averages = NOTHING
    frozen: Mapping[str, frozenset[int]] = NOTHING  # by module: the subspaces that are trained no longer


def after_step(
    method: AdaMSS, state: State, params: Mapping[str, Any], grads: Mapping[str, Any], step: int, *, whole: bool = False
) -> State:
    """The state after step `step`, given what the optimiser left and the gradients it used. The parameters stay as they are."""
    if not (method.use_asa and method.init_warmup <= step <= method.final_warmup):
        return state
    state = _averaged(method, state, params, grads)
    return state if step % method.mask_interval else State(frozen=_allocated(method, state, params, step, whole))


def target(method: AdaMSS, total: int, step: int) -> int:
    """How many of `total` subspaces may stay after step `step`, from init_warmup to final_warmup."""
    rest = 1.0 - (step - method.init_warmup) / (method.final_warmup - method.init_warmup)
    return int(method.asa_target_subspaces + (total - method.asa_target_subspaces) * rest**method.asa_schedule_exponent)


def subspaces(p: Any) -> list[int]:
    return [i for i in range(MOST) if getattr(p, f"A{i}") is not None]


def trained(state: State, params: Mapping[str, Any]) -> dict[str, list[int]]:
    """By module, the subspaces that an optimiser may move."""
    return {name: [i for i in subspaces(p) if i not in state.frozen.get(name, ())] for name, p in params.items()}


def scores(state: State) -> dict[tuple[str, int], Array]:
    """The score of every subspace that has one, by module and number."""
    found = {}
    for name, S in state.importance.items():
        for i in (int(field[1:]) for field in S if field.startswith("A")):
            parts = [S[f"{end}{i}"] * state.uncertainty[name][f"{end}{i}"] for end in "AB"]
            found[name, i] = sum(namespace(part).mean(part) for part in parts)
    return found


def _averaged(method: AdaMSS, state: State, params: Mapping[str, Any], grads: Mapping[str, Any]) -> State:
    importance, uncertainty = {}, {}
    for name, live in trained(state, params).items():
        S, U = dict(state.importance.get(name, {})), dict(state.uncertainty.get(name, {}))
        for field in (f"{end}{i}" for i in live for end in "AB"):
            p, g = getattr(params[name], field), getattr(grads[name], field)
            now, zero = namespace(p).abs(p * g), p * 0.0
            old = S.get(field, zero)
            U[field] = _average(method.asa_uncertainty_beta, U.get(field, zero), namespace(p).abs(now - old))
            S[field] = _average(method.asa_importance_beta, old, now)
        importance[name], uncertainty[name] = S, U
    return State(importance, uncertainty, state.frozen)


def _average(beta: float, old: Array, new: Array) -> Array:
    return beta * old + (1 - beta) * new


def _allocated(method: AdaMSS, state: State, params: Mapping[str, Any], step: int, whole: bool) -> dict[str, frozenset[int]]:
    """By module the subspaces that are frozen from now on."""
    found = {place: float(score) for place, score in scores(state).items()}
    kept = target(method, sum(len(subspaces(p)) for p in params.values()), step)
    going: list[tuple[str, int]] = []
    if kept < len(found):
        threshold = sorted(found.values(), reverse=True)[kept - 1]
        going = [place for place, score in found.items() if not (score > threshold or (whole and score >= threshold))]
    return {name: state.frozen.get(name, frozenset()) | {i for module, i in going if module == name} for name in params}
