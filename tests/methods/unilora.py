"""Uni-LoRA, as the tests need to know it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from peft_ref.methods.unilora import UniLoRA
from tests.methods.config_words import LAYERS, SWITCH, TARGETS
from tests.methods.facts import Facts, Tour
from tests.methods.wrong import replaced


def unilora(**options: Any) -> Any:
    import peft

    return peft.UniLoraConfig(**{"target_modules": ["q"], "theta_d_length": 17, **options})


def gpt2() -> Any:
    from tests.files.peft_models import gpt2 as model

    return model()


FACTS = Facts(
    settings={
        "unilora": UniLoRA(r=3, theta_d_length=7, save_indices=True),
        "unilora-many": UniLoRA(r=2, theta_d_length=90, save_indices=True, init_weights=False),
    },
    float32_functions=(("peft.tuners.unilora.model", "UniLoraModel", "_assign_unilora_indices_and_scales"),),
    made_in_float32=True,  # its counts are: they are no numbers of the layer
    small={"r": 2, "theta_d_length": 9},
    fields={"theta_d_length": st.sampled_from((5, 1, 30)), "proj_seed": st.sampled_from((42, 0)), "unilora_dropout": st.just(0.0)},
    few={"theta_d_length": st.just(5), "save_indices": st.just(True)},
    config={"peft_type": "UNILORA", "r": 4, "theta_d_length": 9, "target_modules": ["q", "up"]},
    space={word: values for word, values in TARGETS.items() if word != "exclude_modules"}
    | LAYERS
    | {
        "r": [1, 2, 3, 8, 0, -1],
        "theta_d_length": [9, 3, 200],
        "proj_seed": [42, 0, 7],
        "unilora_dropout": [0.0, 0.5],
        "init_theta_d_bound": [0.02, 0.5],
        "init_weights": SWITCH,
        "save_indices": [True, False],
    },
    made=lambda module, method: module.r["default"] == method.r,
    models={
        "unilora": (None, lambda: unilora(r=4, target_modules=["q", "up"], modules_to_save=["head"])),
        "unilora with its places": (None, lambda: unilora(r=3, target_modules=["q", "up"], save_indices=True)),
        "unilora gpt2 Conv1D": (gpt2, lambda: unilora(r=3, target_modules=["c_attn", "c_fc"], save_indices=True, bias="all")),
    },
    wrong_starts={
        "Uni-LoRA's places shuffled": (
            "unilora.linear.init-wide",
            replaced("indices_A", lambda case, v, rng: rng.permuted(v)),
            "init-other-places",
        ),
        "Uni-LoRA's scales one": (
            "unilora.linear.init-default",
            replaced("scales_B", lambda case, v, rng: np.ones(v.shape)),
            "init-other-scales",
        ),
        "Uni-LoRA's theta normal": (
            "unilora.linear.init-default",
            replaced("theta", lambda case, v, rng: rng.normal(size=v.shape)),
            "init-wrong-bound",
        ),
        "Uni-LoRA's theta zero": (
            "unilora.linear.init-default",
            replaced("theta", lambda case, v, rng: np.zeros(v.shape)),
            "init-nothing-to-train",
        ),
    },
    tour=Tour("UniLoraConfig", {"r": 2, "theta_d_length": 9}),
)
