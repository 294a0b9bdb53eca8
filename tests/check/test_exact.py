"""The exact twin: its values are those of rational arithmetic, and its promises about rounding hold in every order of evaluation."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ref.check.case import ARRAY_OPERATIONS, Case
from peft_ref.check.corpus import corpus
from peft_ref.check.exact import Exact, Undecided, as_exact, exact_array
from peft_ref.check.oracle import exact_answer, pose, right_answer
from peft_ref.check.tolerance import PRECISION, compare, expect
from tests.check.honest.arithmetic import DTYPES, ORDERS, Arithmetic
from tests.methods import facts

Host = np.ndarray[Any, Any]
NARROW = ("float32", "float16", "bfloat16")
LAW = settings(max_examples=150, deadline=None)
DYADIC = st.builds(lambda n, e: math.ldexp(n, e), st.integers(-300, 300), st.integers(-6, 6))
SMALL = st.sampled_from([-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
LEFT_OVER = Fraction(1, 2**190)


def of(value: float, p: int = 24) -> Exact:
    return Exact.of(value, p)


# ---- values


@given(DYADIC, DYADIC, DYADIC)
@LAW
def test_sums_and_products_are_those_of_fractions(a: float, b: float, c: float) -> None:
    x, y, z = map(Fraction, (a, b, c))
    assert ((of(a) + of(b)) * of(c) - of(a) * of(b)).fraction == (x + y) * z - x * y
    assert (-(of(a) - of(b))).fraction == y - x
    assert abs(of(a) * of(c)).fraction == abs(x * z)


@given(DYADIC, DYADIC)
@LAW
def test_plain_numbers_take_part_with_their_value(a: float, b: float) -> None:
    x, y = Fraction(a), Fraction(b)
    assert (a + of(b)).fraction == (of(a) + b).fraction == x + y
    assert (a - of(b)).fraction == (of(a) - b).fraction == x - y
    assert (a * of(b)).fraction == (of(a) * np.float64(b)).fraction == x * y


@given(DYADIC, DYADIC.filter(bool))
@LAW
def test_a_quotient_is_that_of_fractions_to_two_hundred_bits(a: float, b: float) -> None:
    want = Fraction(a) / Fraction(b)
    for got in (of(a) / of(b), a / of(b), of(a) / b):
        assert abs(got.fraction - want) <= abs(want) * LEFT_OVER
        if want.denominator & (want.denominator - 1) == 0:
            assert got.fraction == want


@given(DYADIC.filter(bool))
@LAW
def test_the_root_of_a_square_is_its_size(a: float) -> None:
    assert (of(a) * of(a)).sqrt().fraction == abs(Fraction(a))


@given(DYADIC.filter(lambda v: v > 0))
@LAW
def test_a_root_squares_back_to_two_hundred_bits(a: float) -> None:
    root = of(a).sqrt().fraction
    assert abs(root * root - Fraction(a)) <= Fraction(a) * LEFT_OVER


def test_what_hangs_on_a_rounded_number_near_a_plain_one_is_undecided() -> None:
    third = of(1.0, 8) / of(3.0, 8)
    assert third > 0.25
    assert not third > 0.375
    near = third - of(0.33203125, 8)
    for number in (0, 0.0):
        with pytest.raises(Undecided):
            _ = near > number
    assert (of(1.0, 53) / of(3.0, 53) - of(0.33203125, 53)) > 0  # enough bits decide it
    assert not of(0.0) > 0  # nothing was rounded
    assert not (of(1.5) - of(1.5)) > 0
    assert near > near - of(1.0, 8)  # two of these numbers are compared by their values


def test_zero_has_a_root_and_negative_numbers_have_none() -> None:
    assert of(0.0).sqrt().fraction == 0
    with pytest.raises(ValueError, match="root"):
        of(-2.0).sqrt()
    with pytest.raises(ZeroDivisionError):
        of(1.0) / (of(2.0) - of(2.0))


@given(DYADIC, DYADIC)
@LAW
def test_comparisons_are_those_of_the_values(a: float, b: float) -> None:
    assert (of(a) < of(b), of(a) > b, of(a) == of(b), of(a) == a) == (a < b, a > b, a == b, True)
    assert hash(of(a)) == hash(Fraction(a))
    assert float(of(a)) == a


@given(st.floats(allow_nan=False, allow_infinity=False))
@LAW
def test_every_float_is_taken_in_exactly(value: float) -> None:
    assert of(value).fraction == Fraction(value)
    assert float(of(value)) == value


# ---- the same method files on rational numbers


class Rational(Fraction):
    """A Fraction that takes a float for the number it is, so that a method's scale may meet it."""

    def __new__(cls, value: Any) -> Rational:
        return super().__new__(cls, Fraction(value))


def _operator(name: str) -> Any:
    plain = getattr(Fraction, name)

    def operate(self: Rational, other: Any) -> Any:
        return Rational(plain(self, Fraction(other)))

    return operate


for _name in ("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__"):
    setattr(Rational, _name, _operator(_name))
Rational.__pos__ = lambda self: self  # type: ignore[method-assign]
Rational.__neg__ = lambda self: Rational(-Fraction(self))  # type: ignore[method-assign]
Rational.__abs__ = lambda self: Rational(abs(Fraction(self)))  # type: ignore[method-assign]


def rational(array: Host) -> Host:
    if array.dtype.kind in "iub":
        return array
    out = np.empty(array.shape, dtype=object)
    out.reshape(-1)[:] = [Rational(v) for v in array.reshape(-1).tolist()]
    return out


def _transcends(case: Case) -> bool:
    """Whether a root, a tangent or a power of e is taken."""
    config = case.adapters[0].config if case.adapters else {}
    encodes = case.operation != "splice" and not config.get("inference_mode")
    through_tanh = config.get("prefix_projection") or config.get("encoder_reparameterization_type") == "LSTM"
    return (
        case.method == "adaption_prompt"
        or facts(case.method).irrational
        or case.operation == "aux_loss"
        or bool(config.get("coft"))
        or config.get("act_fn") == "tanh"
        or bool(encodes and (through_tanh or case.method == "cpt"))
    )


WITHOUT_ROOTS = [c for c in corpus() if c.operation in ARRAY_OPERATIONS and not _transcends(c)]


@pytest.mark.parametrize("method", sorted({c.method for c in WITHOUT_ROOTS}))
def test_the_exact_answer_is_the_one_in_rational_numbers(method: str) -> None:
    for case in (c for c in WITHOUT_ROOTS if c.method == method):
        want = right_answer(case, rational)
        got = exact_answer(case, 24)
        assert got.keys() == want.keys()
        for name in want:
            assert got[name].shape == want[name].shape
            for g, w in zip(got[name].reshape(-1), want[name].astype(object).reshape(-1), strict=True):
                # The quotients in a sum, C3A's 1 / n, are cut off before they cancel: a case's numbers are of size one.
                assert abs(g.fraction - Fraction(w)) <= max(1, abs(Fraction(w))) * LEFT_OVER, (case.id, name)


def test_the_exact_answer_of_dora_solves_its_equations() -> None:
    """W' has the rows of V = W + s B A, made as long as m: |W'_i|^2 = m_i^2, and W' is parallel to V. No root is needed to say so."""
    for case in (c for c in corpus("dora") if c.operation == "merge" and len(c.adapters) == 1):
        p = pose(case, rational)
        method, params = p.adapters[0].method, p.adapters[0].params
        V = p.W + method.scale * (params.B @ params.A)  # type: ignore[attr-defined]  # DoRA's
        out = p.layer.fold(exact_answer(case, 24)["weight"])
        for v, w, m in zip(V, out, params.m, strict=True):
            length = sum(e.fraction**2 for e in w)
            assert abs(length - m * m) <= m * m * LEFT_OVER, case.id
            for i in range(len(v)):
                assert abs(v[0] * w[i].fraction - v[i] * w[0].fraction) <= LEFT_OVER * 10**3, case.id


def test_the_exact_answer_of_hra_needs_no_root() -> None:
    """n n^T = u u^T / (u . u): the weight of reflections is rational in u, and so is what is left of u after projections."""
    for case in (c for c in corpus("hra") if c.operation == "merge"):
        p = pose(case, rational)
        W = p.W
        for a in p.adapters:
            done: list[Host] = []
            for u in a.params.u.T:
                for v in done if a.method.apply_GS else ():  # type: ignore[attr-defined]  # HRA's
                    u = u - v * ((v @ u) / (v @ v))
                done.append(u)
                W = W - np.outer(W @ u, u) * (2 / (u @ u))
        got = p.layer.fold(exact_answer(case, 24)["weight"])
        for g, w in zip(got.reshape(-1), W.reshape(-1), strict=True):
            assert abs(g.fraction - w) <= LEFT_OVER * 10**3, case.id


# ---- where nothing may round


@st.composite
def factors(draw: st.DrawFn) -> tuple[Host, Host, Host]:
    m, n, k, j = (draw(st.integers(1, 4)) for _ in range(4))

    def matrix(rows: int, columns: int) -> Host:
        return np.asarray(draw(st.lists(SMALL, min_size=rows * columns, max_size=rows * columns))).reshape(rows, columns)

    return matrix(m, n), matrix(n, k), matrix(k, j)


@given(factors(), st.integers(0, 2**16), st.sampled_from(ORDERS))
@LAW
def test_what_cannot_round_has_the_same_bits_in_every_order(abc: tuple[Host, Host, Host], seed: int, order: str) -> None:
    A, B, C = abc
    for dtype in NARROW:
        p = PRECISION[dtype]
        exact = exact_array(A, p) @ exact_array(B, p) @ exact_array(C, p)
        a = Arithmetic(dtype, np.random.default_rng(seed), order)
        x, y, z = a.array(A), a.array(B), a.array(C)
        for got in (a.matmul(a.matmul(x, y), z), a.matmul(x, a.matmul(y, z))):
            for e, g in zip(as_exact(exact, p).reshape(-1), got.reshape(-1), strict=True):
                assert e.k > 0 or Fraction(float(g)) == e.fraction, (dtype, e, g)


@given(st.lists(st.integers(-255, 255), min_size=2, max_size=12), st.integers(0, 2**16))
@LAW
def test_a_sum_within_its_bits_is_right_in_every_order(numbers: list[int], seed: int) -> None:
    for dtype in NARROW:
        p = PRECISION[dtype]
        exact = sum((of(n, p) for n in numbers), of(0.0, p))
        a = Arithmetic(dtype, np.random.default_rng(seed), "tree")
        got = a.sum(a.array(np.asarray(numbers, dtype=np.float64)))
        if exact.k == 0:
            assert float(got) == float(exact)


def test_the_budget_of_bits_is_not_one_too_large() -> None:
    """2^p + 1 has p + 1 bits and is no number of the format; 2^p - 1 is."""
    for dtype, p in PRECISION.items():
        assert (of(2.0**p - 2, p) + of(1.0, p)).k == 0, dtype
        assert (of(2.0**p, p) + of(1.0, p)).k > 0, dtype
        assert (of(2.0 ** (p - 1) + 1, p) * of(3.0, p)).k > 0, dtype


def test_a_constant_that_no_format_holds_counts_as_rounded() -> None:
    assert (1.5 * of(1.0)).k == 0
    assert ((5 / 3) * of(1.0)).k > 0
    assert (of(1.0) / 3.0).k > 0
    assert (of(1.0) / 4.0).k == 0


def test_what_was_rounded_stays_rounded() -> None:
    third = of(1.0) / of(3.0)
    assert (third * of(3.0)).k > 0
    assert (third - third).k > 0
    assert (third * of(0.0)).k == 0  # nothing times anything is nothing


# ---- from numbers to a tolerance


@pytest.mark.parametrize("dtype", PRECISION)
def test_where_bits_must_match_the_next_number_is_wrong(dtype: str) -> None:
    p = PRECISION[dtype]
    right = {"y": exact_array(np.asarray([1.5, -3.0, 0.25]), p)}
    expected = expect(right, dtype)
    assert expected.exact
    near = {"y": np.asarray([1.5, -3.0 * (1 + 2.0 ** (1 - p)), 0.25])}
    assert compare({"y": np.asarray([1.5, -3.0, 0.25])}, expected).ratio == 0
    worst = compare(near, expected)
    assert (worst.index, worst.ratio) == ((1,), math.inf)


def test_a_format_that_cannot_hold_an_answer_need_not_match_its_bits() -> None:
    large = {"y": exact_array(np.asarray([2.0**16]), 11)}
    tiny = {"y": exact_array(np.asarray([2.0**-26]), 11)}
    assert not expect(large, "float16").exact
    assert not expect(tiny, "float16").exact
    assert expect({"y": exact_array(np.asarray([2.0**16]), 8)}, "bfloat16").exact


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_infinitely_wrong(bad: float) -> None:
    expected = expect({"y": exact_array(np.asarray([1.0, 3.0]), 8) / 3.0}, "bfloat16")
    assert compare({"y": np.asarray([1 / 3, bad])}, expected).ratio == math.inf


def test_the_worst_element_is_named() -> None:
    expected = expect({"a": exact_array(np.ones((2, 2)), 24), "b": exact_array(np.ones((2, 3)), 24) / 3.0}, "float32")
    got = {"a": np.ones((2, 2)), "b": np.full((2, 3), 1 / 3)}
    got["b"][1, 2] += 1e-3
    worst = compare(got, expected)
    assert (worst.name, worst.index, worst.got) == ("b", (1, 2), got["b"][1, 2])


def test_every_tolerance_of_the_corpus_leaves_digits_in_float32() -> None:
    cases: list[Case] = [c for c in corpus() if c.operation in ARRAY_OPERATIONS]
    for case in cases:
        right = exact_answer(case, PRECISION["float32"])
        expected = expect(right, "float32")
        for name, tolerance in expected.tolerance.items():
            assert np.all(np.isfinite(tolerance)), case.id
            assert np.all(tolerance <= 1e-2 * (1 + np.max(np.abs(expected.values[name]), initial=0.0))), case.id


def test_the_formats_are_those_of_the_libraries() -> None:
    for dtype, made in DTYPES.items():
        u = 2.0 ** -PRECISION[dtype]
        one = np.asarray(1.0).astype(made)
        assert float((np.asarray(1.0 + 2 * u)).astype(made) - one) == 2 * u
        assert float(np.asarray(1.0 + u).astype(made)) == 1.0  # half way goes to even
