"""TinyLoRA, as the tests need to know it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from peft_ref.methods.tinylora import TinyLoRA
from tests.methods.config_words import LAYERS, OWN_TARGETS, SWITCH
from tests.methods.facts import Facts, Tour
from tests.methods.wrong import Draw, replaced


def tinylora(**options: Any) -> Any:
    import peft

    return peft.TinyLoraConfig(**{"r": 2, "u": 3, "target_modules": ["q", "up"], **options})


def gpt2() -> Any:
    from tests.files.peft_models import gpt2 as model

    return model()


def as_made(module: Any, method: Any) -> bool:
    from tests.files.peft_models import layer_of

    return bool(module.r["default"] == method.dims(layer_of(module))["r"] and module.u["default"] == method.u)


def one_half(case: Any, draw: Draw, rng: Any) -> Draw:
    """The singular values in B alone."""
    length = np.linalg.norm(draw["tinylora_A"], axis=1)
    return {**draw, "tinylora_A": draw["tinylora_A"] / length[:, None], "tinylora_B": draw["tinylora_B"] * length}


FACTS = Facts(
    settings={
        "tinylora": TinyLoRA(r=2, u=3),
        "tinylora-capped": TinyLoRA(r=9, u=4, init_weights="uniform"),
        "tinylora-seeded": TinyLoRA(r=3, u=5, save_projection=False),
    },
    unable=lambda case, dtype: case == "tinylora.state-dict.0",  # TINYLORA-Q4
    small={"r": 2, "u": 3},
    fields={
        "u": st.sampled_from((3, 1, 5)),
        "weight_tying": st.sampled_from((0.0, 1.0)),
        "save_projection": st.just(True),
        "tinylora_dropout": st.just(0.0),
    },
    few={"u": st.just(3), "save_projection": st.just(True)},
    without_signs=lambda p: {"product": p["B"] @ p["A"], "A": np.abs(p["A"]), "P": p["P"], "v": p["v"]},
    config={"peft_type": "TINYLORA", "r": 2, "u": 3, "target_modules": ["q", "up"]},
    space=OWN_TARGETS
    | LAYERS
    | {
        "r": [1, 2, 3, 8, 0, -1],
        "u": [1, 2, 13, 0, -1],
        "weight_tying": [0.0, 0.25, 0.5, 1, 1.5, -0.5],
        "projection_seed": [42, 0, 2**33],
        "save_projection": [True, False],
        "init_v_bound": [0.02, 0, 1],
        "tinylora_dropout": [0.0, 0.5],
        "init_weights": [*SWITCH, "uniform", "magic"],
        "bias": ["none", "all", "tinylora_only"],
        "fan_in_fan_out": [True, False],
    },
    made=as_made,
    models={
        "tinylora": (None, lambda: tinylora(target_modules=["q", "up", "table"], modules_to_save=["head"])),
        "tinylora tied": (None, lambda: tinylora(u=5, weight_tying=0.5)),
        # of fewer than 16 numbers, which torch draws to the bit as here
        "tinylora from its seed": (None, lambda: tinylora(weight_tying=1.0, save_projection=False, projection_seed=5)),
        "tinylora gpt2 Conv1D": (gpt2, lambda: tinylora(target_modules=["c_attn", "c_fc", "wpe"], weight_tying=0.25, bias="all")),
    },
    wrong_starts={
        "TinyLoRA's v one": ("tinylora.linear.init-default", replaced("_v", lambda c, v, rng: np.ones(v.shape)), "init-not-identity"),
        "TinyLoRA's v zero": (
            "tinylora.linear.init-uniform",
            replaced("_v", lambda c, v, rng: np.zeros(v.shape)),
            "init-nothing-to-train",
        ),
        "TinyLoRA's P of another seed": (
            "tinylora.linear.init-other-seed",
            replaced("_P", lambda c, v, rng: rng.permuted(v)),
            "init-other-projections",
        ),
        "TinyLoRA's A random": (
            "tinylora.embedding.init-default",
            replaced("_A", lambda c, v, rng: rng.normal(size=v.shape)),
            "init-wrong-part",
        ),
        "TinyLoRA's singular values in B alone": ("tinylora.linear.init-default", one_half, "init-wrong-halves"),
    },
    tour=Tour("TinyLoraConfig", {"r": 2, "u": 3}),
)
