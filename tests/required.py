"""A method with its defaults; where one has none, with the least that it needs."""

from __future__ import annotations

from typing import Any

from peft_ref.contracts import Method
from peft_ref.methods import METHODS

REQUIRED: dict[str, dict[str, Any]] = {"adalora": {"total_step": 10}}


def made(name: str, **options: Any) -> Method[Any]:
    return METHODS[name](**{**REQUIRED.get(name, {}), **options})
