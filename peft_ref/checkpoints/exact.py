"""The bits of PEFT's low-rank merge, whatever BLAS NumPy was built with.

torch on a CPU sums  d_ij = sum_k B_ik A_kj  as one chain of fused multiply-adds, k ascending; NumPy's BLAS in its own order, fused or not.
With u = 2^-24, g = (r + 4) u / (1 - (r + 4) u) and Cauchy and Schwarz's  S_ij = |B_i| |A_j| >= sum_k |B_ik A_kj|

    |d^ - d| <= 2 g S        for d^ in any order, d the chain, each at most g S from the exact sum (Higham 2002, section 3.1)

All that follows, the scale, the roundings, the sum with W, is monotone in d. So where it makes the same bits of  d^ - e  and of  d^ + e,
with  e = 2 (g + u) S + tiny  for the rounding of the two themselves and for what underflows, these are PEFT's. Elsewhere, at less than one
number in a hundred of a 16-bit weight, the chain is computed: a product of two float32 is exact in float64; the sum with the third is
rounded there to odd wherever the nearest might lie half-way between two float32, so that rounding it once more is rounding once (Boldo and
Melquiond 2008).

From r = 193 on, torch (its MKL) sums blocks of r // 2, or of 192 where r > 384, and adds them in order. Matrices with fewer than 16 rows or
columns go through other code there, whose order is not this one; so do convolutions of fewer than 16 channels, or with r > 192.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, final

import numpy as np

from peft_ref.checkpoints.arithmetic import Ending, buffer, widened
from peft_ref.checkpoints.plan import NDArray

UNIT = 2.0**-24
LOW, HALF = 2**29 - 1, 2**28  # the bits of a float64 that a float32 has not, and the first of them
SMALLEST = 2.0**-126  # of the normal float32
MOST = 192  # of what is summed in one chain
FEW = 0.1  # of the numbers of a tile: so many are looked up one by one
AT_ONCE = 2**15  # products of those


class Doubled(NamedTuple):
    """A sum that was doubled so often before, which changes no bit of a normal number, and what is left to do with it."""

    times: int
    ending: Ending


class Open(NamedTuple):
    """Numbers of which the chain must be computed: where they are in the matrix, and what is there, in the dtype that is computed in."""

    rows: NDArray
    columns: NDArray
    W: NDArray


@final
class Chain:
    """B A as torch sums it, where a sum in any order does not tell."""

    def __init__(self, B: NDArray, A: NDArray, ending: Ending) -> None:
        self._B, self._A, self._ending = B, A, ending
        r = B.shape[1]
        g = (r + 4) * UNIT / (1 - (r + 4) * UNIT)
        self._rows = _up(_norms(B) * 2 * (g + UNIT))
        self._columns = _up(_norms(A.T))
        self._tiny = np.float32((r + 4) * 2.0**-149)

    def onto(self, tile: NDArray, delta: NDArray, across: slice, along: slice, doubled: Doubled) -> Open | None:
        """Adds the chain to `tile`, but for what it returns; `delta` is 2^n times the sum in any order, of these rows and columns."""
        if not len(self._A):  # no products: nothing was rounded
            self._ending.onto(tile, delta)
            return None
        e = self._rows[across, None] * self._columns[along].max()  # one for a row: a pass over the tile less, a few more to look up
        e = np.ldexp((e + self._tiny) * np.float32(1 + 2.0**-20), doubled.times)
        W, beyond, high = widened(tile), buffer("beyond", delta.shape, delta.dtype), buffer("high", tile.shape, tile.dtype)
        np.add(delta, e, out=beyond)
        np.subtract(delta, e, out=delta)
        doubled.ending.sum(W, beyond, high)
        doubled.ending.sum(W, delta, tile)
        bits, apart = f"u{tile.dtype.itemsize}", buffer("apart", tile.shape, np.dtype(np.bool))
        places = np.flatnonzero(np.not_equal(tile.view(bits), high.view(bits), out=apart))
        if len(places) > FEW * tile.size:
            B, A = self._B[across], self._A[:, along]
            self._ending.sum(W, chained(lambda k: B[:, k, None], lambda k: A[k, None, :], len(A)), tile)
            return None
        i, j = np.divmod(places, tile.shape[1])
        return Open(i + across.start, j + along.start, W.reshape(-1)[places])

    def settle(self, rows: NDArray, first: int, opens: Sequence[Open]) -> None:
        """Adds what `onto` left open to `rows`, the first of which is that row of B. All at once: a call costs as much as many sums."""
        if not opens:
            return
        i, j, W = (np.concatenate(parts) for parts in zip(*opens, strict=True))
        step = max(AT_ONCE // len(self._A), 1)
        for some in (slice(n, n + step) for n in range(0, len(i), step)):
            there = np.empty((1, len(i[some])), rows.dtype)
            self._ending.sum(W[None, some], looked_up(self._B[i[some]].T, self._A.take(j[some], axis=1))[None], there)
            rows[i[some] - first, j[some]] = there[0]


def looked_up(columns: NDArray, rows: NDArray) -> NDArray:
    """The chains of the products of (r, n) numbers with as many others."""
    totals = np.multiply(columns, rows, dtype=np.float64)
    result: NDArray | None = None
    for block in blocks(len(totals)):
        part = totals[block[0]].astype(np.float32) + np.float32(0)
        for total in totals[block[1] : block[-1] + 1] if len(block) > 1 else ():
            total += part
            part = total.astype(np.float32)
        result = part if result is None else result + part
    if result is None or len(totals) == 1 or _doubtful(totals).any():  # one in some hundred million
        return chained(lambda k: columns[k], lambda k: rows[k], len(totals))
    return result


def chained(column: Callable[[int], NDArray], row: Callable[[int], NDArray], r: int) -> NDArray:
    """The sum over k < r of column(k) row(k), which may be broadcast together. r is at least 1."""
    if r == 1:
        return column(0) * row(0)
    total: NDArray | None = None
    for block in blocks(r):
        part = column(block[0]) * row(block[0]) + np.float32(0)  # a sum of several begins at +0
        for k in block[1:]:
            part = fused(column(k), row(k), part)
        total = part if total is None else total + part
    assert total is not None
    return total


def blocks(r: int) -> Iterator[range]:
    """What is summed in one chain, in order."""
    length = r if r <= MOST else r // 2 if r <= 2 * MOST else MOST
    return (range(k, min(k + length, r)) for k in range(0, r, max(length, 1)))


def fused(a: NDArray, b: NDArray, c: NDArray) -> NDArray:
    """a b + c of float32, rounded once."""
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    result = total.astype(np.float32)
    if _doubtful(total).any():
        result = to_odd(product, c.astype(np.float64), total).astype(np.float32)
    return result


def _doubtful(total: NDArray) -> NDArray:
    """Where rounding to float32 what was rounded to float64 may differ from rounding once: half-way, or below the normal numbers."""
    doubtful: NDArray = ((total.view(np.int64) & LOW) == HALF) | (np.abs(total) < 2 * SMALLEST)
    return doubtful


def to_odd(x: NDArray, y: NDArray, total: NDArray) -> NDArray:
    """x + y, of which `total` is the sum rounded to nearest, rounded to odd: of its two neighbours the one whose last bit is one."""
    part = total - x
    error = (x - (total - part)) + (y - part)
    even = (total.view(np.int64) & 1) == 0
    towards = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & even, towards, total)


def product(B: NDArray, A: NDArray) -> NDArray:
    """B A as torch sums it."""
    return chained(lambda k: B[:, k, None], lambda k: A[k, None, :], B.shape[1])


def _norms(M: NDArray) -> NDArray:
    """Of each row, in float64, without a copy of all of it."""
    norms: NDArray = np.sqrt(np.einsum("ik,ik->i", M, M, dtype=np.float64))
    return norms


def _up(x: NDArray) -> NDArray:
    """As float32, and no smaller."""
    return np.nextafter((x * (1 + 2.0**-22)).astype(np.float32), np.float32(np.inf))
