"""PEANuT, as the tests need to know it."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from peft_ref.activations import FUNCTIONS
from peft_ref.methods.peanut import PEANuT
from tests.methods.config_words import LAYERS, NUMBERS, SWITCH, TARGETS
from tests.methods.facts import Difference, Facts, Tour

SMOOTH = tuple(name for name in FUNCTIONS if name not in ("relu", "relu2", "relu6", "leaky_relu", "hardswish"))


def as_made(module: Any, method: Any) -> bool:
    words = ("r", "depth", "scaling", "act_fn")
    return all(getattr(module, word)["default"] == getattr(method, word) for word in words)


def peanut(**options: Any) -> Any:
    import peft

    return peft.PeanutConfig(**{"r": 3, "target_modules": ["q", "up"], **options})


FACTS = Facts(
    settings={
        "peanut": PEANuT(r=4),
        "peanut-one": PEANuT(r=3, depth=1, scaling=0.5),
        "peanut-deep": PEANuT(r=4, depth=3, act_fn="tanh", scaling=-1.5),
        **{f"peanut-{name}": PEANuT(r=2, depth=2, act_fn=name) for name in FUNCTIONS},
    },
    fields={
        "depth": st.sampled_from((0, 1, 2, 3)),
        "act_fn": st.sampled_from(SMOOTH),  # differences across a corner are no derivative
        "scaling": st.sampled_from((1.0, 0.5, -2.0)),
    },
    few={"depth": st.just(2), "act_fn": st.sampled_from(("relu", "silu"))},
    config={"peft_type": "PEANUT", "r": 4, "target_modules": ["q", "up"]},
    space=TARGETS
    | LAYERS
    | {
        "r": NUMBERS,
        "depth": [0, 1, 3, 9, -1, "1", None, 2.0, True],
        "act_fn": ["relu", "tanh", "gelu", "mish", "cooking", "", None, 1],
        "scaling": [1.0, 0.5, -2, 0, None, "1"],
        "init_weights": SWITCH,
    },
    made=as_made,
    dialects={"unmerge-restores": lambda case, dtype: case.startswith("peanut.") and case.endswith(".unmerge")},
    differences=(
        Difference("we", r"depth=9", "PEFT takes any depth"),
        Difference("we", r"depth=True is of type bool", "a truth value as a number: PEFT counts one layer"),
        Difference("we", r"scaling=.* expected int or float", "PEFT multiplies with it in forward, and crashes there"),
    ),
    bits="float64",
    models={
        "peanut": (None, lambda: peanut(modules_to_save=["head"])),
        "peanut deep": (None, lambda: peanut(depth=2, act_fn="tanh", scaling=0.5)),
    },
    tour=Tour("PeanutConfig", {"r": 2}, frozenset({"gpt2"})),  # no Conv1D
)
