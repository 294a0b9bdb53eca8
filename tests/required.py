"""A method with its defaults; where one has none, with the least that it needs."""

from __future__ import annotations

from typing import Any

from peft_ref.contracts import WeightMethod
from peft_ref.methods import METHODS

REQUIRED: dict[str, dict[str, Any]] = {"adalora": {"total_step": 10}, "c3a": {"block_size": 1}, "fourierft": {"n_frequency": 6}}


def made(name: str, **options: Any) -> WeightMethod[Any]:
    return METHODS.weights[name](**{**REQUIRED.get(name, {}), **options})
