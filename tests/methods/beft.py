"""BEFT, as the tests need to know it."""

from __future__ import annotations

from typing import Any

from peft_ref.methods.beft import BEFT
from tests.methods.config_words import OWN_TARGETS, SWITCH
from tests.methods.facts import Facts, Tour
from tests.methods.wrong import replaced


def beft(**options: Any) -> Any:
    import peft

    return peft.BeftConfig(**{"target_modules": ["q", "up"], **options})


FACTS = Facts(
    settings={"beft": BEFT(init_weights=False)},
    config={"peft_type": "BEFT", "target_modules": ["q", "up"]},
    space=OWN_TARGETS
    | {
        "init_weights": SWITCH,
        "target_modules": [*OWN_TARGETS["target_modules"], ["conv1"], ["conv2", "up"], ["up", "table"], r"(conv1|layers\.0\.q)", "(", "q("],
    },
    made=lambda module, method: isinstance(method, BEFT),
    models={"beft": (None, lambda: beft(modules_to_save=["head"]))},
    wrong_starts={
        "BEFT's vector random": (
            "beft.linear.init-default",
            replaced("beft", lambda c, v, rng: rng.normal(size=v.shape)),
            "init-not-identity",
        ),
        "BEFT's False ignored": ("beft.linear.init-false", replaced("beft", lambda c, v, rng: v * 0), "init-zero"),
    },
    bits=None,  # a few numbers are added up
    tour=Tour("BeftConfig", {}, frozenset({"gpt2"})),  # no Conv1D
)
