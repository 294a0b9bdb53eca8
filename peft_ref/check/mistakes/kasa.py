"""KaSA: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from peft_ref.arrays import Array, column
from peft_ref.check import lora_family as lora
from peft_ref.check import shared_mistakes as shared
from peft_ref.check.asked import Config, Draw, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.distributions import Law, normal
from peft_ref.check.lora_starts import laws as lora_laws
from peft_ref.check.lora_variants import FAMILY, variants
from peft_ref.check.mistake import Mistake, Replay, Suite, only
from peft_ref.check.oracle import answer
from peft_ref.check.tolerance import PRECISION
from peft_ref.layers import Layer

CONFIG = {"kasa_config": {"beta": 0.25, "gamma": 0.5}}
PLAIN = {**lora.PLAIN, **CONFIG}


def values(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    """Of either sign and not sorted: they are learned."""
    return np.resize([1.5, -0.5, -2.0, 0.75], shape)


def with_values(change: Callable[[Array], Array]) -> Replay:
    """The learned singular values, read otherwise."""
    return shared.other_delta(lambda layer, method, p, W0: method.scale * (p.B @ (column(change(p.d)) * p.A)))


def _gradient_of_values(case: Case) -> Answer:
    """B's gradient as if A had no values beside it."""
    right = answer(case)
    for i, a in enumerate(case.adapters):
        key = f"{i}.lora_B.weight"
        right = {**right, key: right[key] / a.tensors["lora_diag"]}
    return right


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    return {**lora_laws(config, layer), "lora_diag": normal(1.0)}


def identity(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    """The frozen weight has lost its r smallest singular values. HF works that out in float32, so no more is asked of anybody."""
    assert case.weight is not None
    W = layer.fold(case.weight)
    if "weight" not in draw:
        return "init-weight-kept: the answer has no weight; KaSA cuts the r smallest singular values off the frozen weight"
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    kept = len(S) - case.adapters[0].config["r"]
    want = (U[:, :kept] * S[:kept]) @ Vh[:kept]
    allowed = 200 * 2.0 ** -PRECISION["float32"] * float(np.linalg.norm(W)) + 2 * 2.0 ** -PRECISION[dtype] * np.abs(want)
    if np.any(np.abs(layer.fold(draw["weight"]) - want) > allowed):
        return "init-weight-cut-wrong: the frozen weight must lose its r smallest singular values, and nothing else"
    return ""


FRESH = Fresh(
    clause="KASA-C8",
    starts={"default": Start(PLAIN), "gaussian": Start({**PLAIN, "init_lora_weights": "gaussian"})},
    laws=laws,
    identity=identity,
)
FILES = Files(
    configs_clause="KASA-C11",
    keys_clause="KASA-C12",
    configs={
        "plain": {"r": 4, "lora_alpha": 6, "kasa_config": {"beta": 0.1, "gamma": 0.2}},
        "defaults": {"r": 4, "lora_alpha": 6, "kasa_config": {}},
        "alpha-pattern": {"r": 4, "kasa_config": {}, "alpha_pattern": {"q_proj": 20}},
    },
)

SUITE = Suite(
    variants=variants("KASA-C1", CONFIG, ("linear",), draws={"d": values}, rounded={}),
    fresh=FRESH,
    files=FILES,
    mistakes=(
        *FAMILY,
        Mistake(
            name="values-ignored",
            clause="KASA-C1",
            sentence="the learned singular values are not read: this is LoRA",
            replay=with_values(lambda d: 0 * d + 1.0),
        ),
        Mistake(
            name="values-twice",
            clause="KASA-C1",
            sentence="the learned singular values multiply both factors",
            replay=with_values(lambda d: d * d),
        ),
        Mistake(
            name="values-unsigned",
            clause="KASA-C2",
            sentence="the learned singular values are taken without their sign",
            replay=with_values(abs),
        ),
        Mistake(
            name="values-reversed",
            clause="KASA-C1",
            sentence="the learned singular values are in the other order, the last one first",
            replay=with_values(lambda d: d[::-1]),
        ),
        Mistake(
            name="values-beside-one",
            clause="KASA-C2",
            sentence="1 is added to the learned singular values, as if they started at zero",
            replay=with_values(lambda d: 1 + d),
        ),
        Mistake(
            name="values-summed",
            clause="KASA-C1",
            sentence="every row of A is multiplied by the sum of the learned singular values",
            replay=with_values(lambda d: np.sum(d, keepdims=True) + 0 * d),
        ),
        Mistake(
            name="grad-B-values-missing",
            clause="KASA-C7",
            sentence="the gradient of B is LoRA's: it lacks the learned singular values",
            replay=only(backward=_gradient_of_values),
        ),
        shared.only_first_adapter("KASA-C5"),
    ),
)
