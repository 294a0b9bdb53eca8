"""VeRA, as the tests need to know it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from peft_ref.layers import Linear
from peft_ref.methods.vera import VeRA
from tests.methods.config_words import LAYERS, NUMBERS, SWITCH, TARGETS
from tests.methods.facts import Facts, Tour
from tests.methods.wrong import replaced


def vera(**options: Any) -> Any:
    import peft

    return peft.VeraConfig(**{"target_modules": ["q"], **options})


def gpt2() -> Any:
    from tests.files.peft_models import gpt2 as model

    return model()


def beside(method: Any) -> Any:
    return None if method.widest_in is None else Linear(in_features=method.widest_in, out_features=method.widest_out)


FACTS = Facts(
    settings={"vera": VeRA(r=4, widest_in=5, widest_out=7), "vera-wide": VeRA(r=4, widest_in=13, widest_out=14)},
    beside=beside,
    small={"r": 3},
    fields={
        "widest_in": st.sampled_from((None, 9)),
        "widest_out": st.sampled_from((None, 8)),
        "save_projection": st.just(True),
        "vera_dropout": st.just(0.0),
    },
    few={"widest_in": st.just(7), "widest_out": st.just(None), "save_projection": st.just(True)},
    config={"peft_type": "VERA", "r": 4, "target_modules": ["q", "up"]},
    space={word: values for word, values in TARGETS.items() if word != "exclude_modules"}
    | LAYERS
    | {
        "r": NUMBERS,
        "projection_prng_key": [0, 5, 2**33],
        "save_projection": [True, False],
        "d_initial": [0.1, 0, 1, -0.5],
        "init_weights": SWITCH,
        "vera_dropout": [0.0, 0.5],
    },
    made=lambda module, method: module.r["default"] == method.r,
    models={
        "vera": (None, lambda: vera(r=4, target_modules=["q", "up"], modules_to_save=["head"])),
        "vera from its seed": (None, lambda: vera(r=3, target_modules=["q", "up"], save_projection=False, projection_prng_key=5)),
        "vera gpt2 Conv1D": (gpt2, lambda: vera(r=3, target_modules=["c_attn", "c_fc"], bias="all")),
    },
    wrong_starts={
        "VeRA's b random": (
            "vera.linear.init-default",
            replaced("lambda_b", lambda case, v, rng: rng.normal(size=v.shape)),
            "init-not-identity",
        ),
        "VeRA's d one": ("vera.linear.init-default", replaced("lambda_d", lambda case, v, rng: np.ones(v.shape)), "init-not-d-initial"),
        "VeRA's A of another seed": (
            "vera.linear.init-wide",
            replaced("vera_A", lambda case, v, rng: rng.permuted(v)),
            "init-other-matrices",
        ),
    },
    tour=Tour("VeraConfig", {"r": 4}, frozenset()),
)
