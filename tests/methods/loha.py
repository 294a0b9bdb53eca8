"""LoHa, as the tests need to know it."""

from __future__ import annotations

from typing import Any

from peft_ref.methods.loha import LoHa
from tests.methods.config_words import LAYERS, NUMBERS, PATTERNS, SWITCH, TARGETS, pattern
from tests.methods.facts import Facts, Tour


def random_config(rng: Any, common: dict[str, Any]) -> Any:
    import peft

    return peft.LoHaConfig(r=int(rng.integers(1, 9)), alpha=3, rank_pattern=pattern(rng), alpha_pattern=pattern(rng), **common)


FACTS = Facts(
    random=random_config,
    settings={"loha": LoHa(r=4, alpha=6, init_weights=False)},
    config={"peft_type": "LOHA", "r": 4, "alpha": 6, "target_modules": ["q", "up"]},
    space=TARGETS
    | LAYERS
    | PATTERNS
    | {
        "r": NUMBERS,
        "alpha": [*NUMBERS, 0.5, -2.5],
        "init_weights": SWITCH,
        "rank_dropout": [0.0, 0.5, 1.5, -1, None, "0.1"],
        "module_dropout": [0.0, 0.5, 1.5, None, "0.1"],
        "use_effective_conv2d": SWITCH,
    },
    tour=Tour("LoHaConfig", {"r": 2, "alpha": 3}, frozenset({"gpt2"})),  # no Conv1D
)
