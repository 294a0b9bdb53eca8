"""HiRA: what is asked, and what ports get wrong."""

from __future__ import annotations

import math

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check import shared_mistakes as shared
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case
from peft_ref.check.distributions import Law, constant, normal, uniform
from peft_ref.check.lora_starts import WITH_TABLE
from peft_ref.check.mistake import Formula, Mistake, Suite, one_by_one, only, reread, stored
from peft_ref.check.oracle import Problem, pose
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer
from peft_ref.stack import Adapter

PLAIN = {"r": 4}
KINDS = ("linear", "transposed_linear", "embedding", "conv1d", "conv2d", "conv3d", "conv1d-dilation")

VARIANTS = (
    Variant(name="plain", clause="HIRA-C1", configs=(PLAIN,), layers=KINDS),
    Variant(name="small", clause="HIRA-C1", configs=(PLAIN,), numbers="small"),
    Variant(name="rounded", clause="HIRA-C1", configs=({"r": 9},), layers=("linear-large",), numbers="rounded"),
    Variant(name="vector", clause="HIRA-C3", configs=(PLAIN,), layers=("linear", "transposed_linear"), operations=RUN, rows=()),
    Variant(name="no-bias", clause="HIRA-C2", configs=(PLAIN,), bias=False),
    Variant(
        name="dropout",
        clause="HIRA-C11",
        configs=({**PLAIN, "hira_dropout": 0.75},),
        layers=("linear", "conv2d"),
        dropout=0.75,
    ),
    Variant(
        name="two-adapters", clause="HIRA-C9", configs=(PLAIN, {"r": 2}), layers=("linear", "transposed_linear", "embedding", "conv1d")
    ),
)


def _product(a: Adapter) -> Array:
    return a.params.B @ a.params.A


def _composed(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
    return W + W * _product(a), b


def _replaced(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
    return W * _product(a), b


def _bias_too(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
    W = W + W0 * _product(a)
    return W, None if b is None else b + b * np.sum(_product(a), axis=1)


def _divided(p: Problem) -> tuple[Array, Array | None]:
    W = p.merged_W
    for a in p.adapters:
        W = W / (1 + _product(a))
    return W, p.merged_b


def _unmerge_divides(case: Case) -> Answer | None:
    p = pose(case)
    if any(np.any(_product(a) == -1) for a in p.adapters):
        return None  # nothing that a port could answer
    return stored(p.layer, *_divided(p))


def _several(case: Case) -> Answer | None:
    return Formula(weight=one_by_one(_composed))(case) if len(case.adapters) > 1 else None


def _saved_copy(case: Case) -> Answer:
    p = pose(case)
    return stored(p.layer, p.W, p.merged_b)


PLAIN_LORA = shared.other_delta(lambda layer, method, p, W0: p.B @ p.A)


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    init = config["init_weights"]
    if layer.kind == "embedding":
        zero = constant(0.0, "embedding-init-swapped: on an embedding A starts at zero and B at random")
        return {"hira_embedding_A": normal(1.0) if init is False else zero, "hira_embedding_B": normal(1.0)}
    if init is False:
        return {"hira_A": normal(1.0), "hira_B": normal(1.0)}
    drawn = normal(1 / config["r"]) if init == "gaussian" and not layer.kernel_size else uniform(1 / math.sqrt(layer.shape[1]))
    return {"hira_A": drawn, "hira_B": constant(0.0, "init-not-identity")}


FRESH = Fresh(
    clause="HIRA-C17",
    starts={
        "default": Start(PLAIN, ("linear", "transposed_linear", "embedding", "conv2d")),
        "gaussian": Start({**PLAIN, "init_weights": "gaussian"}, ("linear", "conv1d")),
        "false": Start({**PLAIN, "init_weights": False}, ("linear", "embedding")),
    },
    laws=laws,
)
FILES = Files(
    configs_clause="HIRA-C20",
    keys_clause="HIRA-C22",
    configs={"plain": PLAIN, "rank-missing": {}},
    told={"r": "r"},
    saved_on=WITH_TABLE,
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="one-forgotten",
            clause="HIRA-C1",
            sentence="the weight is multiplied by B A instead of 1 + B A: the frozen weight itself is lost",
            replay=Formula(weight=one_by_one(_replaced)),
        ),
        Mistake(
            name="weight-not-multiplied",
            clause="HIRA-C1",
            sentence="B A is added as it is, not multiplied by the frozen weight: this is LoRA",
            replay=PLAIN_LORA,
        ),
        Mistake(
            name="scale-one-over-r",
            clause="HIRA-C5",
            sentence="B A is divided by r; HiRA has no scale",
            replay=shared.other_delta(lambda layer, method, p, W0: W0 * (p.B @ p.A) / method.r),
        ),
        Mistake(
            name="scale-two",
            clause="HIRA-C5",
            sentence="B A is doubled, as with LoRA's usual alpha = 2 r; HiRA has no scale",
            replay=shared.other_delta(lambda layer, method, p, W0: W0 * (p.B @ p.A) * 2.0),
        ),
        Mistake(
            name="sizes-multiplied",
            clause="HIRA-C1",
            sentence="B A is multiplied by the size of the frozen weight's entries, without their sign",
            replay=shared.other_delta(lambda layer, method, p, W0: abs(W0) * (p.B @ p.A)),
        ),
        Mistake(
            name="adapters-compounded",
            clause="HIRA-C9",
            sentence="a second adapter multiplies what the first one made of the weight, instead of the frozen weight",
            replay=_several,
        ),
        Mistake(
            name="bias-multiplied",
            clause="HIRA-C2",
            sentence="the bias is multiplied by the row sums of B A too",
            replay=only(
                forward=lambda case: Formula(weight=one_by_one(_bias_too))(case) if case.bias is not None else None,
                merge=lambda case: Formula(weight=one_by_one(_bias_too))(case) if case.bias is not None else None,
                backward=lambda case: Formula(weight=one_by_one(_bias_too))(case) if case.bias is not None else None,
            ),
        ),
        Mistake(
            name="A-transposed",
            clause="HIRA-C4",
            sentence="hira_A's numbers are read as (in, r) instead of (r, in)",
            replay=reread("_A"),
        ),
        Mistake(
            name="B-transposed",
            clause="HIRA-C4",
            sentence="hira_B's numbers are read as (r, out) instead of (out, r)",
            replay=reread("_B"),
        ),
        Mistake(
            name="grad-weight-missing",
            clause="HIRA-C15",
            sentence="the gradients of A and B are LoRA's: G is not multiplied by the frozen weight",
            replay=shared.parameter_gradients(PLAIN_LORA),
        ),
        shared.input_gradient_missing("HIRA-C16"),
        *shared.dropout("HIRA-C11"),
        shared.only_first_adapter("HIRA-C9"),
        *shared.merging("HIRA-C13", "HIRA-C14"),
        Mistake(
            name="unmerge-divides",
            clause="HIRA-C14",
            sentence="unmerge divides by 1 + B A, which may be zero, instead of subtracting the frozen weight's part",
            replay=only(unmerge=_unmerge_divides),
        ),
        Mistake(
            name="unmerge-saved-copy",
            clause="HIRA-C14",
            sentence="unmerge puts a saved copy of the frozen weight back, whatever it is given, as HF PEFT does",
            replay=only(unmerge=_saved_copy),
            dialect=True,
        ),
    ),
)
