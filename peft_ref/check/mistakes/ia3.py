"""IA3: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from peft_ref import stack
from peft_ref.arrays import Array
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case
from peft_ref.check.distributions import Law, constant
from peft_ref.check.mistake import (
    AsIf,
    Formula,
    Mistake,
    Suite,
    merged_twice,
    only,
    stored,
    unmerge_the_frozen,
    with_config,
    with_tensors,
)
from peft_ref.check.oracle import Problem, answer, null_answer, pose
from peft_ref.check.shared_mistakes import only_first_adapter
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer, Linear
from peft_ref.stack import Adapter

OUT = {"is_feedforward": False}
IN = {"is_feedforward": True}


def factors(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Powers of two, so that dividing by them is exact; none of them 1, no two opposite (their mean would be zero)."""
    return rng.choice([-2.0, -0.5, 0.25, 4.0], shape)


KINDS = ("linear", "transposed_linear", "conv2d", "conv3d", "conv2d-groups")
DRAWS = {"l": factors}

VARIANTS = (
    Variant(name="output", clause="IA3-C1", configs=(OUT,), layers=KINDS, draws=DRAWS),
    Variant(name="feedforward", clause="IA3-C4", configs=(IN,), layers=KINDS, draws=DRAWS),
    Variant(name="small", clause="IA3-C1", configs=(OUT,), numbers="small", draws=DRAWS),
    Variant(name="rounded", clause="IA3-C1", configs=(OUT,), layers=("linear-large",), numbers="rounded"),
    Variant(name="vector", clause="IA3-C1", configs=(OUT,), layers=("linear", "transposed_linear"), operations=RUN, rows=(), draws=DRAWS),
    Variant(name="no-bias", clause="IA3-C1", configs=(OUT,), bias=False, draws=DRAWS),
    Variant(name="square-output", clause="IA3-C1", configs=(OUT,), layers=("linear-square",), draws=DRAWS),
    Variant(name="square-feedforward", clause="IA3-C4", configs=(IN,), layers=("linear-square",), draws=DRAWS),
    Variant(name="two-adapters", clause="IA3-C10", configs=(OUT, OUT), layers=("linear", "conv2d"), draws=DRAWS),
    Variant(name="two-feedforward", clause="IA3-C10", configs=(IN, IN), draws=DRAWS),
)


def scaled_by(change: Callable[[Array], Array]) -> Callable[[Case], Answer | None]:
    """The right formula with another l; the gradient follows the changed formula."""

    def changed(p: Problem) -> Problem:
        adapters = (a._replace(params=a.params._replace(l=change(a.params.l))) for a in p.adapters)
        return p._replace(adapters=tuple(adapters))

    def weight(p: Problem) -> tuple[Array, Array | None]:
        return stack.merge(p.layer, p.W, p.b, changed(p).adapters)

    def unmerge(p: Problem) -> tuple[Array, Array | None]:
        return stack.unmerge(p.layer, p.merged_W, p.merged_b, changed(p).adapters, p.W)

    return Formula(weight=weight, unmerge=unmerge)


def on_the_other_side(feedforward: bool) -> AsIf:
    """Inputs scaled for outputs, or outputs for inputs: it fits where there are as many of both, else a port fails without an answer."""

    def other(case: Case) -> Case | None:
        layer = case.layer
        if not isinstance(layer, Linear) or layer.in_features != layer.out_features:
            return None
        if any(bool(a.config["is_feedforward"]) != feedforward for a in case.adapters):
            return None
        turned = with_config(case, lambda config: {**config, "is_feedforward": not feedforward})
        return None if turned is None else with_tensors(turned, lambda key, v, config: v.reshape(v.shape[::-1]))

    def back(case: Case, gradients: Answer) -> Answer:
        return {name: g.reshape(g.shape[::-1]) if name != "x" else g for name, g in gradients.items()}

    return AsIf(other, back)


def _no_bias_gain(p: Problem) -> tuple[Array, Array | None]:
    return stack.merge(p.layer, p.W, p.b, p.adapters)[0], p.b


def _output_with_bias(case: Case) -> bool:
    return case.bias is not None and not case.adapters[0].config["is_feedforward"]


def _merge_keeps_bias(case: Case) -> Answer | None:
    return {**answer(case), "bias": case.bias} if _output_with_bias(case) and case.bias is not None else None


def _bias_gain_ignored(case: Case) -> Answer | None:
    if not _output_with_bias(case):
        return None
    if case.operation == "unmerge":
        p = pose(case)
        return stored(p.layer, stack.unmerge(p.layer, p.merged_W, None, p.adapters, p.W)[0], p.merged_b)
    return Formula(weight=_no_bias_gain)(case)


def _averaged(p: Problem) -> list[Adapter]:
    mean = sum(a.params.l for a in p.adapters) / len(p.adapters)
    return [p.adapters[0]._replace(params=p.adapters[0].params._replace(l=mean))]


AVERAGED = Formula(
    weight=lambda p: stack.merge(p.layer, p.W, p.b, _averaged(p)),
    unmerge=lambda p: stack.unmerge(p.layer, p.merged_W, p.merged_b, _averaged(p), p.W),
)


def _averaged_adapters(case: Case) -> Answer | None:
    return AVERAGED(case) if len(case.adapters) > 1 else None


def _bias_gradient_lost(case: Case) -> Answer | None:
    """dl without the bias's part, g_i b_i: the gradient as if there were no bias."""
    if not _output_with_bias(case) or len(case.adapters) > 1:
        return None
    p = pose(case)
    return {**answer(case), **{k: v for k, v in answer(_without_bias(case)).items() if k != "x"}} if p.b is not None else None


def _without_bias(case: Case) -> Case:
    return replace(case, bias=None)


def _epsilon(case: Case) -> Answer | None:
    """HF divides by l + 1e-8."""
    moved = with_tensors(case, lambda key, v, config: v + 1e-8)
    return None if moved is None else answer(moved)


def _multiplied_again(case: Case) -> Answer:
    p = pose(case)
    return stored(p.layer, *stack.merge(p.layer, p.merged_W, p.merged_b, p.adapters))


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    return {"ia3_l": constant(1.0, "ia3-init-not-one")}


FRESH = Fresh(
    clause="IA3-C18",
    starts={"default": Start({"is_feedforward": False}, ("linear", "conv2d")), "default-feedforward": Start({"is_feedforward": True})},
    laws=laws,
)
FILES = Files(
    configs_clause="IA3-C5",
    keys_clause="IA3-C20",
    configs={"feedforward": {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}},
    told={"is_feedforward": "is_feedforward"},
    modules=("v_proj", "down_proj"),
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="ia3-one-plus-l",
            clause="IA3-C2",
            sentence="the factor is 1 + l instead of l",
            replay=scaled_by(lambda l: l + 1.0),
        ),
        Mistake(
            name="ia3-feedforward-side",
            clause="IA3-C4",
            sentence="the outputs are scaled where a feed-forward module has to scale its inputs",
            replay=on_the_other_side(feedforward=True),
            links=("https://github.com/huggingface/peft/pull/972",),
        ),
        Mistake(
            name="ia3-output-side",
            clause="IA3-C1",
            sentence="the inputs are scaled where a module that is not feed-forward has to scale its outputs",
            replay=on_the_other_side(feedforward=False),
        ),
        Mistake(
            name="ia3-applied-twice",
            clause="IA3-C2",
            sentence="l is applied twice",
            replay=scaled_by(lambda l: l * l),
        ),
        Mistake(
            name="ia3-divides",
            clause="IA3-C1",
            sentence="the layer is divided by l instead of multiplied",
            replay=scaled_by(lambda l: 1.0 / l),
        ),
        Mistake(
            name="ia3-ignored",
            clause="IA3-C1",
            sentence="l is not applied at all: this is the frozen layer",
            replay=null_answer,
        ),
        Mistake(
            name="ia3-bias-not-scaled",
            clause="IA3-C3",
            sentence="an output-scaling l multiplies the weight and not the bias",
            replay=_bias_gain_ignored,
        ),
        Mistake(
            name="ia3-bias-in-merge",
            clause="IA3-C3",
            sentence="the forward pass scales the bias, merging does not",
            replay=only(merge=_merge_keeps_bias),
            links=("https://github.com/huggingface/peft/pull/972",),
        ),
        Mistake(
            name="ia3-unmerge-mul",
            clause="IA3-C13",
            sentence="unmerge multiplies by l again instead of dividing",
            replay=only(unmerge=_multiplied_again),
            links=("https://github.com/huggingface/peft/issues/3149",),
        ),
        Mistake(
            name="unmerge-from-frozen",
            clause="IA3-C13",
            sentence="unmerge starts from the frozen weight instead of the merged one it is given",
            replay=only(unmerge=unmerge_the_frozen),
        ),
        Mistake(
            name="ia3-unmerge-epsilon",
            clause="IA3-C13",
            sentence="unmerge divides by l + 1e-8, as HF PEFT does",
            replay=only(unmerge=_epsilon),
            dialect=True,
        ),
        Mistake(
            name="double-merge",
            clause="IA3-C12",
            sentence="the adapter is merged twice",
            replay=only(merge=merged_twice),
        ),
        only_first_adapter("IA3-C10"),
        Mistake(
            name="ia3-averaged",
            clause="IA3-C10",
            sentence="several adapters are averaged instead of multiplied",
            replay=_averaged_adapters,
        ),
        Mistake(
            name="ia3-bias-gradient-lost",
            clause="IA3-C15",
            sentence="the gradient of l lacks what flows through the bias",
            replay=only(backward=_bias_gradient_lost),
        ),
    ),
)
