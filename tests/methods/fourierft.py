"""FourierFT, as the tests need to know it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from peft_ref.check.case import LAYER_OPERATIONS
from peft_ref.methods.fourierft import FourierFT
from tests.methods.config_words import LAYERS, NUMBERS, SIZES, SWITCH, TARGETS
from tests.methods.facts import Difference, Facts, Tour
from tests.methods.wrong import replaced


def fourierft(**options: Any) -> Any:
    import peft

    return peft.FourierFTConfig(**{"target_modules": ["q", "up"], "n_frequency": 9, **options})


def gpt2() -> Any:
    from tests.files.peft_models import gpt2 as model

    return model()


def as_made(module: Any, method: Any) -> bool:
    from tests.files.peft_models import layer_of

    same = module.indices["default"].numpy() == np.stack(method.frequencies(layer_of(module)))
    return bool(same.all() and module.fourierft_scaling["default"] == method.scaling)


FACTS = Facts(
    settings={"fourierft": FourierFT(n_frequency=6, scaling=20.0), "fourierft-seed": FourierFT(n_frequency=20, random_loc_seed=3)},
    float32_modules=("peft.tuners.fourierft.layer",),
    unable=lambda case, dtype: dtype == "float64" and case.endswith(LAYER_OPERATIONS),  # it computes in float32
    small={"n_frequency": 3},
    fields={"n_frequency": st.sampled_from((1, 2, 3)), "scaling": st.sampled_from((2, 3.5))},
    fresh={"init_weights": st.just(True)},
    few={"n_frequency": st.just(3)},
    config={"peft_type": "FOURIERFT", "n_frequency": 6, "target_modules": ["q", "up"]},
    space=TARGETS
    | LAYERS
    | {
        "n_frequency": NUMBERS,
        "n_frequency_pattern": SIZES,
        "scaling": [150, 1.5, 0, -2],
        "random_loc_seed": [777, 0, -1, 2**40, "7", 1.5, None],
        "init_weights": SWITCH,
        "fan_in_fan_out": [True, False],
    },
    made=as_made,
    differences=(
        Difference("we", r"n_frequency_pattern (of '|is a)", "PEFT checks a value when a module asks for it, and here none did"),
        Difference("we", r"(n_frequency|random_loc_seed)=.*(is of type|positive)", "PEFT checks it when a module is made"),
    ),
    models={
        "fourierft": (None, lambda: fourierft(n_frequency_pattern={"up": 5})),
        "gpt2 Conv1D fourierft": (gpt2, lambda: fourierft(target_modules=["c_attn"], fan_in_fan_out=True)),
    },
    wrong_starts={
        "FourierFT's spectrum zero": ("fourierft.linear.init-default", replaced("spectrum", lambda c, v, rng: v * 0), "init-zero"),
        "FourierFT's True ignored": (
            "fourierft.linear.init-true",
            replaced("spectrum", lambda c, v, rng: rng.normal(size=v.shape)),
            "init-not-identity",
        ),
    },
    bits=None,  # cosines
    irrational=True,
    tour=Tour("FourierFTConfig", {"n_frequency": 3}),
)
