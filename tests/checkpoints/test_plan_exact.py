"""The arithmetic of exact mode: fused products rounded once, the chain that torch sums, and the bound that says where neither is needed."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ref.checkpoints.arithmetic import Ending
from peft_ref.checkpoints.exact import Chain, Doubled, fused, looked_up, product
from peft_ref.checkpoints.lowrank import LowRankRows, Product
from peft_ref.files.safetensors import dtypes

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)
BF16, F16, F32 = (dtypes()[name] for name in ("BF16", "F16", "F32"))


def rounded(x: Fraction) -> np.float32:
    """The float32 nearest to x, of two the one with an even last bit; by integers alone."""
    if x == 0:
        return np.float32(0)
    exponent = max(math.floor(math.log2(abs(x))) - 25, -149)
    while abs(x) / Fraction(2) ** exponent >= 2**24 and exponent < 200:
        exponent += 1
    while abs(x) / Fraction(2) ** exponent < 2**23 and exponent > -149:
        exponent -= 1
    return np.float32(math.ldexp(round(x / Fraction(2) ** exponent), exponent))


@settings(max_examples=400, deadline=None)
@given(FLOATS, FLOATS, FLOATS)
def test_a_fused_multiply_add_rounds_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if abs(exact) < 2.0**120:
        assert fused(*(np.float32([x]) for x in (a, b, c)))[0] == rounded(exact)


@settings(max_examples=200, deadline=None)
@given(st.integers(2**23, 2**24 - 1), st.booleans(), st.booleans(), st.integers(-20, 20))
def test_a_fused_multiply_add_rounds_once_beside_a_tie(top: int, above: bool, negative: bool, power: int) -> None:
    """a b is half a last place of c but for 2^-46 of itself, which float64 cannot hold beside c: rounding twice would go to even."""
    half = math.ldexp(1.0, power - 1)
    a, b = (1 + 2.0**-23) * half, 1 - 2.0**-23
    c = math.ldexp(top, power)
    a, c = (-a if above else a), (-c if negative else c)
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    assert Fraction(float(np.float64(a) * np.float64(b) + np.float64(c))) != exact
    assert fused(*(np.float32([x]) for x in (a, b, c)))[0] == rounded(exact)


@pytest.mark.parametrize("r", [1, 2, 3, 16, 192, 193, 384, 385, 500])
@pytest.mark.parametrize("shape", [(16, 12), (64, 33), (300, 77)])
def test_torch_sums_a_product_as_the_chain(r: int, shape: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(r)
    B, A = (rng.normal(size=size).astype(np.float32) for size in ((shape[0], r), (r, shape[1])))
    B[:3], A[:, :3] = -1, 0  # sums of -0: they begin at +0
    theirs: Any = (torch.from_numpy(B) @ torch.from_numpy(A)).numpy()
    assert (product(B, A).view(np.uint32) == theirs.view(np.uint32)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([BF16, F16, F32]), st.booleans(), st.sampled_from([1.0, 0.37, -1.3]), st.integers(-3, 3))
def test_however_a_product_was_summed_the_same_bits_come_of_it(seed: int, dtype: Any, first: bool, scale: float, doublings: int) -> None:
    """Sums of three other orders in the place of the BLAS's: backwards, in float64, in pairs; and the worst there may be, on both sides.

    Those of a scale of 2^n come doubled."""
    rng = np.random.default_rng(seed)
    r = int(rng.integers(1, 40))
    B, A = (rng.normal(size=size).astype(np.float32) * rng.choice([1e-3, 0.1, 1]) for size in ((9, r), (r, 13)))
    A *= np.geomspace(1, 30, 13, dtype=np.float32)  # columns of different lengths
    W = (rng.normal(size=(9, 13)) * 0.1).astype(dtype)
    ending = Ending((2.0**doublings,) if doublings else (scale,), () if doublings else (3.3,), dtype if first else None)
    doubled = Doubled(doublings, ending._replace(times=()) if doublings else ending)
    expected = W.copy()
    ending.onto(expected, product(B, A))
    terms = B[:, :, None] * A[None]
    sums = [terms[:, ::-1].cumsum(axis=1)[:, -1], (B.astype(np.float64) @ A).astype(np.float32), np.sum(terms, axis=1)]
    g = (r + 4) * 2.0**-24
    worst = 1.99 * g * np.linalg.norm(B, axis=1)[:, None] * np.linalg.norm(A, axis=0)
    for anyhow in (*sums, product(B, A) - worst, product(B, A) + worst):
        tile = W.copy()
        chain = Chain(B, A, ending)
        left = chain.onto(tile, np.ldexp(anyhow.astype(np.float32), doublings), slice(0, 9), slice(0, 13), doubled)
        chain.settle(tile, 0, [] if left is None else [left])
        assert (tile.view(np.uint8) == expected.view(np.uint8)).all()


def test_the_chain_is_asked_for_few_numbers_of_a_16_bit_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else exact mode would be right and useless."""
    import peft_ref.checkpoints.exact as exact

    looked_up = []
    one_by_one = exact.looked_up
    monkeypatch.setattr(exact, "looked_up", lambda B, A: looked_up.append(B.shape[1]) or one_by_one(B, A))
    rng = np.random.default_rng(0)
    W = (rng.normal(size=(256, 512)) * 0.02).astype(BF16)
    B, A = (rng.normal(size=size).astype(np.float32) * 0.02 for size in ((256, 16), (16, 512)))
    LowRankRows([Product(B, A, (2.0,))], first=None, exact=True)(W, 0)
    assert 0 < sum(looked_up) < 0.01 * W.size


def test_a_product_of_no_rank_adds_zeros() -> None:
    nothing = Product(np.zeros((1, 0), np.float32), np.zeros((0, 3), np.float32), (2.0,))
    W = np.array([[0.0, -0.0, 3.0]], BF16)
    assert LowRankRows([nothing], first=None, exact=True)(W, 0).tolist() == [[0.0, 0.0, 3.0]]


@pytest.mark.parametrize("r", [1, 2, 16, 193, 385])
def test_numbers_looked_up_are_those_of_the_whole_product(r: int) -> None:
    rng = np.random.default_rng(r)
    B, A = (rng.normal(size=size).astype(np.float32) for size in ((r, 40), (r, 40)))
    whole = product(B.T, A)
    assert (looked_up(B, A).view(np.uint32) == whole.diagonal().view(np.uint32)).all()


def test_a_number_looked_up_beside_a_tie_is_rounded_once() -> None:
    """c + a b as above: a b is half a last place of c but for 2^-46 of itself; c is even, so rounding twice would leave it."""
    a, b, c = np.float32([(1 + 2.0**-23) / 2]), np.float32([1 - 2.0**-23]), np.float32([2**23 + 1])
    exact = Fraction(float(a[0])) * Fraction(float(b[0])) + Fraction(float(c[0]))
    assert looked_up(np.stack([c, a]), np.stack([np.float32([1]), b]))[0] == rounded(exact)
    assert (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)[0] != rounded(exact)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_rows_may_be_cut_anywhere(seed: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    products = [Product(*(rng.normal(size=size).astype(np.float32) for size in ((11, 5), (5, 7))), (0.3,)) for _ in range(3)]
    W = rng.normal(size=(33, 7)).astype(np.float32)
    rows = LowRankRows(products, first=None, exact=True)
    whole = rows(W.copy(), 0)
    parts = [rows(W[at : at + block].copy(), at) for at in range(0, 33, block)]
    assert (np.concatenate(parts) == whole).all()
    assert np.allclose(whole, W + np.concatenate([0.3 * (p.left @ p.right) for p in products]), atol=1e-5)


def test_several_threads_may_change_rows_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    rng = np.random.default_rng(0)
    B, A = (rng.normal(size=size).astype(np.float32) for size in ((600, 9), (9, 700)))
    W = rng.normal(size=(600, 700)).astype(BF16)
    rows = LowRankRows([Product(B, A, (0.3,))], first=BF16, exact=True)
    expected = rows(W.copy(), 0)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda at: rows(W[at : at + 20].copy(), at), range(0, 600, 20)))
    assert (np.concatenate(parts).view(np.uint16) == expected.view(np.uint16)).all()
