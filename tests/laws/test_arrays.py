"""The helpers of `peft_ref.arrays` that are mathematics, each against what defines it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from peft_ref.arrays import right_divide, tile, tile_vjp

SHAPES = [((2, 3), (2, 3)), ((2, 3), (4, 9)), ((2, 3), (5, 7)), ((2, 3), (1, 2)), ((2, 3), (2, 8)), ((3, 1), (1, 4))]


@pytest.mark.parametrize(("small", "large"), SHAPES)
def test_tile_repeats_and_cuts(small: tuple[int, int], large: tuple[int, int]) -> None:
    V = np.random.default_rng(1).normal(size=small)
    i, j = np.indices(large)
    assert np.array_equal(tile(V, large), V[i % small[0], j % small[1]])


@pytest.mark.parametrize(("small", "large"), SHAPES)
def test_the_gradient_of_tile_is_its_transpose(small: tuple[int, int], large: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    V, d = rng.normal(size=small), rng.normal(size=large)
    back = tile_vjp(d, small)
    assert back.shape == small
    assert np.sum(back * V) == pytest.approx(np.sum(d * tile(V, large)), rel=1e-13)


@pytest.mark.parametrize("r", [1, 2, 5])
def test_right_divide_undoes_a_product_from_the_right(r: int) -> None:
    rng = np.random.default_rng(r)
    X, M = rng.normal(size=(3, 4, r)), rng.normal(size=(3, r, r))
    np.testing.assert_allclose(right_divide(X @ M, M), X, rtol=1e-10)


def test_right_divide_exchanges_rows_where_a_pivot_is_zero_and_is_exact_in_fractions() -> None:
    M = np.array([[0, 1, 2], [1, 0, 3], [4, 5, 0]])
    X = np.array([[1, -2, 3], [0, 7, 1]])
    exact = np.vectorize(Fraction)
    assert np.all(right_divide(exact(X @ M), exact(M)) == X)
