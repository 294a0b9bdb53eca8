"""What FRoD works out of the frozen weights: which layers share a basis, the basis V, the entries beside the diagonal, and each layer's U.

    W0 = U diag(L) V^T         the columns of U have length one, or are zero where W0 V^-T has one shorter than 1e-12

The dtype is the weights'; U and L are worked out in float64.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from peft_ref.arrays import Array, eye_like, namespace, right_vectors, thin_svd
from peft_ref.methods.torch_draws import Generator, Host

SHORTEST = 1e-12
NO_RANK = 1e-6  # of the largest singular value of a V that has no inverse


class Category(NamedTuple):
    """Modules that share a basis, and those whose weights make it: one of each block, in the order of the blocks."""

    modules: tuple[str, ...]
    read: tuple[str, ...]


def categories(modules: Sequence[str]) -> dict[str, Category]:
    """By name. Of two modules in blocks of the same number, an encoder's and a decoder's, the later one's weight is read."""
    shared: dict[str, list[str]] = {}
    read: dict[str, dict[int, str]] = {}
    for place, name in enumerate(modules):
        category = category_of(name)
        shared.setdefault(category, []).append(name)
        read.setdefault(category, {})[block_of(name, place)] = name
    return {c: Category(tuple(names), tuple(name for _, name in sorted(read[c].items()))) for c, names in shared.items()}


def category_of(name: str) -> str:
    *above, last = name.split(".")
    if not above or above[-1].isdigit():
        return last
    if above[-2:] == ["attention", "output"] and last == "dense":  # BERT's, beside the output.dense of its network
        return "attention_output"
    return f"{above[-1]}_{last}"


def block_of(name: str, otherwise: int) -> int:
    """The number of the block a module is in: what follows "layers", or the first number of its name."""
    parts = name.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in (*after, *parts) if part.isdigit()), otherwise)


def basis(weights: Sequence[Array], ridge: float) -> Array:
    """V (in, in) of weights (out, in)."""
    xp, mT = namespace(*weights), namespace(*weights).matrix_transpose
    stacked = xp.concat(list(weights))
    rows, n = stacked.shape
    if rows < n:
        return right_vectors(stacked)
    Q, R = xp.linalg.qr(stacked)
    one, at, inverses = eye_like(n, Q), 0, []
    for W in weights:
        part = Q[at : at + W.shape[0], :]
        inverses.append(xp.linalg.solve(mT(part) @ part + ridge * one, one) / len(weights))
        at += W.shape[0]
    mean = sum(inverses)
    # of a symmetric matrix without negative eigenvalues singular vectors are eigenvectors, from the largest to the smallest
    return mT(R) @ xp.flip(thin_svd((mean + mT(mean)) / 2.0)[0], axis=1)


def places(sizes: Mapping[str, int], counts: Mapping[str, int], seed: int) -> dict[str, Host]:
    """Rows and columns (2, count) off the diagonal of a matrix of each size, drawn by one generator for all categories in turn."""
    generator, drawn = Generator(seed), {}
    for category in sorted(sizes):
        n, count = sizes[category], counts[category]
        beside = n * n - n
        if not count:
            drawn[category] = np.zeros((2, 0), dtype=np.int64)
            continue
        chosen = generator.randperm(beside, count)
        generator.raw(beside - 1 - min(count, beside - 1))  # torch shuffles to the end
        row, column = np.divmod(chosen, n - 1)
        drawn[category] = np.stack([row, column + (column >= row)])
    return drawn


def solved(W: Array, V: Array) -> tuple[Array, Array]:
    """U (out, in) and L (in,) of a weight in the basis V."""
    xp = namespace(W)
    turned = in_basis(xp.astype(W, xp.float64), xp.astype(V, xp.float64))
    lengths = xp.sqrt(xp.sum(turned * turned, axis=0))
    long = lengths > SHORTEST
    U = turned / xp.where(long, lengths, lengths + math.inf)
    return xp.astype(U, W.dtype), xp.astype(lengths, W.dtype)


def in_basis(W: Array, V: Array) -> Array:
    """W V^-T; by the pseudo-inverse where V has no inverse, which every library says in its own way."""
    xp, mT = namespace(W), namespace(W).matrix_transpose
    found = None
    with contextlib.suppress(np.linalg.LinAlgError, RuntimeError):
        found = mT(xp.linalg.solve(V, mT(W)))
    return found if found is not None and bool(xp.all(xp.isfinite(found))) else W @ mT(xp.linalg.pinv(V, rtol=NO_RANK))
