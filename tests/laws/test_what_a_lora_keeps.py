"""What a change becomes as a LoRA: of which rank, what of it is rounding, and what happens to the bias."""

from __future__ import annotations

from importlib import import_module
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from peft_ref.layers import Linear
from peft_ref.methods import IA3, OFT, DoRA, LoHa, LoKr, LoRA, MiSS
from peft_ref.methods.to_lora import Converted, to_lora
from tests.laws.compare import assert_same_bits

LAYER = Linear(in_features=60, out_features=48)
BIASED = Linear(in_features=60, out_features=48, bias=True)


def numbers(method: Any, layer: Linear, dtype: Any = np.float64) -> tuple[Any, Any]:
    """Random parameters, and a weight."""
    rng = np.random.default_rng(0)
    W = rng.normal(size=layer.shape).astype(dtype)
    p = method.init(layer, W, rng).params
    return type(p)(*(None if v is None else rng.normal(size=v.shape).astype(dtype) for v in p)), W


# ---- the rank


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("method", [LoHa(r=2), LoHa(r=3), LoKr(r=2, decompose_factor=4), LoKr(r=1, decompose_factor=6)], ids=str)
def test_with_nothing_asked_the_rank_is_that_of_the_delta(method: Any, dtype: Any) -> None:
    """A product entry by entry of ranks p and q has rank p q, and so has a Kronecker product; the rest is rounding, of any dtype."""
    rank = method.r**2 if isinstance(method, LoHa) else method.decompose_factor * method.r
    p, W = numbers(method, LAYER, dtype)
    got = to_lora(method, LAYER, p, W)
    assert got.method == LoRA(r=rank, lora_alpha=rank)
    assert got.params.A.dtype == got.params.B.dtype == dtype


@pytest.mark.parametrize("exponent", [-200, -60, 60, 200])
@pytest.mark.parametrize("asked", [{}, {"rank": 2}, {"energy": 0.8}], ids=str)
@pytest.mark.parametrize("method", [LoHa(r=2), LoRA(r=4)], ids=str)
def test_a_power_of_two_in_the_delta_is_one_in_b_and_changes_nothing_else(method: Any, asked: dict[str, Any], exponent: int) -> None:
    p, W = numbers(method, LAYER)
    scaled = p._replace(B=p.B * 2.0**exponent) if isinstance(method, LoRA) else p._replace(w1_a=p.w1_a * 2.0**exponent)
    got, want = (to_lora(method, LAYER, given, W, **asked) for given in (scaled, p))
    assert got.method == want.method
    assert got.lost == pytest.approx(want.lost, rel=1e-9, abs=1e-25)
    np.testing.assert_allclose(got.params.B @ got.params.A, 2.0**exponent * (want.params.B @ want.params.A), rtol=1e-9)


@pytest.mark.parametrize("method", [LoHa(r=2), LoKr(r=2), MiSS(r=2)], ids=str)
@pytest.mark.parametrize("asked", [{}, {"rank": 3}, {"energy": 0.5}, {"energy": 1.0}], ids=str)
def test_a_fresh_adapter_becomes_zeros_of_the_least_rank(method: Any, asked: dict[str, Any]) -> None:
    W = np.ones(LAYER.shape)
    got = to_lora(method, LAYER, method.init(LAYER, W, np.random.default_rng(0)).params, W, **asked)
    assert (got.method.r, got.lost) == (1, 0.0)
    assert not np.any(got.params.B)


@pytest.mark.parametrize("exponent", [-60, 0, 60])
def test_what_rounding_makes_of_a_weight_is_no_change_of_it(exponent: int) -> None:
    """A fresh DoRA divides the weight by its lengths and multiplies it by them: off by a rounding of each entry, whatever its size."""
    W = np.random.default_rng(0).normal(size=LAYER.shape) * 2.0**exponent
    got = to_lora(DoRA(r=2), LAYER, DoRA(r=2).init(LAYER, W, np.random.default_rng(0)).params, W)
    assert (got.method.r, got.lost) == (1, 0.0)
    assert np.max(np.abs(got.params.B @ got.params.A)) < 1e-13 * np.max(np.abs(W))
    p = DoRA(r=2).init(LAYER, W, np.random.default_rng(0)).params
    shrunk = to_lora(DoRA(r=2), LAYER, p._replace(m=p.m * 0.5), W)
    assert shrunk.method.r == min(LAYER.shape)  # half the weight


@pytest.mark.parametrize("rank", [None, 3, 4])
def test_factors_that_are_few_enough_are_taken_as_they_are(rank: int | None) -> None:
    method = LoRA(r=3, lora_alpha=6, lora_bias=True)
    p, W = numbers(method, BIASED)
    got = to_lora(method, BIASED, p, W, rank=rank)
    assert_same_bits(got.params.A, p.A, "A")
    assert_same_bits(got.params.B, 2.0 * p.B, "B")


def test_all_the_energy_is_all_of_the_delta() -> None:
    for method in (LoHa(r=2), LoRA(r=4)):
        p, W = numbers(method, LAYER)
        got = to_lora(method, LAYER, p, W, energy=1.0)
        assert got.method.r == 4
        assert got.lost < 1e-25


# ---- the bias


def assert_bias(got: Converted, c: Any) -> None:
    assert got.method.lora_bias is (c is not None)
    if c is None:
        assert got.params.c is None
    else:
        np.testing.assert_allclose(got.params.c, c, rtol=1e-12)


@pytest.mark.parametrize("asked", [{}, {"rank": 1}, {"energy": 0.5}], ids=str)
def test_a_change_of_the_bias_is_kept_whatever_becomes_of_the_weight(asked: dict[str, Any]) -> None:
    method = LoRA(r=3, lora_alpha=6, lora_bias=True)
    p, W = numbers(method, BIASED)
    assert_bias(to_lora(method, BIASED, p, W, np.ones(48), **asked), 2.0 * p.c)


def test_a_bias_that_is_changed_is_changed_by_the_lora_and_no_other_is() -> None:
    b = np.linspace(1, 2, 48)
    for method, factors in ((IA3(), None), (IA3(is_feedforward=True), 1.0), (OFT(oft_block_size=5), 1.0)):
        p, W = numbers(method, BIASED)
        assert_bias(to_lora(method, BIASED, p, W, b), p.l * b - b if factors is None else None)
        assert_bias(to_lora(method, LAYER, p, W), None)


# ---- what it takes of a library


@pytest.mark.parametrize("method", [LoHa(r=2), LoRA(r=4)], ids=str)
def test_it_takes_of_the_standards_extensions_those_that_it_says_it_needs(method: Any) -> None:
    strict = pytest.importorskip("array_api_strict")
    p, _ = numbers(method, LAYER)
    p = type(p)(*(None if v is None else strict.asarray(v) for v in p))
    needs, known = import_module("peft_ref.methods.to_lora").NEEDS, ("linalg", "fft")
    for there in (some for n in range(3) for some in combinations(known, n)):
        with strict.ArrayAPIStrictFlags(enabled_extensions=there):
            if needs <= {*there}:
                assert to_lora(method, LAYER, p, rank=2).method.r == 2
            else:
                with pytest.raises(AttributeError, match="linalg"):
                    to_lora(method, LAYER, p, rank=2)


@pytest.mark.parametrize("method", [LoHa(r=2), LoRA(r=4), DoRA(r=2)], ids=str)
def test_it_stays_on_the_device_of_the_parameters(method: Any) -> None:
    strict = pytest.importorskip("array_api_strict")
    device = strict.Device("device1")
    p, W = numbers(method, LAYER)
    far = type(p)(*(None if v is None else strict.asarray(v, device=device) for v in p))
    got = to_lora(method, LAYER, far, strict.asarray(W, device=device), rank=3)
    assert (got.params.A.device, got.params.B.device) == (device, device)
