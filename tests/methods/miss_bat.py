"""MiSS bat, as the tests need to know it."""

from __future__ import annotations

from typing import Any

from peft_ref.methods.miss_bat import MiSSBat
from tests.methods.config_words import random_word
from tests.methods.facts import Facts, Tour
from tests.methods.miss import EVEN, miss
from tests.methods.wrong import replaced


def random_config(rng: Any, common: dict[str, Any]) -> Any:
    return miss(**{**common, "r": random_word(rng, 1, 2), "init_weights": "bat", "target_modules": ["q"]})()


FACTS = Facts(
    random=random_config,
    small={"r": 1},
    settings={"miss-bat": MiSSBat(r=1), "miss-bat-blocks": MiSSBat(r=4)},
    numbers=lambda name, values: values / 8,  # I + D is then far from singular
    few_layers=EVEN,
    models={"miss bat": (None, miss(r=2, init_weights="bat", bias="all", target_modules=["q"]))},
    wrong_starts={
        "MiSS bat's blocks the identity": (
            "miss_bat.linear-both.init-default",
            replaced("miss", lambda c, v, rng: v + 1),
            "init-not-identity",
        ),
    },
    tour=Tour("MissConfig", {"r": 2, "init_weights": "bat"}, frozenset({"gpt2"})),
)
