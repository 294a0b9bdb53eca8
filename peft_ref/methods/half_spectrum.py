"""Waves by the fast Fourier transform, in NumPy: what FourierFT's two matrix products say, where they would be large.

    D_ij = sum_k c_k cos(2 pi (u_k i / out + v_k j / in))            dc_k = sum_ij G_ij cos(2 pi (u_k i / out + v_k j / in))

A row of D is real, so half of its spectrum says it:  Y_iv = sum over the k at column v of c_k e^(2 pi i u_k i / out), none of them beyond
in/2, as (u, v) and (-u, -v) are one wave. There are few k, so Y is added up as it stands and only rows are transformed, a tile of them
at a time:  D_i = irfft(Y_i).   Back, with F_i = rfft(G_i):   dc_k = sum_i Re e^(2 pi i u_k i / out) conj(F_i at v_k).

A wave is even: D at (-i, -j), counted round, is D at (i, j). So the rows beyond out/2 are others turned about; back they are added to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

Host: TypeAlias = np.ndarray[Any, Any]
TILE = 64  # rows


def waves(c: Host, u: Host, v: Host, shape: tuple[int, int]) -> Host:
    """D (out, in)"""
    out, n_in = shape
    u, v = _mirrored(u, v, shape)
    alone = 2 * v % n_in == 0  # irfft takes every other column twice, once for its mirror image, and divides by its length
    weights, (first, *more) = np.where(alone, n_in * c, n_in / 2 * c), _apart(v)
    D, Y = np.empty(shape, c.dtype), np.zeros((TILE, n_in // 2 + 1), np.result_type(c, np.complex64))
    half = out // 2 + 1
    for rows, E in _tiles(u, out, half, weights):
        here = Y[: E.shape[0]]
        here[:, v[first]] = E[:, first]
        for some in more:
            here[:, v[some]] += E[:, some]
        np.fft.irfft(here, n=n_in, out=D[rows])
    D[half:, 0], D[half:, 1:] = D[out - half : 0 : -1, 0], D[out - half : 0 : -1, :0:-1]
    return D


def waves_vjp(G: Host, u: Host, v: Host) -> Host:
    """dc (n,)"""
    (u, v), out = _mirrored(u, v, G.shape), G.shape[0]
    half, dc = out // 2 + 1, np.zeros(2 * len(u), G.dtype)  # of every k the product of the real parts, and of the others
    beyond, G = G[: half - 1 : -1], G[:half].copy()
    G[1 : out - half + 1, 0] += beyond[:, 0]
    G[1 : out - half + 1, 1:] += beyond[:, :0:-1]
    for rows, E in _tiles(u, out, half, np.ones(1, G.dtype)):
        F = np.take(np.fft.rfft(G[rows]), v, axis=1)
        dc += np.einsum("ik,ik->k", E.view(G.dtype), F.view(G.dtype))
    return dc[::2] + dc[1::2]


def _mirrored(u: Host, v: Host, shape: tuple[int, ...]) -> tuple[Host, Host]:
    """The same waves with no v beyond in/2."""
    out, n_in = shape
    beyond = 2 * v > n_in
    return np.where(beyond, -u % out, u), np.where(beyond, n_in - v, v)


def _apart(v: Host) -> list[Host]:
    """Which k, in groups without two at one column; every column is in the first."""
    order = np.argsort(v)
    ordered = v[order]
    rank = np.arange(len(v)) - np.searchsorted(ordered, ordered)
    return [order[rank == i] for i in range(int(rank.max()) + 1)]


def _tiles(u: Host, out: int, rows: int, weights: Host) -> Iterator[tuple[slice, Host]]:
    """By tile, e^(2 pi i u_k i / out) w_k for its rows i < rows: those of the first tile, times that of the row it begins with."""
    turn = np.exp(2j * np.pi / out * np.arange(out)).astype(np.result_type(weights, np.complex64))
    first = turn[np.arange(min(TILE, rows))[:, None] * u % out]
    for start in range(0, rows, TILE):
        stop = min(start + TILE, rows)
        yield slice(start, stop), first[: stop - start] * (turn[start * u % out] * weights)
