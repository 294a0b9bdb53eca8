"""What ports get wrong about AdaLoRA's allocator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from peft_ref.check import training
from peft_ref.check.allocator import RIGHT, Allocator, Modules, Scores, average, kept_above, schedule, score, updated_at
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.mistake import Mistake, Replay
from peft_ref.check.oracle import float64
from peft_ref.check.penalty_mistakes import with_adapter_config
from peft_ref.methods.adalora import AdaLoRA, Params
from peft_ref.methods.adalora_allocator import State, after_step, last_allocation


def _other_score(triplet: Callable[[Params, Params, Params], NDArray]) -> Allocator:
    return replace(RIGHT, score=triplet)


def _summed(p: Params, S: Params, U: Params) -> NDArray:
    return np.asarray(S.E[:, 0] * U.E[:, 0] + np.sum(S.A * U.A, axis=1) + np.sum(S.B * U.B, axis=0))


def _old_average(method: AdaLoRA, S: NDArray, U: NDArray, now: NDArray) -> tuple[NDArray, NDArray]:
    return average(method.beta1, S, now), average(method.beta2, U, np.abs(now - S))


def _unsmoothed(method: AdaLoRA, S: NDArray, U: NDArray, now: NDArray) -> tuple[NDArray, NDArray]:
    new = average(method.beta1, S, now)
    return new, np.abs(now - new)


def _in_every_module(found: Scores, kept: int) -> dict[str, NDArray]:
    """The same share of the budget for every module."""
    return {name: kept_above({name: s}, kept // len(found))[name] for name, s in found.items()}


def _below_alone(found: Scores, kept: int) -> dict[str, NDArray]:
    """The largest score that goes stays."""
    every = np.sort(np.concatenate(list(found.values())))
    threshold = every[every.size - kept - 1] if kept < every.size else -math.inf
    return {name: s >= threshold for name, s in found.items()}


def _exactly(found: Scores, kept: int, order: int) -> dict[str, NDArray]:
    """As many as the budget: of equal scores the later ones stay, or with order -1 the earlier ones."""
    every = np.concatenate(list(found.values()))
    position = order * np.arange(every.size)
    stays = np.zeros(every.size, dtype=bool)
    stays[np.lexsort((position, every))[every.size - kept :]] = True
    return _split(found, stays)


def _split(found: Scores, stays: NDArray) -> dict[str, NDArray]:
    out, at = {}, 0
    for name, s in found.items():
        out[name], at = stays[at : at + s.size], at + s.size
    return out


def _whole_triplets(params: Modules, kept: Scores) -> dict[str, Params]:
    return {name: Params(p.A * kept[name][:, None], p.E * kept[name][:, None], p.B * kept[name]) for name, p in params.items()}


def _beat(method: AdaLoRA, step: int) -> bool:
    return step > method.tinit and step % method.deltaT == 0


def _renumbered(start: int) -> Replay:
    """The port counts the steps itself."""

    def replay(case: Case) -> Answer | None:
        if case.operation != "allocate" or (first := case.question["steps"][0]["step"]) == start:
            return None

        def counted(method: AdaLoRA, state: State, params: Modules, grads: Modules, step: int) -> tuple[State, dict[str, Params]]:
            return after_step(method, state, params, grads, step - first + start)

        return training.traced(case, float64, counted)

    return replay


def _configured(**other: Any) -> Replay:
    return with_adapter_config(lambda config: {**config, **other}, "allocate")


AVERAGES = (
    Mistake(
        name="sensitivity-signed",
        clause="ADALORA-C22",
        sentence="the product of parameter and gradient keeps its sign",
        replay=replace(RIGHT, importance=lambda p, g: p * g),
    ),
    Mistake(
        name="gradient-only",
        clause="ADALORA-C22",
        sentence="an entry's importance is the size of its gradient, without the parameter",
        replay=replace(RIGHT, importance=lambda p, g: np.abs(g)),
    ),
    Mistake(
        name="uncertainty-from-old-average",
        clause="ADALORA-C22",
        sentence="U is made with the S of the step before, so every score is divided by beta1 and no mask shows it",
        replay=replace(RIGHT, smoothed=_old_average),
    ),
    Mistake(
        name="uncertainty-not-averaged",
        clause="ADALORA-C22",
        sentence="U is |I - S| of the last step alone, and beta2 is not read",
        replay=replace(RIGHT, smoothed=_unsmoothed),
    ),
    Mistake(
        name="betas-swapped",
        clause="ADALORA-C22",
        sentence="beta1 smooths the uncertainty and beta2 the sensitivity",
        replay=with_adapter_config(lambda c: {**c, "beta1": c["beta2"], "beta2": c["beta1"]}, "allocate"),
    ),
    Mistake(
        name="betas-weigh-the-new",
        clause="ADALORA-C22",
        sentence="beta1 and beta2 are the weights of what is new instead of those of the averages",
        replay=with_adapter_config(lambda c: {**c, "beta1": 1 - c["beta1"], "beta2": 1 - c["beta2"]}, "allocate"),
    ),
    Mistake(
        name="averages-start-at-first",
        clause="ADALORA-C22",
        sentence="S starts at the first step's I instead of at zero",
        replay=replace(RIGHT, starts_at_first=True),
    ),
    Mistake(
        name="averages-only-when-allocating",
        clause="ADALORA-C22",
        sentence="S and U are kept up to date only at the steps at which ranks are allocated",
        replay=replace(RIGHT, updated_at=lambda method, step: updated_at(method, step) and _beat(method, step)),
    ),
    Mistake(
        name="averages-at-the-last-allocation",
        clause="ADALORA-C22",
        sentence="the step of the last allocation still goes into S and U",
        replay=replace(RIGHT, updated_at=lambda method, step: step <= last_allocation(method)),
    ),
)

SCORING = (
    Mistake(
        name="score-without-uncertainty",
        clause="ADALORA-C23",
        sentence="a score is S alone, without U",
        replay=_other_score(lambda p, S, U: score(p, S, Params(*map(np.ones_like, U)))),
    ),
    Mistake(
        name="score-of-E-alone",
        clause="ADALORA-C23",
        sentence="a triplet's score is that of its E, without A's row and B's column",
        replay=_other_score(lambda p, S, U: S.E[:, 0] * U.E[:, 0]),
    ),
    Mistake(
        name="score-without-E",
        clause="ADALORA-C23",
        sentence="a triplet's score is that of A's row and B's column, without its E",
        replay=_other_score(lambda p, S, U: np.mean(S.A * U.A, axis=1) + np.mean(S.B * U.B, axis=0)),
    ),
    Mistake(
        name="score-summed",
        clause="ADALORA-C23",
        sentence="the scores of A's row and of B's column are summed instead of averaged",
        replay=_other_score(_summed),
    ),
    Mistake(
        name="kept-by-size-of-E",
        clause="ADALORA-C23",
        sentence="the triplets with the largest |E| stay, and no score is read",
        replay=_other_score(lambda p, S, U: np.abs(p.E[:, 0])),
    ),
)

SCHEDULE = (
    Mistake(
        name="budget-linear",
        clause="ADALORA-C24",
        sentence="the budget falls in a line instead of with the third power",
        replay=replace(RIGHT, budget=lambda method, modules, step: schedule(method, modules, step, 1)),
    ),
    Mistake(
        name="budget-rounded-up",
        clause="ADALORA-C24",
        sentence="the budget is rounded up instead of down",
        replay=replace(RIGHT, rounded=math.ceil),
    ),
    Mistake(
        name="budget-rounded-to-nearest",
        clause="ADALORA-C24",
        sentence="the budget is rounded to the nearest integer instead of down",
        replay=replace(RIGHT, rounded=round),
    ),
    Mistake(
        name="tfinal-ignored",
        clause="ADALORA-C24",
        sentence="tfinal is not read: ranks are allocated until total_step",
        replay=_configured(tfinal=0),
    ),
    Mistake(
        name="warm-up-ignored",
        clause="ADALORA-C26",
        sentence="tinit is not read: ranks are allocated, and the budget falls, from the first step on",
        replay=_configured(tinit=0),
    ),
    Mistake(
        name="deltaT-ignored",
        clause="ADALORA-C26",
        sentence="deltaT is not read: ranks are allocated at every step",
        replay=_configured(deltaT=1),
    ),
    Mistake(
        name="last-allocation-missed",
        clause="ADALORA-C26",
        sentence="the last allocation is left out where deltaT does not divide its step",
        replay=replace(RIGHT, allocated_at=_beat),
    ),
    Mistake(
        name="steps-counted-from-one",
        clause="ADALORA-C26",
        sentence="the first step that is seen counts as step 1, whatever its number",
        replay=_renumbered(1),
    ),
    Mistake(
        name="steps-counted-from-zero",
        clause="ADALORA-C26",
        sentence="the first step that is seen counts as step 0, whatever its number",
        replay=_renumbered(0),
    ),
)

MASKING = (
    Mistake(
        name="threshold-in-every-module",
        clause="ADALORA-C25",
        sentence="every module has its own threshold, and an equal share of the budget (rounded down)",
        replay=replace(RIGHT, kept=_in_every_module),
    ),
    Mistake(
        name="threshold-stays",
        clause="ADALORA-C25",
        sentence="only what is below the threshold goes, so at least one triplet more than the budget stays",
        replay=replace(RIGHT, kept=_below_alone),
    ),
    Mistake(
        name="ties-kept",
        clause="ADALORA-C25",
        sentence="as many triplets stay as the budget says: of those that tie with the threshold the last ones",
        replay=replace(RIGHT, kept=lambda found, kept: _exactly(found, kept, 1)),
    ),
    Mistake(
        name="ties-kept-first",
        clause="ADALORA-C25",
        sentence="as many triplets stay as the budget says: of those that tie with the threshold the first ones",
        replay=replace(RIGHT, kept=lambda found, kept: _exactly(found, kept, -1)),
    ),
    Mistake(
        name="pruned-for-good",
        clause="ADALORA-C26",
        sentence="what one allocation pruned no later one keeps",
        replay=replace(RIGHT, for_good=True),
    ),
    Mistake(
        name="no-final-freeze",
        clause="ADALORA-C27",
        sentence="nothing ends at the last allocation: by its beat, ranks are allocated on and on, with the target as budget",
        replay=replace(RIGHT, updated_at=lambda method, step: True, allocated_at=_beat, freeze=None),
    ),
    Mistake(
        name="freeze-not-masked",
        clause="ADALORA-C27",
        sentence="after the last allocation E is left as the optimiser moved it",
        replay=replace(RIGHT, freeze=lambda params, kept: dict(params)),
    ),
    Mistake(
        name="A-and-B-masked",
        clause="ADALORA-C28",
        sentence="A's rows and B's columns are set to zero along with E",
        replay=replace(RIGHT, masked=_whole_triplets, freeze=_whole_triplets),
    ),
)

ALLOCATOR = (*AVERAGES, *SCORING, *SCHEDULE, *MASKING)
