"""BOFT, as the tests need to know it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from peft_ref.layers import Conv, Linear
from peft_ref.methods.boft import BOFT
from tests.methods.config_words import LAYERS, SWITCH, TARGETS
from tests.methods.facts import Difference, Facts, Tour
from tests.methods.wrong import replaced


def numbers(name: str, values: Any) -> Any:
    """A scale that can be divided by."""
    return np.abs(values) + 0.5 if name == "s" else values


def as_made(module: Any, method: Any) -> bool:
    from tests.files.peft_models import layer_of

    return bool((module.boft_block_num["default"], module.boft_block_size["default"]) == method.blocks(layer_of(module)))


def boft(**options: Any) -> Any:
    import peft

    return peft.BOFTConfig(**{"target_modules": ["q"], **options})


def small_conv() -> Any:
    from torch import nn

    return nn.ModuleDict({"c": nn.Conv2d(4, 6, 2)})


SEVERAL = ("two", "three", "two-small", "three-any-angle", "vector", "two-adapters")  # variants with more than one factor


# Live PEFT has one factor where its CUDA kernel is missing: several are compared in tests/spec/test_hf_boft_quirks.py.
FACTS = Facts(
    settings={"boft": BOFT(boft_block_size=5), "boft-two": BOFT(boft_block_size=2), "boft-num": BOFT(boft_block_size=0, boft_block_num=1)},
    numbers=numbers,
    unable=lambda case, dtype: case.split(".")[2] in SEVERAL,
    fields={
        "boft_block_size": st.sampled_from((2, 4)),
        "boft_n_butterfly_factor": st.sampled_from((1, 2, 3)),
    },
    few={"boft_block_size": st.just(2), "boft_n_butterfly_factor": st.just(2)},
    layers={
        "linear": st.builds(Linear, in_features=st.sampled_from((4, 8, 16)), out_features=st.integers(1, 5)),
        "conv2d": st.builds(
            lambda n_in, out, s, p: Conv(in_channels=n_in, out_channels=out, kernel_size=(2, 2), stride=(s, s), padding=(p, p)),
            st.sampled_from((1, 2, 4)),
            st.integers(1, 4),
            st.integers(1, 3),
            st.integers(0, 2),
        ),
    },
    few_layers={
        "linear": Linear(in_features=8, out_features=5),
        "conv2d": Conv(in_channels=2, out_channels=4, kernel_size=(2, 2), stride=(2, 2), padding=(1, 1)),
    },
    config={"peft_type": "BOFT", "boft_block_size": 3, "target_modules": ["q", "up"]},
    space=TARGETS
    | LAYERS
    | {
        "boft_block_size": [1, 2, 3, 6, 4, 0, "8", None, 2.5, [4], 1000],
        "boft_block_num": [0, 2, "8", None, [4]],
        "boft_dropout": [0.0, 0.5],
        "init_weights": [True, False],
        "fan_in_fan_out": SWITCH,
        "bias": ["none", "all", "boft_only", "some_only", "some", "", None, True],
    },
    made=as_made,
    differences=(
        Difference(
            "we", r"BOFT on a convolution with groups=1, kernel_size=\(3, 2\)", "PEFT takes the kernel for a square, raises in forward"
        ),
    ),
    bits=None,  # the inverse in a Cayley transform is short of hand-picked turns alone
    models={
        "boft": (None, lambda: boft(boft_block_size=3, target_modules=["q", "up"], modules_to_save=["head"])),
        "boft by number": (None, lambda: boft(boft_block_size=0, boft_block_num=2, bias="all")),
        "boft conv": (small_conv, lambda: boft(boft_block_size=8, target_modules=["c"])),
    },
    wrong_starts={
        "BOFT's scale at zero": ("boft.linear-blocks.init-default", replaced("boft_s", lambda c, v, rng: 0 * v), "init-not-identity"),
        "BOFT's blocks drawn": (
            "boft.linear-blocks.init-default",
            replaced("boft_R", lambda c, v, rng: rng.normal(0, 0.1, v.shape)),
            "init-not-identity",
        ),
    },
    tour=Tour("BOFTConfig", {"boft_block_size": 2}, frozenset({"gpt2"})),  # no Conv1D
)
