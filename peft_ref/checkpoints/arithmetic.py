"""Adding to rows of a stored tensor, tile by tile, each number rounded as HF PEFT rounds it.

    W (stored) + delta       the sum in the dtype that is computed in, rounded once to the stored one
    W + round(delta)         the delta rounded before, to the dtype that `first` says

16-bit and 8-bit floats are computed with in float32, float64 in itself. Each thread has a few buffers of a tile, used again and again:
the tile stays in the cache, and nothing is allocated.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from peft_ref.checkpoints.plan import NDArray

TILE = (96, 512)
_buffers = threading.local()


def computed_in(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def buffer(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray:
    """This thread's buffer of that name, as an array of `shape`, which is a matrix no larger than TILE."""
    held: dict[tuple[str, np.dtype[Any]], NDArray] = _buffers.__dict__.setdefault("held", {})
    if (name, dtype) not in held:
        held[name, dtype] = np.empty(TILE[0] * TILE[1], dtype)
    return held[name, dtype][: shape[0] * shape[1]].reshape(shape)


def tiles(rows: NDArray) -> Iterator[tuple[slice, slice]]:
    for column in range(0, rows.shape[1], TILE[1]):
        for row in range(0, rows.shape[0], TILE[0]):
            yield slice(row, min(row + TILE[0], rows.shape[0])), slice(column, min(column + TILE[1], rows.shape[1]))


class Ending(NamedTuple):
    """What becomes of a sum of products until it is in the weight: each step is monotone, which `exact.py` builds on."""

    times: tuple[float, ...] = ()  # numbers it is multiplied by, one after the other
    over: tuple[float, ...] = ()  # and then divided by
    first: np.dtype[Any] | None = None  # what it is rounded to before it is added

    def onto(self, tile: NDArray, delta: NDArray) -> None:
        """Adds to `tile`, in place. `delta` is in the dtype that is computed in, and is lost."""
        if tile.dtype == delta.dtype:
            self._changed(delta)
            tile += delta
        else:
            self.sum(widened(tile), delta, tile)

    def sum(self, wide: NDArray, delta: NDArray, out: NDArray) -> None:
        """The same sum with a weight in the dtype that is computed in, stored in `out`. `delta` is lost."""
        self._changed(delta)
        delta += wide
        np.copyto(out, delta, casting="unsafe")

    def _changed(self, delta: NDArray) -> None:
        for factor in self.times:
            delta *= delta.dtype.type(factor)
        for divisor in self.over:
            delta /= delta.dtype.type(divisor)
        if self.first is not None and self.first != delta.dtype:
            rounded = buffer("rounded", delta.shape, self.first)
            np.copyto(rounded, delta, casting="unsafe")
            np.copyto(delta, rounded, casting="unsafe")


def widened(tile: NDArray) -> NDArray:
    """A copy in the dtype that is computed in."""
    wide = buffer("wide", tile.shape, computed_in(tile.dtype))
    np.copyto(wide, tile, casting="unsafe")
    return wide
