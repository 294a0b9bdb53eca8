"""The exact twin's hyperbolic tangent: its value lies between bounds made of fractions alone, and nobody honest leaves its bound."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_ref.check.exact import TANH_DEPTH, Exact, exact_array
from peft_ref.check.tolerance import PRECISION
from tests.check.honest.arithmetic import ORDERS, Arithmetic

LAW = settings(max_examples=120, deadline=None)
BITS = 200
NARROW = ("float32", "float16", "bfloat16")
ANY = st.floats(allow_nan=False, allow_infinity=False)
USUAL = st.floats(-100, 100).filter(lambda v: v != 0)


def of(value: float, p: int = 24) -> Exact:
    return Exact.of(value, p)


def outwards(value: Fraction, bits: int, up: bool) -> Fraction:
    """The next number of that many bits, to keep fractions short."""
    shift = bits - (value.numerator.bit_length() - value.denominator.bit_length())
    scaled = value * Fraction(2) ** shift
    return Fraction(math.ceil(scaled) if up else math.floor(scaled)) / Fraction(2) ** shift


def exp_between(x: Fraction, bits: int) -> tuple[Fraction, Fraction]:
    """e^x for x >= 0: of x / 2^k by its series, whose rest after a term is less than that term where x / 2^k <= 1/2; then k squarings."""
    k = max(0, math.ceil(x).bit_length() + 4)
    small = x / 2**k
    total, term, n = Fraction(1), Fraction(1), 0
    while term > Fraction(1, 2 ** (bits + 2 * k + 20)):
        n += 1
        term = outwards(term * small / n, bits + 2 * k + 60, up=True)
        total += term
    low, high = total - (n + 1) * Fraction(1, 2 ** (bits + 2 * k + 40)) - term, total + 2 * term
    for _ in range(k):
        low, high = outwards(low * low, bits + 2 * k + 40, up=False), outwards(high * high, bits + 2 * k + 40, up=True)
    return low, high


def tanh_between(x: Fraction, bits: int = BITS + 60) -> tuple[Fraction, Fraction]:
    """(e^2x - 1) / (e^2x + 1), which grows with e^2x. Small arguments cancel bits: so many more are taken."""
    if x < 0:
        low, high = tanh_between(-x, bits)
        return -high, -low
    lost = max(0, -math.floor(math.log2(x))) if x < 1 else 0
    low, high = exp_between(2 * x, bits + lost)
    return (low - 1) / (low + 1), (high - 1) / (high + 1)


def assert_two_hundred_bits(x: float) -> None:
    got = of(x).tanh().fraction
    low, high = tanh_between(Fraction(x))
    assert high - low <= abs(low) * Fraction(1, 2 ** (BITS + 20)), "the bounds are too wide to say anything"
    slack = abs(low) * Fraction(1, 2 ** (BITS - 2))
    assert low - slack <= got <= high + slack, x


# ---- values


@given(USUAL)
@example(1.0)
@example(0.5)
@example(-0.1)
@example(35.0)
@example(69.9)
@example(70.1)
@LAW
def test_a_tangent_is_right_to_two_hundred_bits(x: float) -> None:
    assert_two_hundred_bits(x)


@pytest.mark.parametrize("x", [2.0**-30, -(2.0**-100), 3 * 2.0**-300, 1e-200])
def test_a_tangent_of_a_tiny_number_is_right_to_two_hundred_bits(x: float) -> None:
    assert_two_hundred_bits(x)


@pytest.mark.parametrize("x", [5e-324, 2.0**-1000, -1e-290])
def test_below_two_hundred_bits_a_tangent_is_its_argument(x: float) -> None:
    """x - x^3 / 3 < tanh(x) < x for x > 0."""
    got, want = abs(of(x).tanh().fraction), abs(Fraction(x))
    assert want * (1 - Fraction(1, 2 ** (BITS - 2))) <= got <= want * (1 + Fraction(1, 2 ** (BITS - 2)))


@given(ANY)
@example(1e308)
@example(-1e308)
@example(0.0)
@LAW
def test_a_tangent_has_its_arguments_sign_and_is_never_beyond_one(x: float) -> None:
    got, other = of(x).tanh(), of(-x).tanh()
    assert got.fraction == -other.fraction
    assert (got.fraction > 0, got.fraction < 0) == (x > 0, x < 0)
    assert abs(got.fraction) <= 1
    assert abs(float(got) - math.tanh(x)) <= 2.0**-52 * abs(math.tanh(x))


@given(st.floats(-20, 20), st.floats(-20, 20))
@LAW
def test_a_tangent_grows_with_its_argument(x: float, y: float) -> None:
    if x < y:
        assert of(x).tanh().fraction < of(y).tanh().fraction


@given(st.floats(-6, 6).filter(lambda v: abs(v) > 1e-3))
@LAW
def test_the_tangent_of_twice_a_number_follows_from_its_own(x: float) -> None:
    """tanh(2x) = 2 t / (1 + t^2)"""
    t = of(x).tanh().fraction
    want = 2 * t / (1 + t * t)
    assert abs(of(2 * x).tanh().fraction - want) <= abs(want) * Fraction(1, 2 ** (BITS - 8))


def test_numpy_finds_it() -> None:
    x = np.asarray([[0.5, -2.0], [0.0, 7.0]])
    got = np.tanh(exact_array(x, 24))
    np.testing.assert_allclose(got.astype(np.float64), np.tanh(x), rtol=1e-15)
    assert np.tanh(exact_array(x, 24) * 1)[1, 0].k == 0


# ---- bounds


def bound(e: Exact, dtype: str) -> float:
    u = 2.0 ** -PRECISION[dtype]
    return u * (e.k * e.gauge + e.err) * (1 + 4 * e.k * u)


def library(a: Arithmetic, x: Any, off: float) -> Any:
    """A library's tangent: of the number in the format, rounded to it, and off by so many u of itself."""
    wide = np.tanh(x.astype(np.float64))
    return a.array(wide * (1 + off * 2.0 ** -PRECISION[_name(a)]))


def _name(a: Arithmetic) -> str:
    return next(name for name in PRECISION if Arithmetic(name, a.rng).dtype is a.dtype)


@given(st.integers(0, 2**20), st.sampled_from(ORDERS), st.integers(1, 12), st.floats(-12, 12), st.integers(-2, 4))
@settings(max_examples=200, deadline=None)
def test_no_honest_tangent_of_a_sum_of_products_leaves_its_bound(seed: int, order: str, n: int, off: float, scale: int) -> None:
    """Also where the sum is so large that the tangent is flat, and where it is so inexact that it is anything."""
    rng = np.random.default_rng(seed)
    A, B = (rng.integers(17, 128, s) * rng.choice([-1.0, 1.0], s) / 128 * 2.0**scale for s in ((2, n), (n, 3)))
    for dtype in NARROW:
        a = Arithmetic(dtype, rng, order)
        exact = np.tanh(exact_array(A, PRECISION[dtype]) @ exact_array(B, PRECISION[dtype]))
        got = library(a, a.matmul(a.array(A), a.array(B)), off)
        for e, g in zip(exact.reshape(-1), got.reshape(-1), strict=True):
            assert abs(float(g) - float(e)) <= bound(e, dtype), dtype


@given(st.integers(0, 2**20), st.sampled_from(ORDERS), st.floats(-12, 12))
@settings(max_examples=150, deadline=None)
def test_the_bound_holds_through_two_tangents_and_a_slope(seed: int, order: str, off: float) -> None:
    """A prefix's projection, its gradient, and a tangent of it all."""
    rng = np.random.default_rng(seed)
    E, W, G = (rng.integers(17, 128, s) * rng.choice([-1.0, 1.0], s) / 128 for s in ((3, 4), (4, 2), (2, 3)))
    for dtype in NARROW:
        p, a = PRECISION[dtype], Arithmetic(dtype, rng, order)
        H = np.tanh(exact_array(E, p) @ exact_array(W, p))
        exact = np.tanh((1 - H * H) @ exact_array(G, p))
        h = library(a, a.matmul(a.array(E), a.array(W)), off)
        got = library(a, a.matmul(a.number(1.0) - h * h, a.array(G)), -off)
        for e, g in zip(exact.reshape(-1), got.reshape(-1), strict=True):
            assert abs(float(g) - float(e)) <= bound(e, dtype), dtype


@given(st.floats(-5, 5), st.floats(0, 300), st.sampled_from(NARROW))
@LAW
def test_wherever_the_argument_may_be_its_tangent_is_within_the_bound(x: float, err: float, dtype: str) -> None:
    """From a flat place the argument may be off to a steep one."""
    p = PRECISION[dtype]
    given_x = of(x, p)
    e = Exact(given_x.n, given_x.e, given_x.gauge, 0, err, None, p).tanh()
    for off in (-1, 1):
        assert abs(math.tanh(x + off * err * 2.0**-p) - math.tanh(x)) <= bound(e, dtype) + 1e-15


@pytest.mark.parametrize("dtype", NARROW)
def test_a_sum_that_cancels_to_nothing_is_remembered_with_its_error(dtype: str) -> None:
    """big + small - big - small is nothing, and small itself in the order in which big swallows it; its tangent is as far off."""
    p = PRECISION[dtype]
    big, small = of(2.0**p, p), of(1.5, p)
    e = (big + small - big - small).tanh()
    assert float(e) == 0.0
    assert bound(e, dtype) >= math.tanh(1.5)
    assert bound(e * of(3.0, p) + of(1.0, p), dtype) >= 3 * math.tanh(1.5)
    quotient = of(1.0, p) / (of(1.0, p) / of(3.0, p))
    assert (quotient - quotient).tanh().err == (quotient - quotient).err > 0
    assert of(0.0, p).tanh().k == (of(1.5, p) - of(1.5, p)).tanh().k == 0


def test_the_bound_is_no_wider_than_the_tangents_reach() -> None:
    """Nothing computed is further away than from one end to the value."""
    wild = of(1.0, 8)
    for _ in range(40):
        wild = wild * of(1.9921875, 8) + of(-0.001953125, 8)
    e = (wild - wild + of(0.5, 8)).tanh()
    assert bound(e, "bfloat16") <= (1 + math.tanh(0.5)) * 1.5
    assert bound(e, "bfloat16") >= 1.4


@pytest.mark.parametrize("dtype", ["float32", "float16"])  # in bfloat16 an argument that is off by so much may be where it is steep
def test_a_flat_tangent_hides_what_its_argument_is_off_by(dtype: str) -> None:
    p = PRECISION[dtype]
    third = of(1.0, p) / of(3.0, p)
    near, far = third.tanh(), (third * of(24.0, p)).tanh()
    assert near.err > 0
    assert far.err < near.err
    assert near.k == far.k == TANH_DEPTH + 1
