"""MiSS, and what its two siblings have in common with it, as the tests need to know it."""

from __future__ import annotations

import math
from typing import Any

from peft_ref.layers import Linear
from peft_ref.methods.miss import MiSS
from tests.methods.config_words import LAYERS, NUMBERS, SWITCH, TARGETS, flip
from tests.methods.facts import Difference, Facts, Tour
from tests.methods.wrong import replaced

EVEN = {"linear": Linear(in_features=6, out_features=4)}  # which blocks of two fit


def miss(**options: Any) -> Any:
    import peft

    return lambda: peft.MissConfig(**{"target_modules": ["q", "up"], **options})


def random_config(rng: Any, common: dict[str, Any]) -> Any:
    return miss(**{**common, "r": int(rng.integers(1, 7)), "init_weights": flip(rng), "target_modules": ["q", "up"]})()


FACTS = Facts(
    random=random_config,
    small={"r": 2},
    settings={"miss": MiSS(r=2), "miss-blocks": MiSS(r=4)},
    config={"peft_type": "MISS", "r": 4, "target_modules": ["q", "up"]},
    space=TARGETS
    | LAYERS
    | {
        "r": [*NUMBERS, 5, 6],
        "mini_r": NUMBERS,
        "miss_dropout": [0.0, 0, 0.1, 0.999, 1, 1.5, -0.1, None, "0.1", True],
        "init_weights": [*SWITCH, "mini", "bat", "Bat", "magic"],
        "bias": ["none", "all", "MiSS_only", "some", None],
    },
    made=lambda module, method: bool(module.miss_r["default"] == method.r),
    differences=(
        Difference("we", r"miss_dropout=(1|1\.0|-0\.1): a probability", "PEFT divides by zero at 1, and ignores what is below 0"),
    ),
    models={"miss": (None, miss(r=4))},
    wrong_starts={
        "MiSS's block random": (
            "miss.linear.init-default",
            replaced("miss", lambda c, v, rng: rng.uniform(-1, 1, v.shape)),
            "init-not-identity",
        ),
        "MiSS's False ignored": ("miss.linear.init-false", replaced("miss", lambda c, v, rng: v * 0), "init-A-zero"),
        "MiSS within 1 / sqrt(r)": (
            "miss.linear.init-false",
            replaced("miss", lambda c, v, rng: v * math.sqrt(7 / 4)),
            "init-wrong-bound",
        ),
    },
    bits="bfloat16",  # two numbers are multiplied, no more
    tour=Tour("MissConfig", {"r": 2}, frozenset({"gpt2"})),  # no Conv1D
)
