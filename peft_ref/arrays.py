"""The few helpers the array API standard lacks, each in standard calls.

`namespace` is the one door to an array library. NumPy's own namespace conforms to the standard, so it is used as it is;
every other library is reached through array-api-compat, which is imported only when such an array turns up
(its import costs as much as NumPy's). A library that array-api-compat does not know can register a namespace.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np

# No array library ships a static type for the standard's array object, so this name documents and does not check.
Array: TypeAlias = Any
Namespace: TypeAlias = Any

# The one table that is filled at run time, by a backend when it is constructed: the array type is all that an array brings along.
_registered: dict[type, Namespace] = {}


def register_namespace(array_type: type, xp: Namespace) -> None:
    """Make `xp` the namespace of arrays of `array_type`: of a library that does not conform and that array-api-compat does not know."""
    _registered[array_type] = xp


def namespace(*arrays: Array | None) -> Namespace:
    """The array API namespace that all `arrays` belong to (`None` is ignored)."""
    present = [a for a in arrays if a is not None]
    if all(isinstance(a, np.ndarray | np.generic) for a in present):
        return np
    kinds = {type(a) for a in present}
    if len(kinds) == 1 and (kind := kinds.pop()) in _registered:
        return _registered[kind]
    import array_api_compat

    return array_api_compat.array_namespace(*present)


def device(array: Array) -> Any:
    """Where `array` lives, to give to a creation function; None where the library does not say."""
    if type(array) in _registered:
        return None
    import array_api_compat

    return array_api_compat.device(array)


def to(array: np.ndarray[Any, Any], like: Array) -> Array:
    """A NumPy array (a random draw, say) as an array of `like`'s library, dtype and device."""
    xp = namespace(like)
    if xp is np:
        return np.asarray(array, dtype=like.dtype)
    return xp.asarray(array, dtype=like.dtype, device=device(like))


def integers(array: np.ndarray[Any, Any], like: Array, dtype: str = "int64") -> Array:
    """NumPy integers (places in an array) as an array of `like`'s library and device."""
    xp = namespace(like)
    if xp is np:
        return array.astype(dtype)
    return xp.asarray(array.astype(dtype), device=device(like))


def zeros_like(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros of `shape` in `like`'s library, dtype and device."""
    xp = namespace(like)
    if xp is np:
        return np.zeros(shape, dtype=like.dtype)
    return xp.zeros(shape, dtype=like.dtype, device=device(like))


def eye_like(n: int, like: Array) -> Array:
    """The identity (n, n) in `like`'s library, dtype and device."""
    xp = namespace(like)
    if xp is np:
        return np.eye(n, dtype=like.dtype)
    return xp.eye(n, dtype=like.dtype, device=device(like))


def is_integer(x: Array) -> bool:
    return bool(namespace(x).isdtype(x.dtype, "integral"))


def as_rows(x: Array) -> Array:
    """`x` (..., n) as a matrix (rows, n)."""
    return namespace(x).reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))


def regroup(x: Array, shape: tuple[int, ...]) -> Array:
    """`x` reshaped, its first axis kept, in two passes: dask merges axes and splits them, but not both at once."""
    xp = namespace(x)
    return xp.reshape(xp.reshape(x, (x.shape[0], math.prod(x.shape[1:]))), shape)  # no -1: an axis may be empty


def column(v: Array) -> Array:
    """`v` (n,) as a column (n, 1): a factor for every row of a matrix."""
    return namespace(v).expand_dims(v, axis=1)


def outer(a: Array, b: Array) -> Array:
    """The matrix a_i b_j."""
    return column(a) * namespace(b).expand_dims(b, axis=0)


def row_norm(V: Array) -> Array:
    """The Euclidean norm of every row of `V` (out, in), shape (out,)."""
    xp = namespace(V)
    return xp.sqrt(xp.sum(V * V, axis=1))


def at_least(x: Array, least: float) -> Array:
    """Each number of x, or `least` where it is less."""
    return namespace(x).where(x >= least, x, zeros_like(x.shape, x) + least)


def at_least_vjp(x: Array, least: float, dy: Array) -> Array:
    """The gradient of x: at `least` itself that of what is above, as torch has it."""
    return namespace(dy).where(x >= least, dy, zeros_like(dy.shape, dy))


def thin_svd(W: Array) -> tuple[Array, Array, Array]:
    """U (out, n), S (n,) and V^T (n, in) with W = U S V^T, n the smaller of W's sizes. The signs are the library's own."""
    U, S, Vh = namespace(W).linalg.svd(W, full_matrices=False)
    return U, S, Vh


def right_vectors(W: Array) -> Array:
    """All right singular vectors of `W` (out, in), in the columns of (in, in). Those beyond W's rows are the library's own choice."""
    xp, (rows, n) = namespace(W), W.shape
    try:
        Vh = xp.linalg.svd(W, full_matrices=True)[2]
    except ValueError:  # Dask has the thin decomposition only: rows of zeros bring the others
        Vh = xp.linalg.svd(pad(W, 0, 0, max(n - rows, 0)), full_matrices=False)[2]
    return xp.matrix_transpose(Vh)


def pad(x: Array, axis: int, before: int, after: int) -> Array:
    """`x` with zeros put before and after it along `axis`."""
    if before == after == 0:
        return x
    shape = x.shape
    parts = [zeros_like((*shape[:axis], n, *shape[axis + 1 :]), x) if n > 0 else None for n in (before, after)]
    return namespace(x).concat([part for part in (parts[0], x, parts[1]) if part is not None], axis=axis)


def spread(x: Array, axis: int, stride: int) -> Array:
    """`x` with `stride - 1` zeros after each entry along `axis` but the last: the transpose of taking every stride-th."""
    if stride == 1 or x.shape[axis] == 0:
        return x
    xp = namespace(x)
    shape = x.shape
    entry = xp.expand_dims(x, axis=axis + 1)
    gaps = zeros_like((*shape[: axis + 1], stride - 1, *shape[axis + 1 :]), x)
    wide = xp.reshape(xp.concat([entry, gaps], axis=axis + 1), (*shape[:axis], shape[axis] * stride, *shape[axis + 1 :]))
    keep = (slice(None),) * axis + (slice(0, (shape[axis] - 1) * stride + 1),)
    return wide[(*keep, ...)]


def take_columns(W: Array, indices: Array) -> Array:
    """`W[:, indices]` with the columns last: (..., rows) for `indices` (...)."""
    xp = namespace(W)
    flat = xp.take(W, xp.reshape(indices, (-1,)), axis=1)
    return xp.reshape(xp.permute_dims(flat, (1, 0)), (*indices.shape, W.shape[0]))


def scattered(values: Array, places: Array, n: int) -> Array:
    """`n` numbers: values[k] at places[k], no two of them the same, and zero elsewhere. Every place looks up what belongs there."""
    xp = namespace(values)
    order = xp.argsort(places)
    taken, every = xp.take(places, order), integers(np.arange(n), places, "int64")
    at = xp.searchsorted(taken, every)
    at = xp.where(at < taken.shape[0], at, taken.shape[0] - 1)
    return xp.where(xp.take(taken, at) == every, xp.take(values, xp.take(order, at)), zeros_like((n,), values))


def one_hot(indices: Array, n: int, like: Array) -> Array:
    """Rows of the identity: (len(indices), n) in `like`'s dtype, for a scatter-add as a matrix product."""
    xp = namespace(like)
    columns = xp.arange(n, dtype=indices.dtype, device=getattr(indices, "device", None))
    hit = xp.expand_dims(xp.reshape(indices, (-1,)), axis=1) == xp.expand_dims(columns, axis=0)
    return xp.astype(hit, like.dtype)


def sum_to(d: Array, shape: tuple[int, ...]) -> Array:
    """The transpose of broadcasting `shape` to `d`'s shape: the sum over what was repeated."""
    xp = namespace(d)
    while d.ndim > len(shape):
        d = xp.sum(d, axis=0)
    for axis, n in enumerate(shape):
        if n == 1 and d.shape[axis] != 1:
            d = xp.sum(d, axis=axis, keepdims=True)
    return d


def tile(V: Array, shape: tuple[int, int]) -> Array:
    """`V` repeated along both axes and cut to `shape`: entry (i, j) is V[i mod rows, j mod columns]."""
    xp, (rows, columns) = namespace(V), V.shape
    n, m = (-(-size // of) for size, of in zip(shape, V.shape, strict=True))
    copies = xp.broadcast_to(xp.expand_dims(xp.expand_dims(V, axis=1), axis=0), (n, rows, m, columns))
    return xp.reshape(copies, (n * rows, m * columns))[: shape[0], : shape[1]]


def tile_vjp(d: Array, shape: tuple[int, int]) -> Array:
    """The gradient of `tile` for a V of `shape`: the sum of all its copies."""
    xp, (rows, columns) = namespace(d), shape
    d = pad(pad(d, 0, 0, -d.shape[0] % rows), 1, 0, -d.shape[1] % columns)
    d = xp.sum(xp.reshape(d, (d.shape[0] // rows, rows, d.shape[1])), axis=0)
    return xp.sum(xp.reshape(d, (rows, d.shape[1] // columns, columns)), axis=1)


def right_divide(Y: Array, M: Array) -> Array:
    """X with X M = Y, for a stack of Y (..., n, r) and square M (..., r, r): elimination, each pivot the largest of its column."""
    xp, r = namespace(Y, M), M.shape[-1]
    left, right = xp.matrix_transpose(M), xp.matrix_transpose(Y)
    rows = xp.arange(r, device=device(M))
    for j in range(r):
        sizes = xp.where(rows < j, -1 + 0 * left[..., j], abs(left[..., j]))
        chosen = xp.expand_dims(xp.expand_dims(xp.argmax(sizes, axis=-1), axis=-1) == rows, axis=-1)
        here = xp.expand_dims(rows == j, axis=-1)
        column = left[..., j : j + 1]
        pivot = xp.sum(xp.where(chosen, column, 0 * column), axis=-2, keepdims=True)
        factors = xp.where(here, 0 * column, xp.where(chosen, column[..., j : j + 1, :], column))
        left, right = (_eliminated(V, j, here, chosen, pivot, factors) for V in (left, right))
    return xp.matrix_transpose(right)


def _eliminated(V: Array, j: int, here: Array, chosen: Array, pivot: Array, factors: Array) -> Array:
    """Rows j and `chosen` exchanged, row j divided by the pivot and taken `factors` times off every other."""
    xp = namespace(V)
    top = xp.sum(xp.where(chosen, V, 0 * V), axis=-2, keepdims=True)
    row = top / pivot
    return xp.where(here, row, xp.where(chosen, V[..., j : j + 1, :], V) - factors * row)
