"""GraLoRA, as the tests need to know it."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from peft_ref.layers import Linear
from peft_ref.methods.gralora import GraLoRA
from tests.methods.config_words import LAYERS, NUMBERS, OWN_TARGETS, SWITCH, random_word
from tests.methods.facts import Difference, Facts, Tour
from tests.methods.hira import gpt2
from tests.methods.wrong import replaced


def gralora(**options: Any) -> Any:
    import peft

    return lambda: peft.GraloraConfig(**{"r": 4, "alpha": 6, **options})


def even() -> Any:
    from torch import nn

    return nn.ModuleDict({"c": nn.Linear(6, 10), "d": nn.Linear(8, 4)})


def random_config(rng: Any, common: dict[str, Any]) -> Any:
    own = {"r": random_word(rng, 2, 4), "hybrid_r": int(rng.integers(3)), "alpha": int(rng.integers(1, 9)), "target_modules": ["q"]}
    return gralora(**{**{word: value for word, value in common.items() if word != "exclude_modules"}, **own})()


FACTS = Facts(
    random=random_config,
    small={"r": 2, "gralora_k": 1},
    settings={
        "gralora": GraLoRA(r=4, alpha=6),
        "gralora-four": GraLoRA(r=8, alpha=6, gralora_k=4),
        "gralora-hybrid": GraLoRA(r=4, alpha=6, hybrid_r=3),
        "gralora-one": GraLoRA(r=4, alpha=6, gralora_k=1, hybrid_r=2),
    },
    fields={"r": st.sampled_from((2, 4)), "gralora_k": st.sampled_from((2, 1)), "hybrid_r": st.sampled_from((0, 2, 1))},
    few={"gralora_k": st.just(2), "hybrid_r": st.just(1)},
    few_layers={
        "linear": Linear(in_features=6, out_features=4),
        "transposed_linear": Linear(in_features=6, out_features=4, transposed=True),
    },
    config={"peft_type": "GRALORA", "r": 4, "alpha": 6, "target_modules": ["q"]},
    space=OWN_TARGETS
    | LAYERS
    | {
        "r": [*NUMBERS, 5, 6],
        "hybrid_r": NUMBERS,
        "alpha": [*NUMBERS, 0.5, -2.5],
        "gralora_k": NUMBERS,
        "gralora_dropout": [0.0, 0, 0.1, 0.999, 1, 1.5, -0.1, None, "0.1", True],
        "init_weights": SWITCH,
        "bias": ["none", "all", "gralora_only", "some", None],
        "fan_in_fan_out": [True, False],
    },
    differences=(
        Difference("we", r"gralora_dropout=(1|1\.0|-0\.1): a probability", "PEFT divides by zero at 1, and ignores what is below 0"),
        Difference("we", r"gralora_k=True is of type bool", "a truth value as a number: PEFT computes with 1"),
    ),
    models={
        "gralora": (even, gralora(target_modules=["c", "d"])),
        "gpt2 Conv1D gralora": (gpt2, gralora(hybrid_r=2, target_modules=["c_attn", "c_fc"])),
    },
    wrong_starts={
        "GraLoRA's A within 1 / sqrt(in)": (
            "gralora.linear-both.init-default",
            replaced("gralora_A", lambda c, v, rng: v / math.sqrt(2)),
            "init-wrong-law",
        ),
        "GraLoRA's B random": (
            "gralora.transposed-both.init-default",
            replaced("gralora_B", lambda c, v, rng: rng.uniform(-1, 1, v.shape)),
            "init-not-identity",
        ),
    },
    tour=Tour("GraloraConfig", {"r": 2, "alpha": 3}),
)
