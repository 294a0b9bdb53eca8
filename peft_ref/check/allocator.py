"""AdaLoRA's allocator in parts, each of which a mistake replaces.

`RIGHT` is the right one, in plain NumPy. A test holds it to the method's own, so that a mistake is wrong in the part that it replaces
and in nothing else. No right answer comes from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np

from peft_ref.check import training
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.oracle import float64
from peft_ref.methods.adalora import AdaLoRA, Params
from peft_ref.methods.adalora_allocator import State, last_allocation, masked

Modules: TypeAlias = Mapping[str, Params]
Scores: TypeAlias = Mapping[str, NDArray]


# ---- the right parts


def importance(p: NDArray, g: NDArray) -> NDArray:
    return np.asarray(np.abs(p * g))


def smoothed(method: AdaLoRA, S: NDArray, U: NDArray, now: NDArray) -> tuple[NDArray, NDArray]:
    new = average(method.beta1, S, now)
    return new, average(method.beta2, U, np.abs(now - new))


def score(p: Params, S: Params, U: Params) -> NDArray:
    return np.asarray(S.E[:, 0] * U.E[:, 0] + np.mean(S.A * U.A, axis=1) + np.mean(S.B * U.B, axis=0))


def updated_at(method: AdaLoRA, step: int) -> bool:
    return step < last_allocation(method)


def allocated_at(method: AdaLoRA, step: int) -> bool:
    return step == last_allocation(method) or (step > method.tinit and step % method.deltaT == 0)


def budget(method: AdaLoRA, modules: int, step: int) -> float:
    """Before it is rounded."""
    return schedule(method, modules, step, 3)


def kept_above(found: Scores, kept: int) -> dict[str, NDArray]:
    """Whatever is above the largest score that goes."""
    every = np.sort(np.concatenate(list(found.values())))
    threshold = every[every.size - kept - 1] if kept < every.size else -math.inf
    return {name: s > threshold for name, s in found.items()}


def average(beta: float, old: NDArray, new: NDArray) -> NDArray:
    return np.asarray(beta * old + (1 - beta) * new)


def schedule(method: AdaLoRA, modules: int, step: int, power: int) -> float:
    init, target, last = method.init_r * modules, method.target_r * modules, last_allocation(method)
    if step <= method.tinit or step > last:
        return init if step <= method.tinit else target
    return float((init - target) * (1 - (step - method.tinit) / (last - method.tinit)) ** power + target)


@final
@dataclass(frozen=True, kw_only=True)
class Allocator:
    """The parts of a step, in the order in which they act. `freeze` is None where nothing ends at the last allocation."""

    updated_at: Callable[[AdaLoRA, int], bool] = updated_at
    importance: Callable[[NDArray, NDArray], NDArray] = importance
    smoothed: Callable[[AdaLoRA, NDArray, NDArray, NDArray], tuple[NDArray, NDArray]] = smoothed
    starts_at_first: bool = False
    allocated_at: Callable[[AdaLoRA, int], bool] = allocated_at
    score: Callable[[Params, Params, Params], NDArray] = score
    budget: Callable[[AdaLoRA, int, int], float] = budget
    rounded: Callable[[float], int] = int
    kept: Callable[[Scores, int], dict[str, NDArray]] = kept_above
    for_good: bool = False
    masked: Callable[[Modules, Scores], dict[str, Params]] = masked
    freeze: Callable[[Modules, Scores], dict[str, Params]] | None = masked

    def __call__(self, case: Case) -> Answer | None:
        return training.traced(case, float64, self.after_step) if case.operation == "allocate" else None

    def after_step(self, method: AdaLoRA, state: State, params: Modules, grads: Modules, step: int) -> tuple[State, dict[str, Params]]:
        if step > last_allocation(method) and self.freeze is not None and state.kept is not None:
            return state, self.freeze(params, state.kept)
        S, U = self._averages(method, state, params, grads, step)
        if not self.allocated_at(method, step):
            return State(S, U, state.kept), dict(params)
        found = {name: self.score(p, S[name], U[name]) for name, p in params.items()}
        kept = self.kept(found, self.rounded(self.budget(method, len(params), step)))
        if self.for_good and state.kept is not None:
            kept = {name: keep & state.kept[name] for name, keep in kept.items()}
        return State(S, U, kept), self.masked(params, kept)

    def _averages(self, method: AdaLoRA, state: State, params: Modules, grads: Modules, step: int) -> tuple[Modules, Modules]:
        nothing = {name: Params(*map(np.zeros_like, p)) for name, p in params.items()}
        old_S, old_U = (nothing if old is None else old for old in (state.sensitivity, state.uncertainty))
        if not self.updated_at(method, step):
            return old_S, old_U
        S, U = {}, {}
        for name, p in params.items():
            now = [self.importance(v, g) for v, g in zip(p, grads[name], strict=True)]
            start = now if self.starts_at_first and state.sensitivity is None else old_S[name]
            new = [self.smoothed(method, *entry) for entry in zip(start, old_U[name], now, strict=True)]
            S[name], U[name] = Params(*(s for s, _ in new)), Params(*(u for _, u in new))
        return S, U


RIGHT = Allocator()
