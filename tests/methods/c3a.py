"""C3A, as the tests need to know it."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from peft_ref.check.case import LAYER_OPERATIONS
from peft_ref.layers import Linear
from tests.methods.config_words import LAYERS, NUMBERS, OWN_TARGETS, SIZES
from tests.methods.facts import Difference, Facts, Tour
from tests.methods.wrong import replaced


def c3a(**options: Any) -> Any:
    import peft

    return peft.C3AConfig(**{"target_modules": ["q", "up"], "block_size": 1, **options})


def divisible(block: int) -> Any:
    return st.builds(lambda n, m: Linear(in_features=block * n, out_features=block * m), st.integers(1, 3), st.integers(1, 3))


def unable(case: str, dtype: str) -> bool:
    """It computes in float32, and feeds one adapter's output to the next where in and out differ."""
    chained = ".linear-thirds.two-adapters." in case and case.endswith(("forward", "backward"))
    return chained or (dtype == "float64" and case.endswith(LAYER_OPERATIONS))


FACTS = Facts(
    compared="tests/hf/test_c3a.py",  # PEFT computes in float32, and has gradients of its own
    float32_modules=("peft.tuners.c3a.layer",),
    unable=unable,
    dialects={
        # its backward pass is chained too, and has the other mark as well
        "c3a-chained": lambda case, dtype: not unable(case, dtype) and case.endswith(".two-on-square.forward"),
        "c3a-input-gradient": lambda case, dtype: not unable(case, dtype) and case.endswith(".backward"),
    },
    small={"block_size": 1},
    fields={"block_size": st.sampled_from((1, 2, 3))},
    fresh={"init_weights": st.just(True)},
    few={"block_size": st.just(2)},
    layers={"linear": st.one_of(divisible(6), divisible(2), divisible(3))},
    few_layers={"linear": Linear(in_features=6, out_features=4)},
    config={"peft_type": "C3A", "block_size": 1, "target_modules": ["q", "up"]},
    space=OWN_TARGETS
    | LAYERS
    | {
        "block_size": NUMBERS,
        "block_size_pattern": SIZES,
        "init_weights": [True, False, "gaussian", "xavier_uniform", "kaiming_uniform", "Gaussian", None, "", 1, 0, []],
    },
    made=lambda module, method: module.block_size["default"] == method.block_size,
    differences=(
        Difference("we", r"block_size_pattern (of '|is a)", "PEFT checks a value when a module asks for it, and here none did"),
        Difference("we", r"init_weights=0 is of type int", "a number as a start: PEFT finds 0 equal to False"),
        Difference(
            "we", r"(block_size|init_weights)=.*(is of type|positive|is not known\.\n.*kaiming)", "PEFT checks it when a module is made"
        ),
    ),
    models={"c3a": (None, lambda: c3a(block_size_pattern={"q": 2}, bias="all"))},
    wrong_starts={
        "C3A's start bounded by in alone": (
            "c3a.linear-thirds.init-default",
            replaced("c3a", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(6)),
            "init-wrong-law",
        ),
        "C3A's True read as the default": (
            "c3a.linear-thirds.init-true",
            replaced("c3a", lambda c, v, rng: rng.uniform(-0.6, 0.6, v.shape)),
            "init-not-identity",
        ),
    },
    bits=None,  # it may be computed by a Fourier transform
    tour=Tour("C3AConfig", {"block_size": 2}, frozenset({"gpt2"})),  # no Conv1D
)
