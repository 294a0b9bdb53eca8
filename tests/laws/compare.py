"""When two results count as the same."""

from __future__ import annotations

from typing import Any

import numpy as np

Host = np.ndarray[Any, Any]


def assert_close(got: Host, expected: Host, what: str, *, rounding: float = 1e-12, scale: float = 0.0) -> None:
    """Equal shapes, and no entry further off than `rounding` of the largest one (or of `scale`, if that is larger)."""
    assert np.shape(got) == np.shape(expected), f"{what}: shape {np.shape(got)}, expected {np.shape(expected)}"
    size = max(1.0, scale, float(np.max(np.abs(expected), initial=0.0)))
    off = float(np.max(np.abs(got - expected), initial=0.0))
    assert off <= rounding * size, f"{what} is off by {off:.3g} where {rounding * size:.3g} is allowed\n got {got}\n expected {expected}"


def assert_same_bits(got: Host, expected: Host, what: str) -> None:
    assert got.dtype == expected.dtype, f"{what}: {got.dtype}, expected {expected.dtype}"
    assert np.array_equal(got, expected, equal_nan=True), f"{what}\n got {got}\n expected {expected}"
