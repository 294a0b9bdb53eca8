"""PEFT's LoftQ on a machine without a GPU, with bitsandbytes or with a stand-in for it."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest


def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PEFT sends to a GPU goes to the CPU."""
    import torch
    from peft.utils import loftq_utils

    monkeypatch.setattr(loftq_utils, "clear_device_cache", lambda: None)
    to = torch.Tensor.to

    def there(place: Any) -> Any:
        return "cpu" if isinstance(place, str | torch.device) and str(place) == "cuda" else place

    def on_cpu(self: Any, *args: Any, **options: Any) -> Any:
        return to(self, *map(there, args), **{name: there(value) for name, value in options.items()})

    monkeypatch.setattr(torch.Tensor, "to", on_cpu)


def stand_in(monkeypatch: pytest.MonkeyPatch, nn: dict[str, Any], functional: dict[str, Any]) -> None:
    """A bitsandbytes that has these names and no others."""
    import peft
    from peft.utils import loftq_utils

    peft.import_utils.is_bnb_available()  # looks for the library once: before the stand-in is there
    peft.import_utils.is_bnb_4bit_available()
    fake: Any = types.ModuleType("bitsandbytes")
    fake.nn, fake.functional = types.SimpleNamespace(**nn), types.SimpleNamespace(**functional)
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    monkeypatch.setattr(loftq_utils, "is_bnb_available", lambda: True)
    monkeypatch.setattr(loftq_utils, "is_bnb_4bit_available", lambda: True)


def factors(model: Any, name: str) -> tuple[Any, ...]:
    tuner = model.base_model.model.get_submodule(name)
    return tuple(getattr(tuner, f"lora_{f}")["default"].weight.detach().double().numpy() for f in "AB")
