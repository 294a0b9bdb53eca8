"""The exact twin's power of e: its value lies between bounds made of fractions alone, and nobody honest leaves its bound."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_ref.attention import softmax
from peft_ref.check.exact import EXP_DEPTH, Exact, exact_array
from peft_ref.check.tolerance import PRECISION
from tests.check.honest.arithmetic import ORDERS, Arithmetic
from tests.check.test_exact_tanh import BITS, LAW, NARROW, bound, exp_between, of


@given(st.floats(-80, 80).filter(lambda v: v != 0))
@example(1.0)
@example(-0.5)
@example(2.0**-60)
@example(-745.0)
@LAW
def test_a_power_is_right_to_two_hundred_bits(x: float) -> None:
    low, high = exp_between(abs(Fraction(x)), BITS + 60)
    if x < 0:
        low, high = 1 / high, 1 / low
    assert high - low <= low * Fraction(1, 2 ** (BITS + 20)), "the bounds are too wide to say anything"
    slack = low * Fraction(1, 2 ** (BITS - 2))
    assert low - slack <= of(x).exp().fraction <= high + slack


@given(st.floats(-300, 300), st.floats(-300, 300))
@LAW
def test_powers_multiply_as_their_exponents_add(x: float, y: float) -> None:
    product = of(x).exp().fraction * of(y).exp().fraction
    total = of(x) + of(y)
    assert abs(total.exp().fraction - product) <= product * Fraction(1, 2 ** (BITS - 8))


def test_of_zero_it_is_one_to_the_bit_and_far_below_it_is_nothing() -> None:
    assert (of(0.0).exp().fraction, of(0.0).exp().k, of(0.0).exp().err) == (1, 0, 0.0)
    difference = (of(1.5) - of(1.5)).exp()  # e^1.5 times the reciprocal of e^1.5 may round
    assert (difference.fraction, difference.quantum, difference.k) == (1, None, EXP_DEPTH + 1)
    assert of(-1e6).exp().fraction == 0
    assert of(-1e300).exp().fraction == 0
    with pytest.raises(OverflowError):
        of(1e6).exp()


def test_a_sum_that_cancels_to_nothing_is_remembered_with_its_error() -> None:
    big, small = of(2.0**24), of(1.5)
    e = (big + small - big - small).exp()
    assert float(e) == 1.0
    assert bound(e, "float32") >= math.expm1(1.5)


def test_numpy_finds_it() -> None:
    x = np.asarray([[0.5, -2.0], [0.0, 7.0]])
    np.testing.assert_allclose(np.exp(exact_array(x, 24)).astype(np.float64), np.exp(x), rtol=1e-15)


@given(st.floats(-5, 5), st.floats(0, 300), st.sampled_from(NARROW))
@LAW
def test_wherever_the_argument_may_be_its_power_is_within_the_bound(x: float, err: float, dtype: str) -> None:
    p = PRECISION[dtype]
    known = of(x, p)
    e = Exact(known.n, known.e, known.gauge, 0, err, None, p).exp()
    for off in (-1, 1):
        assert abs(math.exp(x + off * err * 2.0**-p) - math.exp(x)) <= bound(e, dtype) * (1 + 1e-12)


@given(st.integers(0, 2**20), st.sampled_from(ORDERS), st.integers(1, 12), st.floats(-8, 8))
@settings(max_examples=150, deadline=None)
def test_no_honest_softmax_of_sums_of_products_leaves_its_bound(seed: int, order: str, n: int, off: float) -> None:
    """With the largest score taken off or not, by a library that is off by so many u of itself."""
    rng = np.random.default_rng(seed)
    A, B, V = (rng.integers(17, 128, s) * rng.choice([-1.0, 1.0], s) / 128 for s in ((2, n), (n, 5), (5, 3)))
    for dtype in NARROW:
        p, a = PRECISION[dtype], Arithmetic(dtype, rng, order)
        exact = softmax(exact_array(A, p) @ exact_array(B, p)) @ exact_array(V, p)
        scores = a.matmul(a.array(A), a.array(B))
        for x in (scores, scores - np.max(scores, axis=1, keepdims=True)):
            e = a.array(np.exp(x.astype(np.float64)) * (1 + off * 2.0**-p))
            got = a.matmul(a.over(e, a.sum(e, axis=1)[:, None]), a.array(V))
            for want, value in zip(exact.reshape(-1), got.reshape(-1), strict=True):
                assert abs(float(value) - float(want)) <= bound(want, dtype), dtype


def test_the_bound_is_not_wider_than_it_needs() -> None:
    assert of(1.0).exp().k == EXP_DEPTH + 1
    assert of(1.0).exp().err == 0.0
    third = of(1.0) / of(3.0)
    assert third.exp().err == pytest.approx((third.k * third.gauge + third.err) * math.exp(1 / 3), rel=1e-6)
