"""C3A, as the tests need to know it."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from peft_ref.layers import Linear
from peft_ref.methods.c3a import C3A
from tests.methods.config_words import LAYERS, NUMBERS, OWN_TARGETS
from tests.methods.facts import Difference, Facts
from tests.methods.wrong import fan_in, replaced

SIZES: list[Any] = [*({"q": size} for size in (2, 1, 3, 0, -1, "2", None)), {r"layers\.1\.q": 2}, {"layers.0.q": 2}, {"q|up": 2}]
MORE_SIZES: list[Any] = [{"(q": 2}, {"none": 0}, {}, [], ["q"], None, 3]


def c3a(**options: Any) -> Any:
    import peft

    return peft.C3AConfig(target_modules=["q", "up"], **options)


FACTS = Facts(
    settings={"c3a": C3A(block_size=1), "c3a-blocks": C3A(block_size=3)},
    compared="test_c3a.py",  # PEFT computes in float32, and has gradients of its own
    required={"block_size": 1},
    small={"block_size": 2},
    fields={"block_size": st.sampled_from((1, 2, 3))},
    fresh={"init_weights": st.just(True)},
    few={"block_size": st.just(2)},
    few_layers={"linear": Linear(in_features=6, out_features=4)},
    config={"peft_type": "C3A", "block_size": 1, "target_modules": ["q", "up"]},
    space=OWN_TARGETS
    | LAYERS
    | {
        "block_size": NUMBERS,
        "block_size_pattern": [*SIZES, *MORE_SIZES],
        "init_weights": [True, False, "gaussian", "xavier_uniform", "kaiming_uniform", "Gaussian", None, "", 1, 0, []],
    },
    made=lambda module, method: bool(module.block_size["default"] == method.block_size),
    differences=(
        Difference("we", r"block_size(_pattern of .*)?[=:].*(is of type|positive)", "PEFT asks when a module does, and here none did"),
    ),
    models={"c3a": (None, lambda: c3a(block_size=1, block_size_pattern={"q": 2}, bias="all"))},
    # It is float32 there, whatever the layer; several adapters are fed to one another, which square layers survive.
    unable=lambda case, dtype: ".init" not in case and ".config" not in case and ".state-dict" not in case and dtype == "float64",
    wrong_starts={
        "C3A's start bounded by in alone": (
            "c3a.linear-threes.init-default",
            replaced("c3a", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(fan_in(c))),
            "init-wrong-law",
        ),
        "C3A's True read as the default": (
            "c3a.linear-threes.init-true",
            replaced("c3a", lambda c, v, rng: rng.uniform(-0.6, 0.6, v.shape)),
            "init-not-identity",
        ),
    },
    bits=None,  # it may be computed by a Fourier transform
)
