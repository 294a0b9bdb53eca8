"""MiSS mini, as the tests need to know it."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from peft_ref.methods.miss_mini import MiSSMini
from tests.methods.config_words import random_word
from tests.methods.facts import Facts, Tour
from tests.methods.miss import EVEN, miss
from tests.methods.wrong import replaced


def random_config(rng: Any, common: dict[str, Any]) -> Any:
    return miss(
        **{**common, "r": int(rng.integers(1, 7)), "mini_r": random_word(rng, 1, 2, 5), "init_weights": "mini", "target_modules": ["q"]}
    )()


FACTS = Facts(
    random=random_config,
    small={"r": 2, "mini_r": 1},
    settings={"miss-mini": MiSSMini(r=2, mini_r=7), "miss-mini-blocks": MiSSMini(r=2, mini_r=4)},
    fields={"mini_r": st.sampled_from((2, 1, 3))},
    few={"mini_r": st.just(2)},
    few_layers=EVEN,
    models={"miss mini": (None, miss(r=4, mini_r=5, init_weights="mini"))},
    wrong_starts={
        "MiSS mini's block random": (
            "miss_mini.linear-both.init-default",
            replaced("miss", lambda c, v, rng: rng.uniform(-1, 1, v.shape)),
            "init-not-identity",
        ),
    },
    bits="bfloat16",
    tour=Tour("MissConfig", {"r": 2, "mini_r": 3, "init_weights": "mini"}, frozenset({"gpt2"})),
)
