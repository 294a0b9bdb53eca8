"""HiRA, as the tests need to know it."""

from __future__ import annotations

import math
from typing import Any

from peft_ref.methods.hira import HiRA
from tests.methods.config_words import LAYERS, NUMBERS, PATTERNS, SWITCH, TARGETS, pattern
from tests.methods.facts import Difference, Facts, Tour
from tests.methods.wrong import Draw, key_with, replaced


def hira(**options: Any) -> Any:
    import peft

    return peft.HiraConfig(**options)


def gpt2() -> Any:
    from tests.files.peft_models import gpt2

    return gpt2()


def swapped(case: Any, draw: Draw, rng: Any) -> Draw:
    a, b = key_with(draw, "_A"), key_with(draw, "_B")
    return {**draw, a: rng.normal(size=draw[a].shape), b: draw[b] * 0}


def random_config(rng: Any, common: dict[str, Any]) -> Any:
    own = {"r": int(rng.integers(1, 9)), "hira_dropout": float(rng.random()), "rank_pattern": pattern(rng)}
    return hira(**own, **common)


FACTS = Facts(
    random=random_config,
    dialects={"unmerge-saved-copy": lambda case, dtype: case.endswith(".unmerge")},
    small={"r": 2},
    settings={"hira": HiRA(r=4)},
    config={"peft_type": "HIRA", "r": 4, "target_modules": ["q", "up"]},
    space=TARGETS
    | LAYERS
    | {
        "r": NUMBERS,
        "rank_pattern": PATTERNS["rank_pattern"],
        "hira_dropout": [0.0, 0, 0.1, 0.999, 1, 1.5, -0.1, None, "0.1", True],
        "init_weights": [*SWITCH, "gaussian", "Gaussian", "magic"],
        "fan_in_fan_out": [True, False],
    },
    made=lambda module, method: bool(module.r["default"] == method.r),
    differences=(
        Difference("we", r"hira_dropout=(1|1\.0|-0\.1): a probability", "PEFT divides by zero at 1, and ignores what is below 0"),
    ),
    models={
        "hira": (None, lambda: hira(r=4, target_modules=["q", "up", "conv1", "conv2", "conv3", "table"])),
        "gpt2 Conv1D hira": (gpt2, lambda: hira(r=3, target_modules=["c_attn", "c_fc"])),
    },
    wrong_starts={
        "HiRA's B random": ("hira.linear.init-default", replaced("_B", lambda c, v, rng: rng.normal(size=v.shape)), "init-not-identity"),
        "HiRA's embedding the other way": ("hira.embedding.init-default", swapped, "embedding-init-swapped"),
        "HiRA's gaussian ignored": (
            "hira.linear.init-gaussian",
            replaced("_A", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(v.shape[1])),
            "init-wrong-law",
        ),
        "HiRA's A within 1 / sqrt(channels)": (
            "hira.conv2d.init-default",
            replaced("_A", lambda c, v, rng: v * math.sqrt(v[0, 0].size)),
            "init-wrong-bound",
        ),
    },
    tour=Tour("HiraConfig", {"r": 2}),
)
