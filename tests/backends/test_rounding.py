"""A value is rounded once, to nearest and ties to even. Expected values come from the list of all 16-bit floats, not from a cast."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_ref.backend import DTYPES, compute_dtype, round_to
from peft_ref.errors import ConfigError

FORMATS = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Every finite number of a format, ascending; its last bit is the parity of its place counted from zero.
INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80}
TABLES = {name: np.arange(INFINITY[name], dtype=np.uint16).view(dtype).astype(np.float64) for name, dtype in FORMATS.items()}


def nearest(value: float, name: str) -> float:
    table, size = TABLES[name], abs(value)
    above = int(np.searchsorted(table, size))
    if above == len(table):  # infinity sits where the next number would be
        last, step = Fraction(table[-1]), Fraction(table[-1]) - Fraction(table[-2])
        found = float(table[-1]) if Fraction(size) - last < step / 2 else np.inf
    elif above == 0 or table[above] == size:
        found = float(table[above])
    else:
        down, up = Fraction(size) - Fraction(table[above - 1]), Fraction(table[above]) - Fraction(size)
        lower = down < up or (down == up and (above - 1) % 2 == 0)
        found = float(table[above - 1] if lower else table[above])
    return float(np.copysign(found, value))


@pytest.mark.parametrize("name", FORMATS)
@given(value=st.floats(allow_nan=False, allow_infinity=False) | st.floats(-4, 4) | st.floats(-1e-40, 1e-40), place=st.integers(0, 30000))
@example(value=1 + 2.0**-8 + 2.0**-40, place=0)  # through float32 this becomes a tie, and goes the wrong way
@example(value=1 + 2.0**-11 + 2.0**-40, place=1)
@settings(deadline=None, max_examples=300)
def test_sixteen_bit_rounding_is_to_the_nearest_of_all_numbers_and_ties_to_even(name: str, value: float, place: int) -> None:
    table = TABLES[name]
    low = table[place % (len(table) - 1)]
    tie = (low + table[place % (len(table) - 1) + 1]) / 2
    values = [value, -value, low, tie, np.nextafter(tie, 0), np.nextafter(tie, np.inf), tie * (1 + 2.0**-40)]
    np.testing.assert_array_equal(round_to(np.asarray(values), name), [nearest(float(v), name) for v in values])


@pytest.mark.parametrize("name", DTYPES)
def test_infinities_nan_and_signed_zeros_survive_rounding(name: str) -> None:
    special = np.asarray([np.inf, -np.inf, np.nan, 0.0, -0.0])
    rounded = round_to(special, name)
    np.testing.assert_array_equal(rounded, special)
    np.testing.assert_array_equal(np.signbit(rounded[3:]), [False, True])


@pytest.mark.parametrize("name", DTYPES)
@given(st.lists(st.floats(allow_nan=False), max_size=5))
@settings(deadline=None, max_examples=50)
def test_rounding_twice_is_rounding_once(name: str, values: list[float]) -> None:
    once = round_to(np.asarray(values, dtype=np.float64), name)
    assert once.dtype == np.float64
    np.testing.assert_array_equal(round_to(once, name), once)


def test_sixteen_bit_floats_are_computed_in_float32() -> None:
    assert [compute_dtype(name) for name in DTYPES] == ["float64", "float32", "float32", "float32"]


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(ConfigError, match="'float8'"):
        compute_dtype("float8")


@pytest.mark.parametrize("array", [np.asarray([1j]), np.asarray(["a"]), np.asarray([None])])
def test_what_is_no_real_number_is_refused(array: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="real"):
        round_to(array, "float32")
