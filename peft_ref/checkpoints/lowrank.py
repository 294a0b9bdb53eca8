"""Low-rank changes of a stored tensor, tile by tile:   W' = W + f (left right)

    linear, convolution     left = B, right = A         f: what PEFT multiplies the product by, one number after the other
    transposed, embedding   left = A^T, right = B^T     the same sums of the same products, so the same bits
    a stack of matrices     a left and a right for each of them

PEFT multiplies the product by the scale. Where that is a power of two, B is multiplied here instead, which gives the same bits of what
does not underflow; exact mode asks its chain, which is not folded, about that too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import numpy as np

from peft_ref.checkpoints.arithmetic import Ending, buffer, computed_in, tiles
from peft_ref.checkpoints.exact import Chain, Doubled
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
        products = [_contiguous(p) for p in products]
        self._chains = [Chain(p.left, p.right, Ending(p.times, p.over, first)) for p in products] if exact else None
        self._folded = [_folded(p) for p in products]
        self._doubled = Doubled(_doublings(products[0]) or 0, Ending(self._folded[0].times, self._folded[0].over, first))
        self._height = len(products[0].left)

    def __call__(self, rows: NDArray, first: int) -> NDArray:
        at, last = first, first + len(rows)
        while at < last:
            which, inside = divmod(at, self._height)
            count = min(self._height - inside, last - at)
            self._add(rows[at - first : at - first + count], which, inside)
            at += count
        return rows

    def _add(self, rows: NDArray, which: int, first: int) -> None:
        left, right, _, _ = self._folded[which]
        opens = []
        for across, along in tiles(rows):
            tile = rows[across, along]
            delta = buffer("delta", tile.shape, computed_in(tile.dtype))
            here = slice(first + across.start, first + across.stop)
            np.matmul(left[here], right[:, along], out=delta)
            if self._chains is None:
                self._doubled.ending.onto(tile, delta)
            else:
                opens.append(self._chains[which].onto(tile, delta, here, along, self._doubled))
        if self._chains is not None:
            self._chains[which].settle(rows, first, [some for some in opens if some is not None])


def _contiguous(p: Product) -> Product:
    return p._replace(left=np.ascontiguousarray(p.left), right=np.ascontiguousarray(p.right))


def _folded(p: Product) -> Product:
    doublings = _doublings(p)
    return p if doublings is None else p._replace(left=np.ldexp(p.left, doublings), times=())


def _doublings(p: Product) -> int | None:
    """How often its scale doubles the product, where that is all that it does."""
    mantissa, exponent = math.frexp(p.times[0]) if len(p.times) == 1 else (0.0, 0)
    return exponent - 1 if mantissa == 0.5 else None
