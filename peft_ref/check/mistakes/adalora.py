"""AdaLoRA: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from peft_ref.arrays import Array
from peft_ref.check import lora_family as lora
from peft_ref.check.allocator_mistakes import ALLOCATOR
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import LAYER_OPERATIONS, Answer, Case
from peft_ref.check.distributions import Law, constant, normal
from peft_ref.check.mistake import (
    Formula,
    Mistake,
    Replay,
    Suite,
    as_if,
    base_alone_backward,
    gradients_times,
    merged_twice,
    one_by_one,
    only,
    reread,
    stored,
    unmerge_that_merges,
)
from peft_ref.check.oracle import Problem, pose
from peft_ref.check.penalty_mistakes import PENALTY
from peft_ref.check.shared_mistakes import only_first_adapter
from peft_ref.check.training_cases import training_cases
from peft_ref.check.variants import Variant
from peft_ref.layers import Layer
from peft_ref.methods.adalora import EPSILON, AdaLoRA, Params
from peft_ref.stack import Adapter

SCHEDULE = {"target_r": 2, "total_step": 10}
PLAIN = {"init_r": 4, "lora_alpha": 6, **SCHEDULE}
SECOND = {"init_r": 2, "lora_alpha": 1, **SCHEDULE}
DROPPED = {**PLAIN, "lora_dropout": 0.75}

VARIANTS = (
    Variant(name="plain", clause="ADALORA-C1", configs=(PLAIN,), layers=("linear", "transposed_linear", "conv2d")),
    Variant(name="small", clause="ADALORA-C1", configs=(PLAIN,), numbers="small"),
    Variant(
        name="rounded",
        clause="ADALORA-C6",
        configs=({"init_r": 3, "lora_alpha": 5, **SCHEDULE},),
        layers=("linear-large",),
        numbers="rounded",
    ),
    # The 1e-5 is largest beside a rank of one, and one product of three numbers rounds least.
    Variant(
        name="rank-one",
        clause="ADALORA-C6",
        configs=({"init_r": 1, "lora_alpha": 2, **SCHEDULE},),
        operations=("forward", "delta", "merge", "unmerge"),
    ),
    Variant(name="pruned", clause="ADALORA-C7", configs=({**PLAIN, "live_r": 3},), layers=("linear", "conv2d")),
    Variant(name="alpha-zero", clause="ADALORA-C8", configs=({**PLAIN, "lora_alpha": 0},)),
    Variant(name="no-bias", clause="ADALORA-C2", configs=(PLAIN,), bias=False),
    Variant(
        name="dropout",
        clause="ADALORA-C12",
        configs=(DROPPED,),
        layers=("linear", "conv2d"),
        dropout=0.75,
    ),
    Variant(
        name="dropout-two-adapters",
        clause="ADALORA-C12",
        configs=(DROPPED, {**SECOND, "lora_dropout": 0.75}),
        dropout=0.75,
    ),
    Variant(
        name="two-adapters",
        clause="ADALORA-C11",
        configs=(PLAIN, SECOND),
        layers=("linear", "conv2d"),
    ),
)


def _method(a: Adapter) -> AdaLoRA:
    assert isinstance(a.method, AdaLoRA)
    return a.method


def other_delta(delta: Callable[[AdaLoRA, Params], Array], where: Callable[[AdaLoRA], bool] = lambda method: True) -> Replay:
    """A wrong delta, given hyper-parameters and factors, where it is another one than the right one."""

    def step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return W + delta(_method(a), a.params), b

    def unmerge(p: Problem) -> tuple[Array, Array | None]:
        W = p.merged_W
        for a in p.adapters:
            W = W - delta(_method(a), a.params)
        return W, p.merged_b

    formula = Formula(weight=one_by_one(step), unmerge=unmerge)

    def replay(case: Case) -> Answer | None:
        if case.operation not in LAYER_OPERATIONS:
            return None
        p = pose(case)
        if not any(where(_method(a)) for a in p.adapters):
            return None
        if case.operation != "delta":
            return formula(case)
        a = p.adapters[0]
        return stored(p.layer, delta(_method(a), a.params), None)

    return replay


def other_scale(scale: Callable[[AdaLoRA], float]) -> Replay:
    return other_delta(lambda m, p: scale(m) * (p.B @ (p.E * p.A)), lambda m: scale(m) != m.scale)


def _alpha(m: AdaLoRA) -> float:
    return m.lora_alpha if m.lora_alpha > 0 else m.init_r


def _scale_of(config: Mapping[str, Any]) -> float:
    alpha = config["lora_alpha"] if config["lora_alpha"] > 0 else config["init_r"]
    return float(alpha / (config["init_r"] + EPSILON))


def _first_scale(case: Case) -> Case | None:
    """Every adapter's alpha such that its scale is the first one's."""
    if len(case.adapters) < 2:
        return None
    scale = _scale_of(case.adapters[0].config)
    adapters = (replace(a, config={**a.config, "lora_alpha": scale * (a.config["init_r"] + EPSILON)}) for a in case.adapters)
    return replace(case, adapters=tuple(adapters))


SCALING = (
    Mistake(
        name="epsilon-dropped",
        clause="ADALORA-C6",
        sentence="the scale is LoRA's alpha / r, without the 1e-5 beside the rank",
        replay=other_scale(lambda m: _alpha(m) / m.init_r),
    ),
    Mistake(
        name="scale-is-alpha",
        clause="ADALORA-C6",
        sentence="the scale is alpha, which HF calls `scaling` here, and nothing divides it by the rank",
        replay=other_scale(_alpha),
    ),
    Mistake(
        name="scale-is-one",
        clause="ADALORA-C6",
        sentence="alpha is ignored: the product is added unscaled, as in the paper",
        replay=other_scale(lambda m: 1.0),
    ),
    Mistake(
        name="rank-divides-twice",
        clause="ADALORA-C6",
        sentence="alpha / r is divided by the rank again",
        replay=other_scale(lambda m: m.scale / m.init_r),
    ),
    Mistake(
        name="scale-rooted",
        clause="ADALORA-C6",
        sentence="the scale is alpha / sqrt(r), rsLoRA's",
        replay=other_scale(lambda m: _alpha(m) / math.sqrt(m.init_r)),
    ),
    Mistake(
        name="divided-by-target-rank",
        clause="ADALORA-C7",
        sentence="alpha is divided by target_r instead of init_r",
        replay=other_scale(lambda m: _alpha(m) / (m.target_r + EPSILON)),
    ),
    Mistake(
        name="divided-by-live-rank",
        clause="ADALORA-C7",
        sentence="alpha is divided by the rank that pruning left instead of init_r",
        replay=other_scale(lambda m: _alpha(m) / (m.r + EPSILON)),
    ),
    Mistake(
        name="alpha-zero-switches-off",
        clause="ADALORA-C8",
        sentence="lora_alpha = 0 makes the scale zero, instead of standing for init_r",
        replay=other_scale(lambda m: m.lora_alpha / (m.init_r + EPSILON)),
    ),
)

DIAGONAL = (
    Mistake(
        name="E-ignored",
        clause="ADALORA-C1",
        sentence="lora_E is left out: the delta is s B A, LoRA's",
        replay=other_delta(lambda m, p: m.scale * (p.B @ (p.A + 0 * p.E))),
    ),
    Mistake(
        name="E-twice",
        clause="ADALORA-C3",
        sentence="lora_E multiplies both A and B, so it counts squared",
        replay=other_delta(lambda m, p: m.scale * (p.B @ (p.E * p.E * p.A))),
    ),
    Mistake(
        name="E-absolute",
        clause="ADALORA-C3",
        sentence="lora_E loses its sign, as if it were a singular value",
        replay=other_delta(lambda m, p: m.scale * (p.B @ (abs(p.E) * p.A))),
    ),
    Mistake(
        name="E-reversed",
        clause="ADALORA-C1",
        sentence="lora_E's entries are paired with the triplets in reverse order",
        replay=other_delta(lambda m, p: m.scale * (p.B @ (p.E[::-1] * p.A)), lambda m: m.r > 1),
    ),
    Mistake(
        name="merge-without-E",
        clause="ADALORA-C13",
        sentence="the forward pass has lora_E, merging does not",
        replay=only(
            merge=other_delta(lambda m, p: m.scale * (p.B @ p.A)),
            delta=other_delta(lambda m, p: m.scale * (p.B @ p.A)),
        ),
    ),
)


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    if config["init_lora_weights"] is False:
        return {key: normal(1.0) for key in ("lora_A", "lora_E", "lora_B")}
    return {"lora_A": normal(0.02), "lora_E": constant(0.0, "init-E-random"), "lora_B": normal(0.02)}


ALLOCATED = {"init_r": 4, "target_r": 2, "total_step": 10}
FRESH = Fresh(
    clause="ADALORA-C30",
    starts={
        "default": Start(ALLOCATED, ("linear", "transposed_linear", "conv2d")),
        "false": Start({**ALLOCATED, "init_lora_weights": False}),
    },
    laws=laws,
)
FILES = Files(
    configs_clause="ADALORA-C32",
    keys_clause="ADALORA-C35",
    configs={
        "plain": {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10},
        "alpha-missing": {"init_r": 4, "target_r": 2, "total_step": 10},
        "alpha-zero": {"init_r": 4, "target_r": 2, "lora_alpha": 0, "total_step": 10},
        "rank-missing": {"lora_alpha": 6, "total_step": 10},
        "rank-pattern": {
            "init_r": 4,
            "lora_alpha": 6,
            "total_step": 10,
            "rank_pattern": {
                "model.layers.1.self_attn.v_proj.lora_E": [True, False, True, False],
                "model.layers.10.mlp.up_proj.lora_E": [False, True, True, True],
            },
        },
        "alpha-pattern": {"init_r": 4, "lora_alpha": 6, "total_step": 10, "alpha_pattern": {"q_proj": 20}},
    },
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        *SCALING,
        *DIAGONAL,
        Mistake(
            name="A-transposed",
            clause="ADALORA-C4",
            sentence="lora_A's numbers are read as (in, r) instead of (r, in)",
            replay=reread("_A"),
        ),
        Mistake(
            name="B-transposed",
            clause="ADALORA-C4",
            sentence="lora_B's numbers are read as (r, out) instead of (out, r)",
            replay=reread("_B"),
        ),
        Mistake(
            name="grad-scale-missing",
            clause="ADALORA-C15",
            sentence="the gradients of the adapter's tensors lack the scale",
            replay=gradients_times(lambda config: 1 / _scale_of(config)),
        ),
        Mistake(
            name="input-grad-missing",
            clause="ADALORA-C18",
            sentence="the gradient of x stops at the adapter: only the frozen weight's part is there",
            replay=only(backward=base_alone_backward),
        ),
        only_first_adapter("ADALORA-C11"),
        Mistake(
            name="first-scale-for-all",
            clause="ADALORA-C11",
            sentence="every adapter is scaled by the first one's alpha and rank",
            replay=as_if(_first_scale),
        ),
        *lora.DROPOUT,
        Mistake(
            name="double-merge",
            clause="ADALORA-C13",
            sentence="the adapter is merged twice",
            replay=only(merge=merged_twice),
        ),
        Mistake(
            name="unmerge-adds",
            clause="ADALORA-C14",
            sentence="unmerge adds the delta again instead of taking it out",
            replay=only(unmerge=unmerge_that_merges),
        ),
        *PENALTY,
        *ALLOCATOR,
    ),
    cases=training_cases(),
)
