"""AdaLoRA, as the tests need to know it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from peft_ref.methods.adalora import AdaLoRA
from tests.methods.config_words import random_word
from tests.methods.facts import Facts, Tour, as_configured


def peft_options(method: AdaLoRA) -> Mapping[str, Any]:
    return {word: value for word, value in as_configured(method).items() if word != "live_r"}


def random_config(rng: Any, common: dict[str, Any]) -> Any:
    import peft

    return peft.AdaLoraConfig(
        init_r=int(rng.integers(2, 6)),
        target_r=2,
        lora_alpha=int(rng.integers(1, 9)),
        total_step=9,
        bias=random_word(rng, "none", "all"),
        **common,
    )


FACTS = Facts(
    random=random_config,
    # The smallest of no scores is nothing: where no triplet is to go, PEFT's allocator crashes.
    unable=lambda case, dtype: case == "adalora.allocator.nothing-goes.allocate",
    settings={
        "adalora": AdaLoRA(init_r=4, lora_alpha=6, total_step=10),
        "adalora-alpha-zero": AdaLoRA(init_r=4, lora_alpha=0, total_step=10),
    },
    peft_options=peft_options,
    required={"total_step": 10},
    fields={
        "init_r": st.sampled_from((3, 2, 4)),
        "live_r": st.sampled_from((None, 1, 2, 0)),  # a rank of zero is left where everything was pruned
        "lora_alpha": st.sampled_from((2, 3.5)),  # zero or less stands for init_r
        "total_step": st.just(10),
    },
    few={"init_r": st.just(2), "live_r": st.just(None)},
    bits=None,  # it divides by a rank plus 1e-5
    tour=Tour("AdaLoraConfig", {"init_r": 3, "target_r": 2, "total_step": 9}),
)
