"""MonteCLoRA: what is asked of the adapter that is used, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from peft_ref.arrays import Array, column
from peft_ref.check import lora_family as lora
from peft_ref.check import shared_mistakes as shared
from peft_ref.check.asked import Config, Draw, Files, Fresh, Start
from peft_ref.check.case import Case, NDArray
from peft_ref.check.distributions import Law
from peft_ref.check.lora_starts import laws as lora_laws
from peft_ref.check.lora_variants import FAMILY, variants
from peft_ref.check.mistake import Mistake, Replay, Suite
from peft_ref.layers import Layer

SAMPLES = {"monteclora_config": {"num_samples": 3, "sample_scaler": 0.25}}
PLAIN = {**lora.PLAIN, **SAMPLES}


def positive(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    return rng.choice([0.25, 0.5, 1.5], shape)


def with_A(change: Callable[[Any, Any], Array]) -> Replay:
    """Another A, given method and parameters."""
    return shared.other_delta(lambda layer, method, p, W0: method.scale * (p.B @ change(method, p)))


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    return lora_laws(config, layer)


def identity(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    prefix, n = "lora_monteclora_sampler.", case.adapters[0].config["monteclora_config"]["num_samples"]
    for key in ("std_prior", "expert_weights_prior"):
        if np.any(draw[prefix + key] < 0) or np.any(draw[prefix + key] > 1):
            return f"init-prior: {key} is uniform from 0 to 1"
    if np.any(draw[prefix + "gaussian_var_prior"] != np.eye(case.adapters[0].config["r"])):
        return "init-variances: gaussian_var_prior starts at the identity"
    if np.any(np.abs(draw[prefix + "expert_weights"] - 1 / n) > 0.005):
        return "init-weights: every sample counts alike before the first draw"
    return ""


SUITE = Suite(
    variants=variants("MONTECLORA-C1", SAMPLES, ("linear", "transposed_linear"), draws={"variances": positive}, rounded={}),
    fresh=Fresh(clause="MONTECLORA-C13", starts={"default": Start(PLAIN)}, laws=laws, identity=identity),
    files=Files(
        configs_clause="MONTECLORA-C15",
        keys_clause="MONTECLORA-C16",
        configs={"plain": PLAIN, "defaults": {"r": 4, "lora_alpha": 6, "monteclora_config": {"num_samples": 8}}},
    ),
    mistakes=(
        *FAMILY,
        Mistake(
            name="weights-in-inference",
            clause="MONTECLORA-C2",
            sentence="in inference A is multiplied by the sum of the stored expert_weights",
            replay=with_A(lambda method, p: np.sum(p.w, keepdims=True) * p.A),
        ),
        Mistake(
            name="deviations-in-inference",
            clause="MONTECLORA-C2",
            sentence="in inference A's rows are multiplied by the deviations e^std_prior",
            replay=with_A(lambda method, p: column(np.exp(p.sigma)) * p.A),
        ),
        Mistake(
            name="variances-in-inference",
            clause="MONTECLORA-C2",
            sentence="in inference A is multiplied by the stored gaussian_var_prior",
            replay=with_A(lambda method, p: p.variances @ p.A),
        ),
        Mistake(
            name="sample-scaler-in-inference",
            clause="MONTECLORA-C2",
            sentence="in inference A is multiplied by sample_scaler",
            replay=with_A(lambda method, p: method.monteclora_config.sample_scaler * p.A),
        ),
        Mistake(
            name="scaler-beside-one-in-inference",
            clause="MONTECLORA-C2",
            sentence="in inference sample_scaler times A's row sums is added to A, as if the noise were one",
            replay=with_A(lambda method, p: p.A + method.monteclora_config.sample_scaler),
        ),
        shared.only_first_adapter("MONTECLORA-C5"),
    ),
)
