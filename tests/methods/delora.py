"""DeLoRA, as the tests need to know it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from peft_ref.layers import Linear
from peft_ref.methods.delora import DeLoRA
from tests.methods.config_words import LAYERS, NUMBERS, PATTERNS, SWITCH, TARGETS
from tests.methods.facts import Difference, Facts, Tour
from tests.methods.wrong import replaced


def numbers(name: str, values: Any) -> Any:
    """Norms and a length are positive."""
    return np.abs(values) + 0.5 if name in ("length", "w") else values


def as_made(module: Any, method: Any) -> bool:
    return bool(module.r["default"] == method.r and module.delora_lambda["default"].item() == method.delora_lambda)


def delora(**options: Any) -> Any:
    import peft

    return peft.DeloraConfig(**{"target_modules": ["q", "up"], **options})


FACTS = Facts(
    settings={"delora": DeLoRA(r=4), "delora-three": DeLoRA(r=3, delora_lambda=2.5)},
    numbers=numbers,
    peft_dropout="delora_dropout",
    # With few inputs or outputs a row may be short, and differences of its direction inexact.
    layers={"linear": st.builds(Linear, in_features=st.integers(5, 7), out_features=st.integers(5, 7))},
    config={"peft_type": "DELORA", "r": 4, "delora_lambda": 6, "target_modules": ["q", "up"]},
    space=TARGETS
    | LAYERS
    | {
        "r": NUMBERS,
        "delora_lambda": [0, 1, 2.5, -3, None, [4]],
        "module_dropout": [0.0, 0, 0.1, 0.999, 1, 1.5, -0.1, None, "0.1", True],
        "init_weights": SWITCH,
        "rank_pattern": PATTERNS["rank_pattern"],
        "lambda_pattern": [{}, {"q": 2}, {"q": 0.5}, {"q": -1}, {"q": None}, {"(q": 2}, {"none": "2"}, [], ["q"], None, 3],
        "bias": ["none", "all", "delora_only", "some_only", "some", "", None, True],
    },
    made=as_made,
    differences=(
        Difference("we", r"module_dropout=(1|1\.0|-0\.1): a probability", "PEFT divides by zero at 1, and ignores what is below 0"),
        Difference("we", r"lambda_pattern (of '|is a)", "PEFT checks a value when a module asks for it, and here none did"),
    ),
    models={
        "delora": (None, lambda: delora(r=3, modules_to_save=["head"])),
        "delora patterns": (None, lambda: delora(r=4, rank_pattern={"up": 2}, lambda_pattern={"q": 3.5}, bias="all")),
    },
    wrong_starts={
        "DeLoRA's B random": (
            "delora.linear.init-default",
            replaced("_B", lambda c, v, rng: rng.normal(size=v.shape)),
            "init-not-identity",
        ),
        "DeLoRA's lambda is one": ("delora.linear.init-default", replaced("_lambda", lambda c, v, rng: v * 0 + 1), "init-lambda"),
        "DeLoRA's norm of rows": (
            "delora.linear.init-default",
            replaced("_w_norm", lambda c, v, rng: np.linalg.norm(c.weight, axis=1)[: len(v)]),
            "init-wrong-norm",
        ),
    },
    bits="float64",
    irrational=True,
    tour=Tour("DeloraConfig", {"r": 2}, frozenset({"gpt2"})),  # no Conv1D
)
