"""SHiRA: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray, build_method
from peft_ref.check.distributions import Law, constant, normal
from peft_ref.check.mistake import (
    AsIf,
    Formula,
    Mistake,
    Suite,
    merged_twice,
    one_by_one,
    only,
    stored,
    unmerge_that_merges,
    unmerge_the_frozen,
)
from peft_ref.check.oracle import Problem, answer, null_answer, pose
from peft_ref.check.shared_mistakes import only_first_adapter
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer
from peft_ref.methods.shira import SHiRA
from peft_ref.methods.torch_draws import UNSEEDED, randperm
from peft_ref.stack import Adapter

Change: TypeAlias = Callable[[Layer, Adapter, Array], Array]  # of W, by one adapter
PLAIN = {"r": 2, "random_seed": 7}

VARIANTS = (
    Variant(name="plain", clause="SHIRA-C1", configs=(PLAIN,)),
    Variant(name="small", clause="SHIRA-C1", configs=(PLAIN,), numbers="small"),
    Variant(name="rounded", clause="SHIRA-C2", configs=({"r": 4, "random_seed": 7},), layers=("linear-large",), numbers="rounded"),
    Variant(name="vector", clause="SHIRA-C4", configs=(PLAIN,), operations=RUN, rows=()),
    Variant(name="no-bias", clause="SHIRA-C3", configs=(PLAIN,), bias=False),
    Variant(name="two-adapters", clause="SHIRA-C9", configs=({"r": 4, "random_seed": 7}, {"r": 2}), layers=("linear-large",)),
)


def placed(layer: Layer, values: Array, at: Array, into: Array | None = None) -> Array:
    """The values at their places in zeros, or in place of what is there."""
    out = np.zeros(layer.shape, dtype=values.dtype) if into is None else into.copy()
    out[at[0], at[1]] = values
    return out


def right(layer: Layer, a: Adapter) -> Array:
    return placed(layer, a.params.w, a.params.indices)


def by_columns(layer: Layer, a: Adapter) -> Array:
    """The place of row and column is counted down the columns, and read along the rows."""
    rows, columns = a.params.indices
    return placed(layer, a.params.w, np.divmod(columns * layer.shape[0] + rows, layer.shape[1]))


def as_drawn(layer: Layer, a: Adapter) -> Array:
    """The values in the order in which the places of the configuration's seed would be drawn, not in theirs."""
    seed = a.method.random_seed if isinstance(a.method, SHiRA) and a.method.random_seed is not None else 0
    order = np.argsort(np.argsort(randperm(layer.shape[0] * layer.shape[1], seed, a.params.w.shape[0])))
    return placed(layer, a.params.w[order], a.params.indices)


def changed(change: Change, unmerged: Change | None = None) -> Callable[[Case], Answer | None]:
    """What comes of W by a wrong step of each adapter."""

    def step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return change(layer, a, W), b

    def unmerge(p: Problem) -> tuple[Array, Array | None]:
        assert unmerged is not None
        W = p.merged_W
        for a in reversed(p.adapters):
            W = unmerged(p.layer, a, W)
        return W, p.merged_b

    return Formula(weight=one_by_one(step), unmerge=None if unmerged is None else unmerge)


def added(delta: Callable[[Layer, Adapter], Array]) -> Callable[[Case], Answer | None]:
    formula = changed(lambda layer, a, W: W + delta(layer, a), lambda layer, a, W: W - delta(layer, a))

    def replay(case: Case) -> Answer | None:
        if case.operation != "delta":
            return formula(case)
        p = pose(case)
        return stored(p.layer, delta(p.layer, p.adapters[0]), None)

    return replay


def drawn_again(case: Case) -> Case | None:
    """The places that the configuration's seed gives in the place of those that were saved."""
    assert case.layer is not None
    layer = case.layer
    adapters = (replace(a, tensors={**a.tensors, **build_method("shira", a.config).untrained(layer)}) for a in case.adapters)
    return replace(case, adapters=tuple(adapters))


def last_wins(p: Problem) -> tuple[Array, Array | None]:
    D = np.zeros(p.layer.shape)
    for a in p.adapters:
        D = placed(p.layer, a.params.w, a.params.indices, into=D.astype(object) if a.params.w.dtype == object else D)
    return p.W + D, p.b


def overwritten(case: Case) -> Answer | None:
    return Formula(weight=last_wins)(case) if len(case.adapters) > 1 and case.operation != "unmerge" else None


def gradient_at_transposed_places(case: Case) -> Answer | None:
    """dw[k] read from G as if it lay column by column."""
    p = pose(case)
    G = p.layer.weight_vjp(p.x, p.dy).T.reshape(-1)
    wrong = {f"{i}.shira_weight": G[a.params.indices[0] * p.layer.shape[1] + a.params.indices[1]] for i, a in enumerate(p.adapters)}
    return {**answer(case), **wrong}


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    w = constant(0.0, "init-not-identity") if config["init_weights"] else normal(1.0)
    return {"shira_weight": w, "shira_indices": first_of_permutation(layer, config)}


def first_of_permutation(layer: Layer, config: Config) -> Law:
    """The first r (in + out) of torch's random permutation of all places, sorted: the one thing that is drawn and known to the bit."""
    out, n_in = layer.shape
    seed = UNSEEDED if config["random_seed"] is None else config["random_seed"]
    want = np.stack(np.divmod(np.sort(randperm(out * n_in, seed, config["r"] * (n_in + out))), n_in))

    def problem(draws: NDArray, dtype: str) -> str:
        if np.all(draws == want):
            return ""
        return "init-other-places: they must be the first of torch's randperm of the weight's entries for this seed, sorted row by row"

    return Law("torch's permutation", problem)


FRESH = Fresh(
    clause="SHIRA-C15",
    starts={"default": Start({"r": 2}), "false": Start({"r": 4, "random_seed": 7, "init_weights": False}, ("linear-large",))},
    laws=laws,
)
FILES = Files(configs_clause="SHIRA-C17", keys_clause="SHIRA-C19", configs={"plain": {"r": 1}, "rank-missing": {}}, told={"r": "r"})


SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="shira-ignored",
            clause="SHIRA-C1",
            sentence="the adapter is not there at all: this is the frozen layer",
            replay=null_answer,
        ),
        Mistake(
            name="shira-replaces",
            clause="SHIRA-C1",
            sentence="the weight's entries are replaced by shira_weight instead of having it added",
            replay=changed(lambda layer, a, W: placed(layer, a.params.w, a.params.indices, into=W)),
        ),
        Mistake(
            name="shira-scale-one-over-r",
            clause="SHIRA-C2",
            sentence="shira_weight is divided by r, as LoRA's product would be with alpha = 1",
            replay=added(lambda layer, a: right(layer, a) / a.method.r if isinstance(a.method, SHiRA) else a.params.w),
        ),
        Mistake(
            name="shira-scale-alpha",
            clause="SHIRA-C2",
            sentence="shira_weight is multiplied by a scale of 8 / r, LoRA's default",
            replay=added(lambda layer, a: right(layer, a) * (8 / a.method.r) if isinstance(a.method, SHiRA) else a.params.w),
        ),
        Mistake(
            name="shira-column-major",
            clause="SHIRA-C5",
            sentence="the places are counted down the columns instead of along the rows: shira_indices holds rows first, then columns",
            replay=added(by_columns),
        ),
        Mistake(
            name="shira-order-of-draws",
            clause="SHIRA-C6",
            sentence="the numbers are taken in the order in which the places are drawn, not in that of shira_indices",
            replay=added(as_drawn),
        ),
        Mistake(
            name="shira-places-drawn-again",
            clause="SHIRA-C7",
            sentence="shira_indices is not read: the places are drawn again from random_seed",
            replay=AsIf(drawn_again),
        ),
        only_first_adapter("SHIRA-C9"),
        Mistake(
            name="shira-last-wins",
            clause="SHIRA-C9",
            sentence="where two adapters share a place only the last one's number is added",
            replay=overwritten,
        ),
        Mistake(
            name="double-merge",
            clause="SHIRA-C11",
            sentence="the adapter is merged twice",
            replay=only(merge=merged_twice),
        ),
        Mistake(
            name="unmerge-adds",
            clause="SHIRA-C12",
            sentence="unmerge adds the numbers again instead of taking them out",
            replay=only(unmerge=unmerge_that_merges),
        ),
        Mistake(
            name="unmerge-from-frozen",
            clause="SHIRA-C12",
            sentence="unmerge starts from the frozen weight instead of the merged one it is given",
            replay=only(unmerge=unmerge_the_frozen),
        ),
        Mistake(
            name="shira-gradient-transposed",
            clause="SHIRA-C13",
            sentence="the gradient of shira_weight is read from the weight's gradient column by column",
            replay=only(backward=gradient_at_transposed_places),
        ),
    ),
)
