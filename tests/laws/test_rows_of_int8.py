"""Eight bits for LoftQ: each row of a matrix becomes multiples of its largest magnitude / 127, by way of half precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_ref.errors import ConfigError
from peft_ref.layers import Linear
from peft_ref.methods import LoRA
from peft_ref.methods.loftq_init import LoftQ, half, int8, loftq
from tests.laws.compare import assert_same_bits

RNG = np.random.default_rng(0)
EVERY_HALF = np.arange(2**16, dtype=np.uint16).view(np.float16)
EVERY_HALF = np.sort(EVERY_HALF[np.isfinite(EVERY_HALF)]).astype(np.float32)
# m times 127 / m in float32, of which each factor is rounded, then their product, by 2^-24 of itself
ROUNDED = 127 * 4 * 2.0**-24
# Where bitsandbytes 0.50.2 sends m / 2 for the row's largest m, in steps of m / 127
HALF_GOES = {1041: 63, 1051: 63, 1055: 63, 1119: 64, 1123: 64, 1165: 64, 1227: 63, 1269: 63, 1025: 64, 1027: 64}
SIZES = [1e-6, 1e-3, 1.0, 1e4]


def halves(size: float, shape: tuple[int, int] = (9, 200)) -> Any:
    return (RNG.normal(size=shape) * size).astype(np.float16).astype(np.float64)


def largest(W: Any) -> Any:
    return np.max(np.abs(W), axis=1, keepdims=True)


def test_half_precision_is_numpys_on_each_of_its_numbers_between_two_and_beside_the_middle() -> None:
    middles = (EVERY_HALF[1:] + EVERY_HALF[:-1]) / 2  # exact in float32; the even neighbour's
    beside = [np.nextafter(middles, np.float32(end)) for end in (-np.inf, np.inf)]
    for numbers in (EVERY_HALF, middles, *beside):
        assert_same_bits(half(numbers), numbers.astype(np.float16).astype(np.float32), "half")
        assert_same_bits(half(numbers.astype(float)), numbers.astype(np.float16).astype(float), "half, of float64")


@pytest.mark.parametrize("size", SIZES)
def test_a_number_is_off_by_at_most_half_a_step_of_its_row(size: float) -> None:
    W = halves(size)
    step = largest(W) / 127
    assert np.all(np.abs(int8(W) - W) <= (0.5 + ROUNDED) * step)
    assert np.max(np.abs(int8(W) - W) / step) > 0.45  # and a step is not finer
    between = W * (1 + RNG.uniform(-(2.0**-12), 2.0**-12, size=W.shape))
    lost = np.abs(between) * 2.0**-11 + 2.0**-25  # by half precision: of eleven bits, or of 2^-24
    assert np.all(np.abs(int8(between) - between) <= (0.5 + ROUNDED) * largest(half(between)) / 127 + lost)


@pytest.mark.parametrize("size", SIZES)
def test_a_rows_largest_magnitude_is_kept_and_all_are_whole_multiples_of_its_127th(size: float) -> None:
    W = halves(size)
    Q = int8(W)
    at = np.abs(W) == largest(W)
    np.testing.assert_array_equal(Q[at], W[at])
    k = 127 * Q / largest(W)
    np.testing.assert_allclose(k, np.rint(k), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(np.max(np.abs(np.rint(k)), axis=1), 127)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_half_of_the_largest_magnitude_goes_up_or_down_as_with_bitsandbytes(dtype: Any) -> None:
    m = np.asarray(list(HALF_GOES), dtype=dtype)[:, None]
    steps = 127 * int8(m * np.asarray([[1, 0.5, -0.5]], dtype=dtype)) / m
    np.testing.assert_array_equal(np.rint(steps[:, 1]), list(HALF_GOES.values()))
    np.testing.assert_array_equal(steps[:, 2], -steps[:, 1])


def test_a_row_of_zeros_stays_and_nothing_is_divided_by_it() -> None:
    W = halves(1.0, (3, 5))
    W[1] = 0
    with np.errstate(all="raise"):
        Q = int8(W)
    assert not np.any(Q[1])
    np.testing.assert_array_equal(Q[[0, 2]], int8(W[[0, 2]]))
    assert not np.any(int8(np.full((2, 3), 2.0**-25)))  # half precision has nothing between zero and 2^-24


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_on_the_grid_are_fixed_points(dtype: Any) -> None:
    """Half precision moves k m / 127 by less than k 2^-11 of a step, which is less than half of one."""
    m = np.abs(halves(1.0, (50, 1))).astype(dtype)
    k = RNG.integers(-127, 128, size=(50, 300)).astype(dtype)
    k[:, 0] = 127
    assert_same_bits(int8(k * m / 127), k * m / 127, "the grid")
    W = RNG.normal(size=(50, 300)).astype(dtype)
    assert_same_bits(int8(int8(W)), int8(W), "int8 of int8")


def test_rows_know_nothing_of_each_other_and_columns_have_no_order() -> None:
    W, columns = halves(1.0), RNG.permutation(200)
    sizes = 2.0 ** np.arange(-4, 5)[:, None]
    np.testing.assert_array_equal(int8(sizes * W), sizes * int8(W))
    np.testing.assert_array_equal(int8(W[:, columns]), int8(W)[:, columns])
    np.testing.assert_array_equal(int8(-W), -int8(W))


def test_rows_are_those_of_the_stored_matrix() -> None:
    W = halves(1.0, (7, 12))
    stored = Linear(in_features=12, out_features=7, transposed=True)
    start = loftq(LoRA(r=2), stored, W, LoftQ(loftq_bits=8))
    np.testing.assert_array_equal(start.W, int8(np.ascontiguousarray(W.T)).T)
    assert not np.array_equal(start.W, int8(W))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_loftqs_error_is_what_the_first_ranks_leave_of_the_plain_quantised_weights(dtype: Any) -> None:
    """Which is never more, and for one round the plain quantised weight is W's own."""
    layer, method = Linear(in_features=24, out_features=17), LoRA(r=3)
    W = RNG.normal(size=(17, 24)).astype(dtype)
    for rounds in (1, 2, 4):
        start = loftq(method, layer, W, LoftQ(loftq_bits=8, loftq_iter=rounds))
        assert start.W.dtype == start.params.A.dtype == start.params.B.dtype == dtype
        plain = np.linalg.norm(W - start.W)
        left = np.linalg.norm(W - start.W - start.params.B @ start.params.A)
        S = np.linalg.svd((W - start.W).astype(float), compute_uv=False)
        assert left < plain
        np.testing.assert_allclose(left, np.linalg.norm(S[3:]), rtol=1e-4 if dtype == np.float32 else 1e-10)
        if rounds == 1:
            np.testing.assert_array_equal(start.W, int8(W))
        four = loftq(method, layer, W, LoftQ(loftq_bits=4, loftq_iter=rounds))
        assert plain < np.linalg.norm(W - four.W) / 5


@pytest.mark.parametrize("number", [65520.0, -65520.0, 1e300, np.inf, -np.inf, np.nan])
def test_a_number_that_half_precision_cannot_hold_is_refused(number: float) -> None:
    W = np.ones((2, 3))
    W[1, 2] = number
    with (
        np.errstate(all="raise"),
        pytest.raises(ConfigError, match=r"^loftq_bits=8 of a weight with numbers of 65520 and more.* Use 4 bits\.$"),
    ):
        int8(W)
    W[1, 2] = np.nextafter(np.float32(65520), np.float32(0))
    assert int8(W)[1, 2] == 65504
    W[1, 2] *= -1
    assert int8(W)[1, 2] == -65504


@pytest.mark.parametrize("bits", [0, 3, 7, 16, "8", None, [8]])
def test_other_numbers_of_bits_are_refused(bits: Any) -> None:
    with pytest.raises(ConfigError, match=r"^loftq_bits=.*: there are 4, which is nf4, and 8, rows of int8\.$"):
        LoftQ(loftq_bits=bits)
    assert LoftQ(loftq_bits=8).loftq_iter == 1
