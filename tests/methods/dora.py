"""DoRA, as the tests need to know it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from peft_ref.methods.dora import DoRA
from tests.methods.facts import Facts, Tour
from tests.methods.lora import lora, options


def numbers(name: str, values: Any) -> Any:
    """A magnitude is a norm."""
    return np.abs(values) + 0.5 if name == "m" else values


def random_config(rng: Any, common: dict[str, Any]) -> Any:
    return lora(**options(rng, common), use_dora=True)()


FACTS = Facts(
    # its norm is held constant, which no difference of the forward pass can see: what it does not depend on is compared
    no_derivative=lambda gradient, several: "_A" in gradient or "_B" in gradient or (several and "magnitude" in gradient),
    random=random_config,
    unable=lambda case, dtype: case in {f"dora.conv1d-dilation.plain.{operation}" for operation in ("forward", "backward")},
    settings={"dora": DoRA(r=4, lora_alpha=6), "dora-rslora": DoRA(r=4, lora_alpha=6, use_rslora=True)},
    numbers=numbers,
    crashes=frozenset({"conv2d-dilation"}),
    fresh={"init_lora_weights": st.sampled_from((True, "gaussian", "orthogonal", "pissa", "olora"))},
    bits=None,  # it divides by a norm
    irrational=True,
    tour=Tour("LoraConfig", {"r": 2, "use_dora": True}),
)
