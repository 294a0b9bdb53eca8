"""IA3, as the tests need to know it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_ref.methods.ia3 import IA3
from tests.methods.config_words import SWITCH, TARGETS, random_word
from tests.methods.facts import Facts, Tour


def peft_options(method: IA3) -> Mapping[str, Any]:
    return {"feedforward_modules": ["target"] if method.is_feedforward else [], "init_ia3_weights": method.init_ia3_weights}


def as_made(module: Any, method: Any) -> bool:
    return bool(module.is_feedforward == method.is_feedforward)


def random_config(rng: Any, common: dict[str, Any]) -> Any:
    import peft

    return peft.IA3Config(feedforward_modules=random_word(rng, ["up"], [], r".*\.up", None), **common)


FACTS = Facts(
    random=random_config,
    # It divides by l + 1e-8; in float32 that is l.
    dialects={"ia3-unmerge-epsilon": lambda case, dtype: dtype == "float64" and case.endswith(".unmerge")},
    settings={"ia3": IA3(), "ia3-feedforward": IA3(is_feedforward=True)},
    peft_options=peft_options,
    numbers=lambda name, values: np.abs(values) + 0.5,  # to unmerge it is divided by
    config={"peft_type": "IA3", "target_modules": ["q", "up"], "feedforward_modules": ["up"]},
    space=TARGETS
    | {
        "feedforward_modules": [None, [], ["up"], ["q"], ["w"], r".*\.up", "(up", 3, [1], ["layers.0.up"], "up", {}],
        "init_ia3_weights": SWITCH,
        "fan_in_fan_out": [True, False],
    },
    made=as_made,
    tour=Tour("IA3Config", {"feedforward_modules": []}),
)
