"""Super-Tuning: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check.asked import Config, Draw, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, build_method
from peft_ref.check.distributions import Law, constant, normal, uniform
from peft_ref.check.mistake import (
    AsIf,
    Formula,
    Mistake,
    Replay,
    Suite,
    gradients_times,
    merged_twice,
    one_by_one,
    only,
    stored,
    unmerge_that_merges,
    unmerge_the_frozen,
)
from peft_ref.check.oracle import Problem, null_answer, pose
from peft_ref.check.shared_mistakes import dropout, only_first_adapter
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer
from peft_ref.methods.supertuning import SuperTuning
from peft_ref.stack import Adapter

SUPER, SUPRA = {"sparsity": 0.6}, {"sparsity": 0.6, "r": 4, "lora_alpha": 6}
LARGE = {"sparsity": 0.7, "r": 9, "lora_alpha": 15}

VARIANTS = (
    Variant(name="plain", clause="SUPERTUNING-C1", configs=(SUPER,)),
    Variant(name="supra", clause="SUPERTUNING-C3", configs=(SUPRA,)),
    Variant(name="alpha-missing", clause="SUPERTUNING-C3", configs=({"sparsity": 0.6, "r": 9},), layers=("linear-large",)),
    Variant(name="small", clause="SUPERTUNING-C1", configs=(SUPRA,), numbers="small"),
    Variant(name="rounded", clause="SUPERTUNING-C3", configs=(LARGE,), layers=("linear-large",), numbers="rounded"),
    Variant(name="vector", clause="SUPERTUNING-C1", configs=(SUPRA,), operations=RUN, rows=()),
    Variant(name="no-bias", clause="SUPERTUNING-C1", configs=(SUPRA,), bias=False),
    Variant(name="dropout", clause="SUPERTUNING-C8", configs=({**SUPRA, "lora_dropout": 0.75},), operations=RUN, dropout=0.75),
    Variant(name="two-adapters", clause="SUPERTUNING-C7", configs=(SUPRA, {"sparsity": 0.5, "select_top": False})),
)


def sparse(layer: Layer, a: Adapter, transposed: bool = False) -> Array:
    v, n = a.params.v, math.prod(layer.shape)
    flat = np.zeros(n, dtype=v.dtype)
    flat[a.params.indices] = v
    return flat.reshape(layer.shape[::-1]).T if transposed else flat.reshape(layer.shape)


def low_rank(layer: Layer, a: Adapter) -> Array:
    return np.zeros(layer.shape) if a.params.A is None else a.params.B @ a.params.A


def scale(a: Adapter) -> float:
    assert isinstance(a.method, SuperTuning)
    return a.method.low_rank_scale


def alpha(a: Adapter) -> float:
    assert isinstance(a.method, SuperTuning)
    return scale(a) * (a.method.r or 0)


def lora_default(a: Adapter) -> float:
    """LoRA's 8 for a missing lora_alpha."""
    assert isinstance(a.method, SuperTuning)
    return 8 / a.method.r if a.method.r is not None and a.method.lora_alpha is None else scale(a)


def added(delta: Callable[[Layer, Adapter], Array]) -> Replay:
    """Another D."""

    def step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return W + delta(layer, a), b

    def unmerge(p: Problem) -> tuple[Array, Array | None]:
        assert p.merged_W is not None
        return p.merged_W - sum(delta(p.layer, a) for a in p.adapters), p.merged_b

    formula = Formula(weight=one_by_one(step), unmerge=unmerge)

    def replay(case: Case) -> Answer | None:
        if case.operation != "delta":
            return formula(case)
        p = pose(case)
        return stored(p.layer, delta(p.layer, p.adapters[0]), None)

    return replay


def found_again(case: Case) -> Case | None:
    """The places of the frozen weight at hand in the place of those that were saved."""
    assert case.layer is not None
    assert case.weight is not None
    adapters = []
    for a in case.adapters:
        method = build_method("supertuning", a.config)
        assert isinstance(method, SuperTuning)
        places = method.places(case.layer, case.layer.fold(case.weight))
        adapters.append(replace(a, tensors={**a.tensors, "supertuning_indices": places}))
    return replace(case, adapters=tuple(adapters))


def replaced(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
    there = np.zeros(math.prod(layer.shape), dtype=bool)
    there[a.params.indices] = True
    return np.where(there.reshape(layer.shape), 0 * W, W) + sparse(layer, a) + scale(a) * low_rank(layer, a), b


def dropped_everywhere(case: Case) -> Answer | None:
    right = one_by_one(lambda layer, a, W, b, W0: a.method.weight(layer, a.params, W, b, W0))
    return Formula(weight=right)(case) if any(a.dropout for a in case.adapters) else None


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    zero = constant(0.0, "init-not-identity")
    values: dict[str, Law] = {"supertuning_values": zero if config["init_weights"] else normal(1.0)}
    if config["r"] is None:
        return values
    B = zero if config["init_weights"] else uniform(1 / math.sqrt(config["r"]))
    return {**values, "supertuning_lora_A.weight": uniform(1 / math.sqrt(layer.shape[1])), "supertuning_lora_B.weight": B}


def at_the_largest(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    """Whether the places are those of the largest entries, or the smallest; equal ones may be any."""
    assert case.weight is not None
    size, at = np.abs(case.weight).reshape(-1), draw["supertuning_indices"].astype(int)
    order = np.sort(size)
    want = order[::-1][: len(at)] if case.adapters[0].config["select_top"] else order[: len(at)]
    if len(set(at)) < len(at) or not np.array_equal(np.sort(size[at % size.size]), np.sort(want)):
        return "init-other-places: they must be those of the weight's entries that are largest, or smallest with select_top=False"
    return ""


FRESH = Fresh(
    clause="SUPERTUNING-C13",
    starts={
        "default": Start(SUPER),
        "bottom": Start({**SUPER, "select_top": False}),
        "supra": Start(SUPRA),
        "false": Start({**SUPRA, "init_weights": False}),
    },
    laws=laws,
    identity=at_the_largest,
)
FILES = Files(
    configs_clause="SUPERTUNING-C14",
    keys_clause="SUPERTUNING-C15",
    configs={"plain": {"sparsity": 0.6}, "missing": {}, "supra": {"r": 4, "lora_alpha": 6}, "alpha-missing": {"r": 9}},
    told={"r": "r", "scaling": "low_rank_scale"},
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="supertuning-ignored",
            clause="SUPERTUNING-C1",
            sentence="the adapter is not there at all: this is the frozen layer",
            replay=null_answer,
        ),
        Mistake(
            name="supertuning-replaces",
            clause="SUPERTUNING-C1",
            sentence="the weight's entries are replaced by supertuning_values instead of having them added",
            replay=Formula(weight=one_by_one(replaced)),
        ),
        Mistake(
            name="supertuning-column-major",
            clause="SUPERTUNING-C2",
            sentence="the places are counted down the columns instead of along the rows",
            replay=added(lambda layer, a: sparse(layer, a, transposed=True) + scale(a) * low_rank(layer, a)),
        ),
        Mistake(
            name="supertuning-values-scaled",
            clause="SUPERTUNING-C3",
            sentence="the scale of the low-rank part multiplies supertuning_values too",
            replay=added(lambda layer, a: sparse(layer, a) * (scale(a) or 1) + scale(a) * low_rank(layer, a)),
        ),
        Mistake(
            name="supertuning-low-rank-ignored",
            clause="SUPERTUNING-C3",
            sentence="the low-rank part is not there",
            replay=added(sparse),
        ),
        Mistake(
            name="supertuning-scale-is-alpha",
            clause="SUPERTUNING-C3",
            sentence="the scale of the low-rank part is lora_alpha instead of lora_alpha / r",
            replay=added(lambda layer, a: sparse(layer, a) + alpha(a) * low_rank(layer, a)),
        ),
        Mistake(
            name="supertuning-alpha-of-lora",
            clause="SUPERTUNING-C3",
            sentence="a missing lora_alpha is taken for 8, as LoRA's, instead of 2 r",
            replay=added(lambda layer, a: sparse(layer, a) + lora_default(a) * low_rank(layer, a)),
        ),
        Mistake(
            name="supertuning-places-found-again",
            clause="SUPERTUNING-C5",
            sentence="supertuning_indices is not read: the places are found again in the weight at hand",
            replay=AsIf(found_again),
        ),
        only_first_adapter("SUPERTUNING-C7"),
        *dropout("SUPERTUNING-C8"),
        Mistake(
            name="supertuning-sparse-dropped",
            clause="SUPERTUNING-C8",
            sentence="dropout reaches the input of the sparse part too",
            replay=dropped_everywhere,
        ),
        Mistake(
            name="double-merge",
            clause="SUPERTUNING-C9",
            sentence="the adapter is merged twice",
            replay=only(merge=merged_twice),
        ),
        Mistake(
            name="unmerge-adds",
            clause="SUPERTUNING-C10",
            sentence="unmerge adds the numbers again instead of taking them out",
            replay=only(unmerge=unmerge_that_merges),
        ),
        Mistake(
            name="unmerge-from-frozen",
            clause="SUPERTUNING-C10",
            sentence="unmerge starts from the frozen weight instead of the merged one it is given",
            replay=only(unmerge=unmerge_the_frozen),
        ),
        Mistake(
            name="supertuning-gradient-not-scaled",
            clause="SUPERTUNING-C11",
            sentence="the gradients of the low-rank part lack its scale",
            replay=gradients_times(lambda config: config["r"] / (config["lora_alpha"] or 2 * config["r"]) if config["r"] else 1.0, "lora"),
        ),
    ),
)
