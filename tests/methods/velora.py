"""VeLoRA, as the tests need to know it."""

from __future__ import annotations

from hypothesis import strategies as st

from peft_ref.methods.velora import VeLoRA, VeloraConfig
from tests.methods.facts import Facts, Tour
from tests.methods.lora import lora
from tests.methods.wrong import replaced

HALVES = VeloraConfig(num_groups=2, scale=1.5, init_type="random")

FACTS = Facts(
    no_derivative=lambda gradient, several: "_A" in gradient,  # what it keeps of x is not x
    settings={
        "velora-bias": VeLoRA(r=4, lora_alpha=6, lora_bias=True, velora_config=HALVES),
        "velora": VeLoRA(r=4, lora_alpha=6, velora_config=HALVES),
        "velora-many": VeLoRA(r=4, lora_alpha=6, velora_config=VeloraConfig(num_groups=64, init_type="random")),
    },
    fields={"velora_config": st.builds(VeloraConfig, num_groups=st.sampled_from((1, 2, 3, 9)), scale=st.sampled_from((1.0, 0.5)))},
    few={"velora_config": st.just(HALVES)},
    models={"velora": (None, lora(velora_config={"num_groups": 4}, target_modules=["q", "up"]))},
    wrong_starts={
        "VeLoRA's projection at one": (
            "velora.linear.init-default",
            replaced("velora", lambda c, v, rng: v + 1),
            "init-projection",
        ),
        "VeLoRA's projection not of length one": (
            "velora.linear.init-random",
            replaced("velora", lambda c, v, rng: 2 * v),
            "init-projection-length",
        ),
    },
    tour=Tour("LoraConfig", {"r": 2, "velora_config": {"init_type": "random", "num_groups": 4, "scale": 1.0}}),
)
