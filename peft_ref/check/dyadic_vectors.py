"""Vectors whose norms are powers of two, so that a method that divides by a norm rounds nothing."""

from __future__ import annotations

import numpy as np

from peft_ref.check.case import NDArray

LARGEST = 3  # of an entry
TRIES = 2000  # some lengths have no such vector: then it is any


def whole_norms(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    """Columns of small whole numbers, none zero, whose squares add up to a power of four."""
    return np.stack([whole_norm(rng, shape[0]) for _ in range(shape[1])], axis=1)


def whole_norm(rng: np.random.Generator, n: int) -> NDArray:
    powers = [4.0**k for k in range(8)]
    v = np.ones(n)
    for _ in range(TRIES):
        v = rng.integers(1, LARGEST + 1, n) * rng.choice([-1.0, 1.0], n)
        if float(v @ v) in powers and len(set(np.abs(v))) > 1:
            break
    return np.asarray(v)


def orthonormal_start(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    """Columns Q T: Q orthonormal and dyadic, T upper triangular with powers of two on its diagonal, so that Gram-Schmidt gives Q."""
    n, r = shape
    v = whole_norm(rng, n)
    Q = np.eye(n) - 2 * np.outer(v, v) / (v @ v)
    u = Q[:, :r]
    for _ in range(TRIES):
        T = np.triu(rng.choice([-1.0, 1.0], (r, r)), 1) + np.diag(rng.choice([1.0, 2.0], r))
        u = Q[:, rng.permutation(n)[:r]] @ T
        if np.all(u != 0):
            break
    return np.asarray(u)
