"""PEFT's modules that compute in float32 whatever came, made to compute in float64, so that they can be compared to the last digits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from importlib import import_module
from typing import Any
from unittest.mock import patch as patched

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

    for cls, name, function in rounding():
        patch.setattr(cls, name, function)
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for module in (m for name in METHODS.weights for m in facts(name).float32_modules):
        patch.setattr(f"{module}.torch", Doubled())


@cache
def rounding() -> list[tuple[type, str, Any]]:
    """Of PEFT's functions those that stay in float32 while torch is widened: their class, their name, and what does so.

    It is asked first before anything is widened.
    """
    import torch

    as_it_is = {(torch, "float32"): torch.float32, (torch, "float"): torch.float, (torch.Tensor, "float"): torch.Tensor.float}

    def narrow(function: Any) -> Any:
        @wraps(function)
        def narrowed(*given: Any, **options: Any) -> Any:
            with ExitStack() as stack:
                for (owner, name), value in as_it_is.items():
                    stack.enter_context(patched.object(owner, name, value))
                return function(*given, **options)

        return narrowed

    found = []
    for module, cls_name, name in (function for method in METHODS.weights for function in facts(method).float32_functions):
        cls = getattr(import_module(module), cls_name)
        found.append((cls, name, narrow(vars(cls)[name])))
    return found


@contextmanager
def still_rounding() -> Iterator[None]:
    """To be entered before torch is widened."""
    with ExitStack() as stack:
        for cls, name, function in rounding():
            stack.enter_context(patched.object(cls, name, function))
        yield
