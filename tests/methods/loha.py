"""LoHa, as the tests need to know it."""

from __future__ import annotations

from peft_ref.methods.loha import LoHa
from tests.methods.config_words import LAYERS, NUMBERS, PATTERNS, SWITCH, TARGETS
from tests.methods.facts import Facts, Tour

FACTS = Facts(
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
