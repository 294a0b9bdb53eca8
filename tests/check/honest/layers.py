"""Every layer as one matrix product, by counting indices: X (rows, F) times W (out, F), with zeros where a weight or an input is absent.

Multiplying by zero and adding zero round nothing, so this is honest in every format.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np

from peft_ref.layers import Conv, Embedding, Layer, Linear
from tests.check.honest.arithmetic import Arithmetic, Host


def as_matrix(layer: Layer, stored: Host) -> Host:
    """The stored weight as (out, in/groups * k)."""
    if isinstance(layer, Conv):
        return stored.reshape(stored.shape[0], -1)
    return stored if isinstance(layer, Linear) and not layer.transposed else stored.T


def as_stored(layer: Layer, W: Host) -> Host:
    if isinstance(layer, Conv):
        return W.reshape(layer.weight_shape)
    return W if isinstance(layer, Linear) and not layer.transposed else W.T


def spread_groups(W: Host, groups: int) -> Host:
    """(out, n/groups) as (out, n), zero outside an output's group."""
    out, n = W.shape[0], W.shape[1]
    wide = np.zeros((out, n * groups), dtype=W.dtype)
    for o in range(out):
        g = o // (out // groups)
        wide[o, g * n : (g + 1) * n] = W[o]
    return wide


def own_group(wide: Host, groups: int) -> Host:
    """The part of (out, n) that belongs to every output's group: undoes `spread_groups`."""
    out, n = wide.shape[0], wide.shape[1] // groups
    return np.stack([wide[o, (g := o // (out // groups)) * n : (g + 1) * n] for o in range(out)])


@cache
def _taken(layer: Conv, shape: tuple[int, ...]) -> tuple[Host, tuple[int, ...]]:
    """For every output place and kernel place, which entry of the flattened input it meets (the one after the last: padding)."""
    batch, channels, *space = shape
    nothing = int(np.prod(shape))
    flat = np.arange(nothing).reshape(shape)
    sizes = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(space, layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True)
    )
    rows = []
    for n in range(batch):
        for place in itertools.product(*map(range, sizes)):
            row = []
            for c in range(channels):
                for offset in itertools.product(*map(range, layer.kernel_size)):
                    axes = zip(place, layer.stride, offset, layer.dilation, layer.padding, strict=True)
                    at = [o * s + k * d - p for o, s, k, d, p in axes]
                    inside = all(0 <= a < size for a, size in zip(at, space, strict=True))
                    row.append(int(flat[(n, c, *at)]) if inside else nothing)
            rows.append(row)
    return np.asarray(rows), sizes


def rows_of(layer: Layer, x: Host, like: Arithmetic) -> Host:
    """The input as X (rows, F)."""
    if isinstance(layer, Embedding):
        return like.array(np.eye(layer.num_embeddings)[x.reshape(-1)])
    if isinstance(layer, Conv):
        taken, _ = _taken(layer, x.shape)
        return np.append(x.reshape(-1), np.zeros(1, x.dtype))[taken]
    return x.reshape(-1, x.shape[-1])


def input_gradient(layer: Layer, shape: tuple[int, ...], dX: Host, arithmetic: Arithmetic) -> Host:
    """dX (rows, F) summed into the shape of x."""
    if not isinstance(layer, Conv):
        return dX.reshape(shape)
    taken, _ = _taken(layer, shape)
    users: list[list[int]] = [[] for _ in range(int(np.prod(shape)) + 1)]
    for at, entry in enumerate(taken.reshape(-1)):
        users[entry].append(at)
    most = max(map(len, users[:-1]))
    table = np.asarray([u + [dX.size] * (most - len(u)) for u in users[:-1]])
    return arithmetic.sum(np.append(dX.reshape(-1), np.zeros(1, dX.dtype))[table], axis=1).reshape(shape)


def as_output(layer: Layer, x_shape: tuple[int, ...], Y: Host) -> Host:
    """Y (rows, out) in the layer's output shape."""
    if isinstance(layer, Conv):
        _, sizes = _taken(layer, x_shape)
        return np.moveaxis(Y.reshape(x_shape[0], *sizes, -1), -1, 1)
    lead = x_shape if isinstance(layer, Embedding) else x_shape[:-1]
    return Y.reshape(*lead, -1)


def output_rows(layer: Layer, dy: Any) -> Host:
    """dy as (rows, out): undoes `as_output`."""
    wide = np.moveaxis(dy, 1, -1) if isinstance(layer, Conv) else dy
    return np.asarray(wide.reshape(-1, wide.shape[-1]))
