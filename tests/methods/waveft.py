"""WaveFT, as the tests need to know it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from peft_ref.methods.waveft import WaveFT
from tests.methods.config_words import LAYERS, NUMBERS, SIZES, SWITCH, TARGETS
from tests.methods.facts import Difference, Facts, Tour
from tests.methods.wrong import replaced


def waveft(**options: Any) -> Any:
    import peft

    return peft.WaveFTConfig(**{"target_modules": ["q", "up"], "n_frequency": 9, **options})


def gpt2() -> Any:
    from tests.files.peft_models import gpt2 as model

    return model()


def as_made(module: Any, method: Any) -> bool:
    from tests.files.peft_models import layer_of

    same = module.waveft_indices["default"].numpy() == np.stack(method.places(layer_of(module)))
    told = (module.waveft_scaling["default"], module.waveft_wavelet_family["default"], module.waveft_use_idwt["default"])
    return bool(same.all() and told == (method.scaling, method.wavelet_family, method.use_idwt))


FACTS = Facts(
    settings={
        "waveft": WaveFT(n_frequency=6, scaling=20.0),
        "waveft-db3": WaveFT(n_frequency=20, scaling=2.5, wavelet_family="db3", random_loc_seed=3),
        "waveft-sym4": WaveFT(n_frequency=20, wavelet_family="sym4", scaling=3.0),
        "waveft-coif4": WaveFT(n_frequency=9, wavelet_family="coif4", scaling=3.0),
        "waveft-places": WaveFT(n_frequency=20, use_idwt=False),
    },
    small={"n_frequency": 3},
    fields={
        "n_frequency": st.sampled_from((1, 2, 3)),
        "scaling": st.sampled_from((2, 3.5)),
        "wavelet_family": st.sampled_from(("db1", "db2", "coif1")),
        "budget": st.sampled_from((0, 4)),
        "entries": st.sampled_from((0, 40)),
    },
    fresh={"init_weights": st.just(True)},
    few={"n_frequency": st.just(3), "wavelet_family": st.just("db2")},
    config={"peft_type": "WAVEFT", "n_frequency": 6, "target_modules": ["q", "up"]},
    space=TARGETS
    | LAYERS
    | {
        "n_frequency": NUMBERS,
        "n_frequency_pattern": SIZES,
        "wavelet_family": ["db1", "sym3", "coif4", "haar", "db11", "coif5", "db39"],
        "use_idwt": [True, False],
        "proportional_parameters": [True, False, None],
        "scaling": [150, 1.5, 0, -2],
        "random_loc_seed": [777, 0, -1, 2**40, "7", 1.5, None],
        "init_weights": SWITCH,
        "fan_in_fan_out": [True, False],
    },
    made=as_made,
    differences=(
        Difference("we", r"wavelet_family=.*no filter", "PEFT makes the adapter, and crashes in forward: WAVEFT-Q1"),
        Difference("we", r"n_frequency_pattern (of '|is a)", "PEFT checks a value when a module asks for it, and here none did"),
        Difference("we", r"(n_frequency|random_loc_seed)=.*(is of type|positive)", "PEFT checks it when a module is made"),
    ),
    models={
        "waveft": (None, lambda: waveft(n_frequency_pattern={"up": 5})),
        "gpt2 Conv1D waveft": (gpt2, lambda: waveft(target_modules=["c_attn"], fan_in_fan_out=True)),
    },
    wrong_starts={
        "WaveFT's spectrum random": (
            "waveft.linear.init-default",
            replaced("spectrum", lambda c, v, rng: rng.normal(size=v.shape)),
            "init-not-identity",
        ),
        "WaveFT's False as FourierFT's": (
            "waveft.linear.init-false",
            replaced("spectrum", lambda c, v, rng: rng.normal(size=v.shape)),
            "init-wrong-law",
        ),
    },
    bits=None,  # irrational filters
    irrational=True,  # all but Haar
    tour=Tour("WaveFTConfig", {"n_frequency": 3}),
)
