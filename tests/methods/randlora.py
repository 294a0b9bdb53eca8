"""RandLoRA, as the tests need to know it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from peft_ref.layers import Linear
from peft_ref.methods.randlora import RandLoRA
from tests.methods.config_words import LAYERS, NUMBERS, SWITCH, TARGETS
from tests.methods.facts import Facts, Tour
from tests.methods.wrong import replaced


def randlora(**options: Any) -> Any:
    import peft

    return peft.RandLoraConfig(**{"target_modules": ["q"], **options})


def gpt2() -> Any:
    from tests.files.peft_models import gpt2 as model

    return model()


def beside(method: Any) -> Any:
    return None if method.widest_in is None else Linear(in_features=method.widest_in, out_features=method.widest_out)


PLAIN: dict[str, Any] = {"save_projection": True, "very_sparse": False, "randlora_dropout": 0.0}

FACTS = Facts(
    settings={
        "randlora": RandLoRA(r=3, randlora_alpha=6, widest_in=5, widest_out=7),
        "randlora-wide": RandLoRA(r=2, randlora_alpha=6, widest_in=16, widest_out=13),
    },
    beside=beside,
    unable=lambda case, dtype: "two-adapters" in case,
    small={"r": 4},
    fields={
        "randlora_alpha": st.sampled_from((2, 1, 3.5, 0.25)),
        "widest_in": st.just(9),  # of one number there is no deviation, and a few thrown signs may all be zero
        "widest_out": st.just(8),
        "sparse": st.just(False),
        **{name: st.just(value) for name, value in PLAIN.items()},
    },
    few={"widest_in": st.just(7), "widest_out": st.just(None), "sparse": st.just(False), **{n: st.just(v) for n, v in PLAIN.items()}},
    config={"peft_type": "RANDLORA", "r": 4, "randlora_alpha": 6, "target_modules": ["q", "up"]},
    space={word: values for word, values in TARGETS.items() if word != "exclude_modules"}
    | LAYERS
    | {
        "r": NUMBERS,
        "randlora_alpha": [6, 1, 2.5],
        "projection_prng_key": [0, 5],
        "save_projection": [True, False],
        "sparse": [True, False],
        "very_sparse": [True, False],
        "init_weights": SWITCH,
        "randlora_dropout": [0.0, 0.5],
    },
    models={
        "randlora": (None, lambda: randlora(r=4, randlora_alpha=6, target_modules=["q", "up"], modules_to_save=["head"])),
        "randlora from its seed": (None, lambda: randlora(r=3, target_modules=["q", "up"], save_projection=False, sparse=True)),
        "randlora gpt2 Conv1D": (gpt2, lambda: randlora(r=3, target_modules=["c_attn", "c_fc"], bias="all")),
    },
    wrong_starts={
        "RandLoRA's lambda random": (
            "randlora.linear.init-default",
            replaced("lambda", lambda case, v, rng: rng.normal(size=v.shape)),
            "init-not-identity",
        ),
        "RandLoRA's gamma one": (
            "randlora.linear.init-default",
            replaced("gamma", lambda case, v, rng: np.ones(v.shape)),
            "init-other-gamma",
        ),
        "RandLoRA's B of another seed": (
            "randlora.linear.init-sparse",
            replaced("randlora_B", lambda case, v, rng: rng.permuted(v)),
            "init-other-bases",
        ),
    },
    tour=Tour("RandLoraConfig", {"r": 4}, frozenset()),
)
