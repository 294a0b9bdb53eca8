"""Large matrices in NumPy: the same sums and products, in an order that keeps them in the processor's caches.

What is added to a large product is added while a tile of its rows is still there; nothing of a matrix's size is made to be thrown away.
Every function is pure from outside: the only array that is written into is the one it returns, or a tile of its own. What it
computes is said in one plain line, and tests/laws/test_dense.py holds it to that line. `is_large` says when it pays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from peft_ref.arrays import Array, as_rows

LEAST = 2**16  # entries of a matrix from which on the tiles pay; the plain formulas' bits stay below it
TILE = 256  # rows of a few thousand numbers: one or two MB
APART = 16  # numbers between two rows that are read side by side: rows a power of two apart would share a few places of the caches


def is_large(M: Array, *others: Array | None) -> bool:
    """Whether M is a large matrix of floats in NumPy, and the others are in the same precision."""
    return (
        type(M) is np.ndarray
        and M.size >= LEAST
        and M.dtype in (np.float32, np.float64)
        and all(type(other) is np.ndarray and other.dtype == M.dtype for other in others if other is not None)
    )


def tiles(n: int) -> Iterator[slice]:
    """The rows 0 to n, a tile at a time."""
    return (slice(start, min(start + TILE, n)) for start in range(0, n, TILE))


def by_rows(f: Callable[[slice], Array], like: Array) -> Array:
    """The matrix in `like`'s shape whose rows f computes tile by tile."""
    out = np.empty(like.shape, like.dtype)
    for tile in tiles(out.shape[0]):
        out[tile] = f(tile)
    return out


def product(x: Array, M: Array) -> Array:
    """x M  for rows x (..., in)."""
    return (as_rows(x) @ M).reshape(*x.shape[:-1], M.shape[1])


def product_vjp(x: Array, dy: Array) -> Array:
    """dy^T x, the gradient of M^T in `product`."""
    return as_rows(dy).T @ as_rows(x)


def sum_of_products(terms: Sequence[tuple[Array, Array]], biases: Sequence[Array] = ()) -> Array:
    """x M + h N + ... + b + ...  for (x, M), (h, N), ..., rows under all their leading axes; all but the first are narrow."""
    (x, M), *narrow = terms
    y = as_rows(x) @ M
    added = [(as_rows(h), N) for h, N in narrow]
    if added or biases:
        part = np.empty((min(TILE, y.shape[0]), y.shape[1]), y.dtype)
        for tile in tiles(y.shape[0]):
            rows = y[tile]
            for h, N in added:
                rows += np.matmul(h[tile], N, out=part[: rows.shape[0]])
            for b in biases:
                rows += b
    return y.reshape(*x.shape[:-1], M.shape[1])


def column_dots(a: Array, b: Array) -> Array:
    """sum_t a_ti b_ti, a sum of the tiles' sums."""
    a, b = as_rows(a), as_rows(b)
    dots = np.zeros(a.shape[1], a.dtype)
    for tile in tiles(a.shape[0]):
        dots += np.einsum("ti,ti->i", a[tile], b[tile])
    return dots


def scaled(W: Array, rows: Array | None, B: Array | None, A: Array | None) -> Array:
    """r (W + B A)  with row i times r_i."""
    return by_rows(lambda tile: _added(W, B, A, tile) if rows is None else _added(W, B, A, tile) * rows[tile, None], W)


def unit_scaled(W: Array, rows: Array, B: Array, A: Array) -> tuple[Array, Array]:
    """r V / |V|  with row i of V = W + B A times r_i / its Euclidean norm |V|_i, and those norms."""
    out, norms = np.empty(W.shape, W.dtype), np.empty(W.shape[0], W.dtype)
    for tile in tiles(W.shape[0]):
        V = _added(W, B, A, tile)
        norms[tile] = np.sqrt(np.einsum("ij,ij->i", V, V))
        np.multiply(V, (rows[tile] / norms[tile])[:, None], out=out[tile])
    return out, norms


def _added(W: Array, B: Array | None, A: Array | None, tile: slice) -> Array:
    """These rows of W + B A."""
    if B is None:
        return W[tile]
    V = B[tile] @ A
    V += W[tile]
    return V


def turned(V: Array, F: Array) -> Array:
    """V blockdiag(F)  for rows V (..., n b) and blocks F (n, b, b)."""
    n, b, _ = F.shape
    if b == 1:
        return V * F.reshape(n)
    rows, F = as_rows(V), np.ascontiguousarray(F)
    out, turned_tile = np.empty(rows.shape, rows.dtype), _spaced(rows)
    for tile, V_tile in _copied_tiles(rows):
        to = turned_tile[: V_tile.shape[0]]
        np.matmul(_blocks(V_tile, n), F, out=_blocks(to, n))
        out[tile] = to
    return out.reshape(V.shape)


def turned_vjp(V: Array, d: Array, n: int) -> Array:
    """The n blocks (n, b, b) on the diagonal of V^T d: the gradient of F in `turned`."""
    V, d = as_rows(V), as_rows(d)
    b = V.shape[1] // n
    if b == 1:
        return column_dots(V, d).reshape(n, 1, 1)
    dF = np.zeros((n, b, b), V.dtype)
    for (_, V_tile), (_, d_tile) in zip(_copied_tiles(V), _copied_tiles(d), strict=True):
        dF += _blocks(V_tile, n).mT @ _blocks(d_tile, n)
    return dF


def _spaced(rows: Array) -> Array:
    """Room for a tile of these rows."""
    height, width = rows.shape
    return np.empty((min(TILE, height), width + APART), rows.dtype)[:, :width]


def _copied_tiles(rows: Array) -> Iterator[tuple[slice, Array]]:
    """The rows a tile at a time, in one place: a tile is good until the next is asked for."""
    room = _spaced(rows)
    for tile in tiles(rows.shape[0]):
        here = room[: tile.stop - tile.start]
        here[...] = rows[tile]
        yield tile, here


def _blocks(V: Array, n: int) -> Any:
    """The columns of V (rows, n b) in n blocks (n, rows, b), without a copy."""
    return V.reshape(V.shape[0], n, -1).transpose(1, 0, 2)
