"""MonteCLoRA, as the tests need to know it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hypothesis import strategies as st

from peft_ref.methods.monteclora import MonteCLoRA, MontecloraConfig
from tests.methods.facts import Facts, Tour
from tests.methods.lora import lora
from tests.methods.wrong import replaced

WEIGHTS = "lora_monteclora_sampler.expert_weights"
THREE = MontecloraConfig(num_samples=3, buffer_size=2)


def without_noise(tuner: Any) -> None:
    """PEFT's samples at zero, so that their average is A: what the noise does is compared in tests/spec/test_hf_family_quirks.py."""
    for sampler in tuner.lora_monteclora_sampler.values():
        for drawn in sampler.sampler.buffer:
            drawn["z_mvn"] = drawn["z_mvn"] * 0


FACTS = Facts(
    unable=lambda case, dtype: ".dropout." in case,  # in training mode PEFT also draws samples
    settle=without_noise,
    settings={
        "monteclora-bias": MonteCLoRA(r=4, lora_alpha=6, lora_bias=True, monteclora_config=THREE),
        "monteclora": MonteCLoRA(r=4, lora_alpha=6, monteclora_config=THREE),
    },
    fields={"monteclora_config": st.just(THREE)},
    models={"monteclora": (None, lora(monteclora_config={"num_samples": 3, "buffer_size": 2}, target_modules=["q", "up"]))},
    wrong_starts={
        "MonteCLoRA's weights at one": (
            "monteclora.linear.init-default",
            lambda c, draw, rng: {**draw, WEIGHTS: draw[WEIGHTS] * 0 + 1},
            "init-weights",
        ),
        "MonteCLoRA's variances at zero": (
            "monteclora.linear.init-default",
            replaced("gaussian_var_prior", lambda c, v, rng: v * 0),
            "init-variances",
        ),
    },
    tour=Tour("LoraConfig", {"r": 2, "monteclora_config": dict(sorted(asdict(MontecloraConfig(num_samples=2, buffer_size=2)).items()))}),
)
