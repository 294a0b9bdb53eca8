"""FourierFT, as the tests need to know it."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from peft_ref.methods.fourierft import FourierFT
from tests.methods.c3a import MORE_SIZES, SIZES
from tests.methods.config_words import LAYERS, NUMBERS, SWITCH, TARGETS
from tests.methods.facts import Facts, Tour
from tests.methods.wrong import replaced


def fourierft(**options: Any) -> Any:
    import peft

    return peft.FourierFTConfig(**{"n_frequency": 9, "target_modules": ["q", "up"], **options})


def as_made(module: Any, method: Any) -> bool:
    return bool(module.fourierft_n_frequency["default"] == method.n_frequency and module.fourierft_scaling["default"] == method.scaling)


FACTS = Facts(
    settings={"fourierft": FourierFT(n_frequency=6, scaling=20.0)},
    required={"n_frequency": 6},
    small={"n_frequency": 6},
    fields={"n_frequency": st.sampled_from((1, 2, 3)), "scaling": st.sampled_from((2, 3.5))},
    fresh={"init_weights": st.just(True)},
    few={"n_frequency": st.just(3)},
    config={"peft_type": "FOURIERFT", "n_frequency": 6, "target_modules": ["q", "up"]},
    space=TARGETS
    | LAYERS
    | {
        "n_frequency": NUMBERS,
        "n_frequency_pattern": [*SIZES, *MORE_SIZES],
        "scaling": [150, 1.5, 0, -2],
        "random_loc_seed": [777, 0, -1, 2**40, "7", 1.5, None],
        "init_weights": SWITCH,
        "fan_in_fan_out": [True, False],
    },
    made=as_made,
    models={"fourierft": (None, lambda: fourierft(n_frequency_pattern={"up": 5}))},
    unable=lambda case, dtype: ".init" not in case and ".config" not in case and ".state-dict" not in case and dtype == "float64",
    wrong_starts={
        "FourierFT's spectrum zero": ("fourierft.linear.init-default", replaced("spectrum", lambda c, v, rng: v * 0), "init-zero"),
        "FourierFT's True ignored": (
            "fourierft.linear.init-true",
            replaced("spectrum", lambda c, v, rng: rng.normal(size=v.shape)),
            "init-not-identity",
        ),
    },
    bits=None,  # waves
    irrational=True,
    tour=Tour("FourierFTConfig", {"n_frequency": 6}),
)
