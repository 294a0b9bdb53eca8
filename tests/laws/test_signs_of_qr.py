"""The signs that LAPACK gives Q's columns, found without it, are the ones that NumPy's qr gives."""

from __future__ import annotations

import numpy as np
import pytest

from peft_ref.methods.normals import columns, diagonal_signs, orthonormal
from tests.laws.compare import Host, assert_close


def zeros_first(M: Host) -> Host:
    """No entry on or above the diagonal but in the last columns."""
    return np.tril(M, -1) + np.triu(M, 2)


def zeros_below(M: Host) -> Host:
    return np.triu(M)


@pytest.mark.parametrize("made", [np.asarray, zeros_first, zeros_below, np.negative])
@pytest.mark.parametrize("size", [(5, 3), (4, 4), (2, 2), (1, 1), (9, 6)], ids=str)
def test_orthonormal_columns_with_their_signs_are_those_of_qr(size: tuple[int, int], made: np.ufunc) -> None:
    for seed in range(20):
        M = made(np.random.default_rng(seed).normal(size=size))
        if np.linalg.matrix_rank(M) < size[1]:
            continue
        signs = diagonal_signs(columns(M))
        assert all(s.shape == (1,) for s in signs)
        Q = np.stack([n * s for n, s in zip(orthonormal(columns(M)), signs, strict=True)], axis=1)
        assert_close(Q, np.linalg.qr(M).Q, "Q", rounding=1e-10)


def test_a_first_entry_of_zero_counts_as_positive() -> None:
    for M in (np.asarray([[0.0, 1.0], [1.0, 0.0]]), np.asarray([[0.0], [-3.0]])):
        signs = np.concat(diagonal_signs(columns(M)))
        np.testing.assert_array_equal(signs, np.sign(np.diag(np.linalg.qr(M).R)))
        assert signs[0] == -1
