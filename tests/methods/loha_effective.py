"""LoHa with `use_effective_conv2d`, as the tests need to know it."""

from __future__ import annotations

import math
from typing import Any

from peft_ref.methods.loha_effective import LoHaEffective
from tests.methods.config_words import pattern
from tests.methods.facts import Facts, Tour
from tests.methods.wrong import replaced


def loha(**options: Any) -> Any:
    import peft

    return lambda: peft.LoHaConfig(**{"target_modules": ["q", "up", "conv1", "conv2"], "use_effective_conv2d": True, **options})


def random_config(rng: Any, common: dict[str, Any]) -> Any:
    patterns = {"rank_pattern": pattern(rng), "alpha_pattern": pattern(rng)}
    return loha(**{**common, **patterns, "r": int(rng.integers(1, 5)), "alpha": 3, "target_modules": ["q", "conv1", "conv2"]})()


FACTS = Facts(
    no_derivative=lambda gradient, several: gradient.endswith("_a"),  # HF's own
    random=random_config,
    small={"r": 2},
    settings={"loha-effective": LoHaEffective(r=4, alpha=6), "loha-effective-one": LoHaEffective(r=1, alpha=2, init_weights=False)},
    models={
        "loha effective": (None, loha(r=2, alpha=3)),  # PEFT keeps the scale as a float32, so only a dyadic one can be compared
        "loha effective by pattern": (None, loha(r=4, alpha=2, rank_pattern={"conv2": 1}, init_weights=False)),
    },
    wrong_starts={
        "the effective LoHa's w2_b random": (
            "loha_effective.conv2d.init-default",
            replaced("w2_b", lambda c, v, rng: rng.normal(size=v.shape)),
            "init-not-identity",
        ),
        "the effective LoHa's core by the kernel": (
            "loha_effective.conv2d.init-default",
            replaced("hada_t1", lambda c, v, rng: v * math.sqrt(v.shape[1])),
            "init-wrong-bound",
        ),
        "the effective LoHa's w1_a by its other side": (
            "loha_effective.conv1d.init-default",
            replaced("w1_a", lambda c, v, rng: v * math.sqrt(v.shape[1] / v.shape[0])),
            "init-wrong-bound",
        ),
    },
    tour=Tour("LoHaConfig", {"r": 2, "alpha": 3, "use_effective_conv2d": True}, frozenset({"gpt2"})),  # no Conv1D
)
