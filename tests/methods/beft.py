"""BEFT, as the tests need to know it."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from peft_ref.methods.beft import BEFT
from tests.methods.config_words import OWN_TARGETS, SWITCH
from tests.methods.facts import Facts, Tour
from tests.methods.wrong import replaced


def beft(**options: Any) -> Any:
    import peft

    return peft.BeftConfig(**options)


FACTS = Facts(
    settings={"beft": BEFT(init_weights=False)},
    fresh={"init_weights": st.just(True)},
    config={"peft_type": "BEFT", "target_modules": ["q", "up"]},
    space=OWN_TARGETS | {"init_weights": SWITCH},
    made=lambda module, method: "default" in module.beft_bias,
    models={"beft": (None, lambda: beft(target_modules=["q", "up"], modules_to_save=["head"]))},
    random=lambda rng, common: beft(**{k: v for k, v in common.items() if k != "exclude_modules"}),
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
