"""The exact twin's promise about rounding: how far an honest computation may be off, in every order of evaluation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ref.check.exact import Exact, exact_array
from peft_ref.check.tolerance import PRECISION
from tests.check.honest.arithmetic import DTYPES, ORDERS, Arithmetic
from tests.check.test_exact import LAW, NARROW, of


def bound(e: Exact, dtype: str) -> float:
    u = 2.0 ** -PRECISION[dtype]
    return u * (e.k * e.gauge + e.err) * (1 + 4 * e.k * u)


@given(st.integers(0, 2**20), st.sampled_from(ORDERS), st.integers(2, 24), st.integers(0, 14))
@LAW
def test_the_bound_holds_for_every_order_of_a_sum(seed: int, order: str, n: int, spread: int) -> None:
    rng = np.random.default_rng(seed)
    numbers = rng.integers(17, 128, n) * rng.choice([-1.0, 1.0], n) * 2.0 ** rng.integers(-spread, 1, n)
    for dtype in NARROW:
        p = PRECISION[dtype]
        exact = sum((of(v, p) for v in numbers), of(0.0, p))
        a = Arithmetic(dtype, rng, order)
        assert abs(float(a.sum(a.array(numbers))) - float(exact)) <= bound(exact, dtype), dtype


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", NARROW)
def test_the_bound_does_not_depend_on_the_order_in_which_it_was_found(dtype: str, order: str) -> None:
    """Many small numbers and a huge one: added up before it they are exact, added to it one by one each of them rounds."""
    p = PRECISION[dtype]
    numbers = np.asarray([1.0] * 60 + [2.0**p + 2.0 ** (p - 6)]) if dtype != "float16" else np.asarray([1.0] * 20 + [2.0**p + 2.0])
    exact = sum((of(v, p) for v in numbers), of(0.0, p))
    for seed in range(5):
        a = Arithmetic(dtype, np.random.default_rng(seed), order)
        assert abs(float(a.sum(a.array(numbers))) - float(exact)) <= bound(exact, dtype)


@given(st.integers(0, 2**20), st.sampled_from(ORDERS))
@settings(max_examples=60, deadline=None)
def test_the_bound_holds_through_products_roots_and_quotients(seed: int, order: str) -> None:
    """Rows of A B + C over their norms, times a gain: the steps of DoRA, in any order of summation."""
    rng = np.random.default_rng(seed)
    A, B, C, m = (rng.integers(17, 128, s) * rng.choice([-1.0, 1.0], s) / 64 for s in ((4, 3), (3, 6), (4, 6), (4, 1)))
    for dtype in ("float64", *NARROW):
        p = PRECISION[dtype]
        V = exact_array(A, p) @ exact_array(B, p) + exact_array(C, p)
        exact = exact_array(m, p) / np.sqrt(np.sum(V * V, axis=1)).reshape(-1, 1) * V
        a = Arithmetic(dtype, rng, order)
        W = a.add(a.matmul(a.array(A), a.array(B)), a.array(C))
        got = a.over(a.array(m), a.norm(W).reshape(-1, 1)) * W
        for e, g in zip(exact.reshape(-1), got.reshape(-1), strict=True):
            assert abs(Fraction(float(g)) - e.fraction) <= Fraction(min(bound(e, dtype) * (1 + 2.0 ** (8 - p)), 1e300)), dtype


@given(st.integers(0, 2**20), st.sampled_from(ORDERS), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_bound_holds_where_a_divisor_is_a_small_difference(seed: int, order: str, first: bool) -> None:
    """z m / (A B C - D), with D so near that most digits cancel: what was rounded before grows, and comes through the divisor alone."""
    rng = np.random.default_rng(seed)
    A, B, C = (rng.integers(17, 128, s) * rng.choice([-1.0, 1.0], s) / 64 for s in ((3, 4), (4, 5), (5, 3)))
    m, z = (rng.integers(17, 128, (3, 3)) / 64 for _ in range(2))
    for dtype in NARROW:
        p = PRECISION[dtype]
        D = (A @ B @ C + rng.choice([-1.0, 1.0], (3, 3)) * 2.0 ** (6 - p)).astype(DTYPES[dtype]).astype(np.float64)
        left, right, near = exact_array(A, p) @ exact_array(B, p), exact_array(C, p), exact_array(D, p)
        a = Arithmetic(dtype, rng, order)
        V, got = left @ right - near, a.matmul(a.matmul(a.array(A), a.array(B)), a.array(C)) - a.array(D)
        if any(v == 0 for v in V.reshape(-1)) or np.any(got == 0):
            continue
        quotient, divided = exact_array(m, p) / V, a.over(a.array(m), got)
        exact = quotient * exact_array(z, p) if first else exact_array(z, p) * quotient
        for e, g in zip(exact.reshape(-1), (divided * a.array(z)).reshape(-1), strict=True):
            if math.isfinite(e.err):
                assert abs(float(g) - float(e)) <= bound(e, dtype) * (1 + 2.0 ** (10 - p)), (dtype, e)


def test_errors_pass_through_sums_and_products_from_either_side() -> None:
    t, c = of(2.0) / (of(1.0) / of(3.0)), of(4.0)
    assert t.err > 0
    assert (t * c).err == (c * t).err == 4 * t.err
    assert (t + c).err == (c + t).err == (t - c).err == (-t).err == t.err
    assert (t / c).err >= t.err / 4
    assert (c / t).err > 0
    assert (t * t).sqrt().err >= t.err


@given(st.integers(0, 2**20), st.sampled_from(ORDERS))
@settings(max_examples=60, deadline=None)
def test_the_bound_holds_along_a_recurrence_of_settled_numbers(seed: int, order: str) -> None:
    """h = +(R h + b), eight times: every step is computed as it stands, its sum in any order, and the bound stays of the size of h."""
    rng = np.random.default_rng(seed)
    R, b = (rng.integers(17, 64, s) * rng.choice([-1.0, 1.0], s) / 128 for s in ((5, 5), (5, 1)))
    for dtype in ("float32", "float16"):
        p = PRECISION[dtype]
        a = Arithmetic(dtype, rng, order)
        exact, got = exact_array(b, p), a.array(b)
        for _ in range(8):
            exact = +(exact_array(R, p) @ exact + exact_array(b, p))
            got = a.add(a.matmul(a.array(R), got), a.array(b))
        for e, g in zip(exact.reshape(-1), got.reshape(-1), strict=True):
            assert abs(float(g) - float(e)) <= bound(e, dtype) * (1 + 2.0 ** (10 - p)), (dtype, e)


def test_a_settled_number_is_a_new_term_of_the_same_value_and_error() -> None:
    third = of(1.0) / of(3.0)
    long = third - of(0.25) + third * third
    settled = +long
    assert settled.fraction == long.fraction
    assert settled.gauge == abs(float(long)) < long.gauge
    assert settled.k == 0
    assert long.k * long.gauge + long.err <= settled.err <= (long.k * long.gauge + long.err) * (1 + 1e-5)
    exact = of(1.5) - of(0.25)
    again = +exact  # what is not rounded still has to match its bits
    assert (again.fraction, again.gauge, again.k, again.err) == (exact.fraction, 1.25, 0, 0.0)
    assert again.quantum is not None


def test_tangents_are_never_further_apart_than_two() -> None:
    lost = (of(1.0, 8) / of(3.0, 8) - of(1.0, 8) / of(3.03125, 8)) * of(2.0**40, 8)
    assert lost.tanh().err <= 2 * 2.0**8


def test_a_number_that_may_be_nothing_but_error_bounds_nothing_it_divides() -> None:
    """1 / (a - b) with a and b rounded and nearly equal: in bfloat16 nothing is known of it."""
    third, almost = of(1.0, 8) / of(3.0, 8), of(1.0, 8) / of(3.03125, 8)
    assert math.isinf((of(1.0, 8) / (third - almost)).err)
    assert math.isfinite((of(1.0, 53) / (of(1.0, 53) / of(3.0, 53) - of(1.0, 53) / of(3.03125, 53))).err)
