"""PEFT's modules that compute in float32 whatever came, made to compute in float64, so that they can be compared to the last digits."""

from __future__ import annotations

from typing import Any

import pytest

from peft_ref.methods import METHODS
from tests.methods import facts


def widen(patch: pytest.MonkeyPatch) -> None:
    import torch

    class Doubled:
        """torch, whose float32 is its float64."""

        float32 = torch.float64

        @staticmethod
        def zeros(*size: Any, **options: Any) -> Any:
            return torch.zeros(*size, **{"dtype": torch.float64, **options})

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for module in (m for name in METHODS.weights for m in facts(name).float32_modules):
        patch.setattr(f"{module}.torch", Doubled())
