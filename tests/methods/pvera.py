"""PVeRA, as the tests need to know it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from peft_ref.layers import Linear
from peft_ref.methods.pvera import PVeRA
from tests.methods.config_words import LAYERS, NUMBERS, SWITCH, TARGETS
from tests.methods.facts import Facts, Tour
from tests.methods.wrong import replaced


def pvera(**options: Any) -> Any:
    import peft

    return peft.PveraConfig(**{"target_modules": ["q"], **options})


def gpt2() -> Any:
    from tests.files.peft_models import gpt2 as model

    return model()


def beside(method: Any) -> Any:
    return None if method.widest_in is None else Linear(in_features=method.widest_in, out_features=method.widest_out)


def the_mean(tuner: Any) -> None:
    tuner._reparametrize = lambda mean, log_variance, name: mean


FACTS = Facts(
    settings={"pvera": PVeRA(r=4, widest_in=5, widest_out=7), "pvera-wide": PVeRA(r=4, widest_in=13, widest_out=14)},
    beside=beside,
    settle=the_mean,
    small={"r": 3},
    fields={
        "widest_in": st.sampled_from((None, 9)),
        "widest_out": st.sampled_from((None, 8)),
        "save_projection": st.just(True),
        "pvera_dropout": st.just(0.0),
        "sample_at_inference": st.just(False),
    },
    few={"sample_at_inference": st.just(False), "widest_in": st.just(7), "widest_out": st.just(None), "save_projection": st.just(True)},
    config={"peft_type": "PVERA", "r": 4, "target_modules": ["q", "up"]},
    space={word: values for word, values in TARGETS.items() if word != "exclude_modules"}
    | LAYERS
    | {
        "r": NUMBERS,
        "projection_prng_key": [0, 5, 2**33],
        "save_projection": [True, False],
        "d_initial": [0.1, 0, 1, -0.5],
        "init_weights": SWITCH,
        "pvera_dropout": [0.0, 0.5],
        "sample_at_inference": [False],
        "generator_seed": [None, 3],
    },
    made=lambda module, method: module.r["default"] == method.r,
    models={
        "pvera": (None, lambda: pvera(r=4, target_modules=["q", "up"], modules_to_save=["head"])),
        "pvera from its seed": (None, lambda: pvera(r=3, target_modules=["q", "up"], save_projection=False, projection_prng_key=5)),
        "pvera gpt2 Conv1D": (gpt2, lambda: pvera(r=3, target_modules=["c_attn", "c_fc"], bias="all")),
    },
    wrong_starts={
        "PVeRA's b random": (
            "pvera.linear.init-default",
            replaced("lambda_b", lambda case, v, rng: rng.normal(size=v.shape)),
            "init-not-identity",
        ),
        "PVeRA's d one": ("pvera.linear.init-default", replaced("lambda_d", lambda case, v, rng: np.ones(v.shape)), "init-not-d-initial"),
        "PVeRA's A of another seed": (
            "pvera.linear.init-wide",
            replaced("pvera_A", lambda case, v, rng: rng.permuted(v)),
            "init-other-matrices",
        ),
    },
    tour=Tour("PveraConfig", {"r": 4}, frozenset()),
)
