"""Which triplets of AdaLoRA stay: a state machine that is asked after every step of the optimiser.

    I   = |p * g|                                   for every entry p of A, E and B, with its gradient g
    S   = beta1 S + (1 - beta1) I                   how much the loss depends on it: its sensitivity, smoothed
    U   = beta2 U + (1 - beta2) |I - S|             how far that varies; S is the new one
    score of triplet k  =  S U of E_k  +  mean of S U over row k of A  +  mean of S U over column k of B

    budget(t) = target + (init - target) (1 - (t - tinit) / (T - tinit))^3,   T = total_step - tfinal,   rounded down
    init and target are sums of ranks over all modules. The init - budget triplets of the smallest score are pruned, ties with them.

    t <= tinit          S and U are kept up to date, nothing is pruned
    tinit < t < T       the same, and every deltaT steps E is set to zero where it is pruned. It may grow again, and be kept next time
    t = T               the last allocation, down to the target, whatever deltaT
    t > T               the pattern is frozen, and E set to zero there after every step

Paper   Zhang et al. 2023, arXiv:2303.10512, eq. 7 to 12
HF      AdaLoraModel.update_and_allocate(step), after optimizer.step() and before zero_grad(): p has moved, g is of where it was.
        Where nothing is to be pruned (init_r == target_r) HF crashes, and here nothing is pruned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from peft_ref.arrays import Array, column, namespace, zeros_like
from peft_ref.errors import ConfigError, ShapeError
from peft_ref.methods.adalora import AdaLoRA, Params


class State(NamedTuple):
    """What is remembered between steps, by module. Everything is None at first."""

    sensitivity: Mapping[str, Params] | None = None
    uncertainty: Mapping[str, Params] | None = None
    kept: Mapping[str, Array] | None = None  # (r,) booleans: the last allocation


def after_step(
    method: AdaLoRA, state: State, params: Mapping[str, Params], grads: Mapping[str, Params], step: int
) -> tuple[State, dict[str, Params]]:
    """The state and the parameters after step `step` (from 0 or 1 on), given what the optimiser left and the gradients it used."""
    last = last_allocation(method)
    if step > last:
        if state.kept is None:
            raise ConfigError(f"step {step} comes after the last allocation, at step {last}, which never was.\n  Give every step once.")
        return state, masked(params, state.kept)
    if step < last:
        state = _averaged(method, state, params, grads)
        if step <= method.tinit or step % method.deltaT:
            return state, dict(params)
    if state.sensitivity is None:
        raise ConfigError(f"step {step} is the last allocation, and no step was before it.\n  Give every step once.")
    kept = _allocated(scores(state), pruned_at(method, params, step))
    averages = (None, None) if step == last else state[:2]
    return State(*averages, kept), masked(params, kept)


def last_allocation(method: AdaLoRA) -> int:
    assert method.total_step is not None  # refused when the method was made
    return method.total_step - method.tfinal


def budget(method: AdaLoRA, params: Mapping[str, Params], step: int) -> int:
    """How many triplets all modules together may have after step `step`."""
    init, target, last = all_ranks(params), method.target_r * len(params), last_allocation(method)
    spent = min(max(step - method.tinit, 0) / (last - method.tinit), 1)
    return int((init - target) * (1 - spent) ** 3 + target)


def pruned_at(method: AdaLoRA, params: Mapping[str, Params], step: int) -> int:
    return all_ranks(params) - budget(method, params, step)


def all_ranks(params: Mapping[str, Params]) -> int:
    return sum(int(p.A.shape[0]) for p in params.values())


def scores(state: State) -> dict[str, Array]:
    """The importance of every triplet (r,), by module."""
    assert state.sensitivity is not None
    assert state.uncertainty is not None
    found = {}
    for name, S in state.sensitivity.items():
        A, E, B = (s * u for s, u in zip(S, state.uncertainty[name], strict=True))
        xp = namespace(A)
        found[name] = E[:, 0] + (xp.mean(A, axis=1) + xp.mean(B, axis=0))
    return found


def masked(params: Mapping[str, Params], kept: Mapping[str, Array]) -> dict[str, Params]:
    """The parameters with E zero where a triplet is pruned."""

    def mask(p: Params, keep: Array) -> Params:
        return p._replace(E=namespace(p.E).where(column(keep), p.E, zeros_like(p.E.shape, p.E)))

    return {name: mask(p, kept[name]) for name, p in params.items()}


def rank_pattern(kept: Mapping[str, Array]) -> dict[str, list[bool]]:
    """An allocation as adapter_config.json has it."""
    return {f"{name}.lora_E": [bool(keep[k]) for k in range(keep.shape[0])] for name, keep in kept.items()}


def sliced(method: AdaLoRA, params: Params, kept: Sequence[bool]) -> tuple[AdaLoRA, Params]:
    """One module with its pruned triplets cut out, as a file holds it, and the method that says so."""
    if len(kept) != params.A.shape[0]:
        raise ShapeError(f"a rank pattern of {len(kept)} entries for an adapter of rank {params.A.shape[0]}: it needs one each.")
    xp, rows = namespace(params.A), [k for k, keep in enumerate(kept) if keep]

    def take(array: Array, axis: int) -> Array:
        parts = [array[k : k + 1, :] if axis == 0 else array[:, k : k + 1] for k in rows]
        empty = array[:0, :] if axis == 0 else array[:, :0]
        return xp.concat([empty, *parts], axis=axis)

    return replace(method, live_r=len(rows)), Params(take(params.A, 0), take(params.E, 0), take(params.B, 1))


def _averaged(method: AdaLoRA, state: State, params: Mapping[str, Params], grads: Mapping[str, Params]) -> State:
    sensitivity, uncertainty = {}, {}
    for name, p in params.items():
        xp = namespace(p.A)
        before = Params(*(zeros_like(v.shape, v) for v in p))
        old_S = before if state.sensitivity is None else state.sensitivity[name]
        old_U = before if state.uncertainty is None else state.uncertainty[name]
        now = Params(*(xp.abs(v * g) for v, g in zip(p, grads[name], strict=True)))
        S = Params(*(_average(method.beta1, old, new) for old, new in zip(old_S, now, strict=True)))
        gap = Params(*(xp.abs(new - s) for new, s in zip(now, S, strict=True)))
        sensitivity[name], uncertainty[name] = S, Params(*(_average(method.beta2, old, new) for old, new in zip(old_U, gap, strict=True)))
    return State(sensitivity, uncertainty, state.kept)


def _average(beta: float, old: Array, new: Array) -> Array:
    return beta * old + (1 - beta) * new


def _allocated(found: Mapping[str, Array], pruned: int) -> dict[str, Array]:
    """Which triplets stay when the `pruned` least important of all modules go, and whatever ties with the last of them."""
    if pruned <= 0:
        return {name: score == score for name, score in found.items()}  # true everywhere, on the scores' device
    xp = namespace(*found.values())
    threshold = xp.sort(xp.concat(list(found.values())))[pruned - 1]
    return {name: score > threshold for name, score in found.items()}
