"""LoKr, as the tests need to know it."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from peft_ref.methods.lokr import LoKr
from tests.methods.config_words import LAYERS, NUMBERS, PATTERNS, SWITCH, TARGETS, flip, pattern, random_word
from tests.methods.facts import Difference, Facts, Tour
from tests.methods.wrong import replaced

EVERY = ["q", "up", "conv1", "conv2"]


def lokr(**options: Any) -> Any:
    import peft

    return lambda: peft.LoKrConfig(**{"target_modules": EVERY, **options})


def wide() -> Any:
    from torch import nn

    return nn.ModuleDict({"c": nn.Conv2d(24, 40, (2, 1)), "d": nn.Conv1d(24, 40, 3)})


def random_config(rng: Any, common: dict[str, Any]) -> Any:
    return lokr(
        **common,
        r=int(rng.integers(1, 9)),
        alpha=random_word(rng, 3, 0.5),
        decompose_both=flip(rng),
        decompose_factor=random_word(rng, -1, 2, 3, 5),
        use_effective_conv2d=flip(rng),
        init_weights=random_word(rng, True, False, "lycoris"),
        rank_pattern=pattern(rng),
        alpha_pattern=pattern(rng),
    )()


FACTS = Facts(
    random=random_config,
    small={"r": 2},
    settings={
        "lokr": LoKr(r=2, alpha=3, decompose_factor=2),
        "lokr-full": LoKr(r=8, alpha=12),
        "lokr-both": LoKr(r=2, alpha=3, decompose_both=True, decompose_factor=6),
        "lokr-both-low": LoKr(r=1, alpha=3, decompose_both=True),
        "lokr-core": LoKr(r=2, alpha=3, use_effective_conv2d=True, decompose_factor=1),
    },
    fields={"decompose_factor": st.sampled_from((-1, 1, 2, 3))},
    config={"peft_type": "LOKR", "r": 4, "alpha": 6, "target_modules": ["q", "up"]},
    space=TARGETS
    | LAYERS
    | PATTERNS
    | {
        "r": NUMBERS,
        "alpha": [*NUMBERS, 0.5, -2.5],
        "init_weights": [*SWITCH, "lycoris", "Lycoris", "magic"],
        "rank_dropout": [0.0, 0.5, 1.5, -1, None, "0.1"],
        "module_dropout": [0.0, 0.5, 1.5, None, "0.1"],
        "rank_dropout_scale": [True, False, None],
        "use_effective_conv2d": SWITCH,
        "decompose_both": SWITCH,
        "decompose_factor": [-1, 1, 2, 3, 5, 7, 0, -2, 100, None, "2", 2.0, True],
    },
    differences=(
        Difference("we", r"(use_effective_conv2d|decompose_both)=('|\[).* expected bool", "a text as a switch: PEFT takes 'no' for true"),
        Difference("we", r"init_weights='(yes|Lycoris|magic)' is not known", "a text that is no name: PEFT takes it for true"),
    ),
    models={
        "lokr": (None, lokr(r=2, alpha=3, decompose_factor=2)),
        "lokr full": (None, lokr(r=8, rank_pattern={"q": 4})),
        "lokr both": (None, lokr(r=1, alpha=2, decompose_both=True, target_modules=["q", "head"])),
        "lokr core": (wide, lokr(r=2, alpha=3, use_effective_conv2d=True, target_modules=["c", "d"])),
    },
    wrong_starts={
        "LoKr's W1 random": (
            "lokr.linear-both.init-default",
            replaced("w1", lambda c, v, rng: rng.uniform(-1, 1, v.shape)),
            "init-not-identity",
        ),
        "LoKr's W2b by its rows": (
            "lokr.conv2d-both.init-default",
            replaced("w2", lambda c, v, rng: v * math.sqrt(v[0].size / v.shape[0]) * 2),
            "init-wrong-bound",
        ),
        "LoKr's lycoris ignored": (
            "lokr.linear-both.init-lycoris",
            replaced("w2_b", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / 2),
            "init-not-identity",
        ),
    },
    tour=Tour("LoKrConfig", {"r": 2, "alpha": 3}, frozenset({"gpt2"})),  # no Conv1D
)
