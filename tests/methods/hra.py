"""HRA, as the tests need to know it."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from peft_ref.layers import Conv, Linear
from peft_ref.methods.hra import HRA
from tests.methods.config_words import LAYERS, NUMBERS, SWITCH, TARGETS, flip
from tests.methods.facts import Difference, Facts, Tour
from tests.methods.wrong import replaced


def as_made(module: Any, method: Any) -> bool:
    return bool(module.hra_r["default"] == method.r and bool(module.hra_apply_GS["default"]) == method.apply_GS)


def hra(**options: Any) -> Any:
    import peft

    return peft.HRAConfig(**options)


def small_conv() -> Any:
    from torch import nn

    return nn.ModuleDict({"c": nn.Conv2d(4, 6, 2)})


def random_config(rng: Any, common: dict[str, Any]) -> Any:
    own = {"r": int(rng.integers(1, 5)), "init_weights": False, "apply_GS": flip(rng)}
    return hra(**{**common, **own, "target_modules": ["q", "up"]})


FACTS = Facts(
    random=random_config,
    small={"r": 2},
    settings={"hra": HRA(r=4), "hra-odd": HRA(r=3), "hra-orthogonal": HRA(r=4, apply_GS=True)},
    # Gram-Schmidt on any vectors is too ill conditioned for differences; its gradient is compared with PEFT's.
    fields={"apply_GS": st.just(False)},
    fresh={"r": st.sampled_from((2, 4))},  # only pairs cancel
    layers={
        # With few inputs a vector may be short, and differences of its direction inexact.
        "linear": st.builds(Linear, in_features=st.integers(5, 7), out_features=st.integers(1, 6)),
        "conv2d": st.builds(
            lambda n_in, out, s, p: Conv(in_channels=n_in, out_channels=out, kernel_size=(2, 2), stride=(s, s), padding=(p, p)),
            st.integers(2, 4),
            st.integers(1, 4),
            st.integers(1, 3),
            st.integers(0, 2),
        ),
    },
    few_layers={"conv2d": Conv(in_channels=2, out_channels=4, kernel_size=(2, 2), stride=(2, 2), padding=(1, 1))},
    config={"peft_type": "HRA", "r": 4, "target_modules": ["q", "up"]},
    space=TARGETS
    | LAYERS
    | {
        "r": NUMBERS,
        "apply_GS": SWITCH,
        "init_weights": SWITCH,
        "bias": ["none", "all", "hra_only", "some_only", "some", "", None, True],
    },
    made=as_made,
    differences=(
        Difference(
            "we", r"HRA on a convolution with groups=1, kernel_size=\(3, 2\)", "PEFT takes the kernel for a square and raises in forward"
        ),
    ),
    models={
        "hra": (None, lambda: hra(r=3, target_modules=["q", "up"], modules_to_save=["head"])),
        "hra conv": (small_conv, lambda: hra(r=2, apply_GS=True, init_weights=False, target_modules=["c"])),
    },
    wrong_starts={
        "HRA's vectors not in pairs": (
            "hra.linear.init-default",
            replaced("hra_u", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(2)),
            "init-not-in-pairs",
        ),
        "HRA's vectors of the bound of all columns": (
            "hra.linear.init-default",
            replaced("hra_u", lambda c, v, rng: v / math.sqrt(2)),
            "init-wrong-law",
        ),
    },
    bits="float64",
    irrational=True,
    tour=Tour("HRAConfig", {"r": 2}, frozenset({"gpt2"})),  # no Conv1D
)
