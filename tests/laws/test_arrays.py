"""The helpers of `peft_ref.arrays` that are mathematics, each against what defines it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from peft_ref.arrays import at_least, at_least_vjp, right_divide, right_vectors, scattered, spread, sum_to, tile, tile_vjp

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


def test_what_is_less_becomes_the_bound_and_has_no_gradient_and_the_bound_itself_has() -> None:
    x = np.array([-1.0, 0.5, 1.0, 2.0])
    assert at_least(x, 1.0).tolist() == [1, 1, 1, 2]
    assert at_least_vjp(x, 1.0, np.array([3.0, 4.0, 5.0, 6.0])).tolist() == [0, 0, 5, 6]


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (3, 1), (1, 1), (4,), (1,), ()])
def test_sum_to_is_the_transpose_of_broadcasting(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    x, d = rng.normal(size=shape), rng.normal(size=(2, 3, 4))
    back = sum_to(d, shape)
    assert back.shape == shape
    assert np.sum(back * x) == pytest.approx(np.sum(d * np.broadcast_to(x, d.shape)), rel=1e-13)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_spread_is_the_transpose_of_taking_every_so_many(axis: int, stride: int, n: int) -> None:
    rng = np.random.default_rng(4)
    long = [2, 2, 2]
    long[axis] = max((n - 1) * stride + 1, 0)
    taken = (slice(None),) * axis + (slice(None, None, stride),)
    V = rng.normal(size=long)
    x = rng.normal(size=V[taken].shape)
    wide = spread(x, axis, stride)
    assert wide.shape == V.shape
    assert np.sum(wide * V) == pytest.approx(np.sum(x * V[taken]), rel=1e-13)


@pytest.mark.parametrize("places", [[5], [0], [3, 0, 5], [4, 1]])
def test_scattered_numbers_lie_at_their_places(places: list[int]) -> None:
    values, expected = np.arange(1.0, 1 + len(places)), np.zeros(6)
    expected[places] = values
    assert np.array_equal(scattered(values, np.array(places, np.int64), 6), expected)


@pytest.mark.parametrize("shape", [(2, 4), (4, 4), (5, 3), (1, 1)])
def test_right_vectors_are_orthogonal_and_what_lies_beyond_the_rank_is_not_seen(shape: tuple[int, int]) -> None:
    W = np.random.default_rng(5).normal(size=shape)
    V = right_vectors(W)
    np.testing.assert_allclose(V.T @ V, np.eye(shape[1]), atol=1e-14)
    lengths = np.linalg.norm(W @ V, axis=0)
    assert lengths[: min(shape)] == pytest.approx(np.linalg.norm(W, 2) if min(shape) == 1 else np.linalg.svd(W)[1], rel=1e-12)
    np.testing.assert_allclose(lengths[min(shape) :], 0, atol=1e-13)
