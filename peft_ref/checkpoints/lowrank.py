"""Low-rank changes of a stored tensor, tile by tile:   W' = W + f (left right)

    linear, convolution     left = B, right = A         f: what PEFT multiplies the product by, one number after the other
    transposed, embedding   left = A^T, right = B^T     the same sums of the same products, so the same bits
    a stack of matrices     a left and a right for each of them

PEFT multiplies the product by the scale. Where that is a power of two, B is multiplied here instead, which gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import numpy as np

from peft_ref.checkpoints.arithmetic import Ending, buffer, computed_in, tiles
from peft_ref.checkpoints.exact import Chain
from peft_ref.checkpoints.plan import NDArray, Rows


class Product(NamedTuple):
    """A product of two factors, and what it is then multiplied by and divided by."""

    left: NDArray  # (rows, r)
    right: NDArray  # (r, columns)
    times: tuple[float, ...] = ()
    over: tuple[float, ...] = ()

    def turned(self) -> Product:
        return self._replace(left=self.right.T, right=self.left.T)


@final
class LowRankRows(Rows):
    """One product, or one for each matrix of a stack, whose rows follow one another."""

    def __init__(self, products: Sequence[Product], *, first: np.dtype[Any] | None, exact: bool) -> None:
        self._factors = [_contiguous(p) if exact else _folded(p) for p in products]
        self._ending = Ending(self._factors[0].times, self._factors[0].over, first)
        self._chains = [Chain(p.left, p.right) for p in self._factors] if exact else None
        self._height = len(self._factors[0].left)

    def __call__(self, rows: NDArray, first: int) -> NDArray:
        at, last = first, first + len(rows)
        while at < last:
            which, inside = divmod(at, self._height)
            count = min(self._height - inside, last - at)
            self._add(rows[at - first : at - first + count], which, inside)
            at += count
        return rows

    def _add(self, rows: NDArray, which: int, first: int) -> None:
        left, right, _, _ = self._factors[which]
        for across, along in tiles(rows):
            tile = rows[across, along]
            delta = buffer("delta", tile.shape, computed_in(tile.dtype))
            here = slice(first + across.start, first + across.stop)
            np.matmul(left[here], right[:, along], out=delta)
            if self._chains is None:
                self._ending.onto(tile, delta)
            else:
                self._chains[which].onto(tile, delta, here, along, self._ending)


def _contiguous(p: Product) -> Product:
    return p._replace(left=np.ascontiguousarray(p.left), right=np.ascontiguousarray(p.right))


def _folded(p: Product) -> Product:
    p = _contiguous(p)
    if len(p.times) == 1 and abs(math.frexp(p.times[0])[0]) == 0.5:
        return p._replace(left=p.left * p.left.dtype.type(p.times[0]), times=())
    return p
