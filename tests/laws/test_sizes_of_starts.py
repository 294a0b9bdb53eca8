"""How large the numbers of a fresh adapter are, where the page says a size: the mean of many squares, and the largest of all."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from peft_ref.errors import ConfigError
from peft_ref.layers import Conv, Linear
from peft_ref.methods import METHODS, AdaMSS, BDLoRA, LoRA, MonteCLoRA, QALoRA, VeLoRA, lora_parameter
from peft_ref.methods.lora_parameter import Stack
from tests.laws.compare import assert_close
from tests.methods import made

RNG = np.random.default_rng


def of(method: Any, layer: Any, seed: int = 0) -> Any:
    return method.init(layer, np.zeros(layer.shape), RNG(seed)).params


def mean_square(x: Any) -> float:
    return float(np.mean(x * x))


def test_an_orthogonal_start_is_half_of_standard_normal_numbers_over_a_hundred() -> None:
    """Q's rows are of length 1: n r numbers of B or A have the sum of squares of n r / 2 normal ones by 100. Of 40,000: five deviations."""
    method, n = LoRA(r=4, init_lora_weights="orthogonal"), 20_000
    A, B = of(method, Linear(in_features=n, out_features=1)).A, of(method, Linear(in_features=1, out_features=n)).B
    for factor in (A, B):
        assert mean_square(factor) == pytest.approx(1 / 200, rel=5 * math.sqrt(2 / (2 * n)))


def assert_uniform(x: Any, bound: float) -> None:
    """Of some thousand numbers: within the bound, up to it at both ends, and a third of its square in the mean."""
    x = np.asarray(x)
    assert np.max(np.abs(x)) <= bound
    assert np.min(x) < -0.99 * bound
    assert np.max(x) > 0.99 * bound
    assert mean_square(x) == pytest.approx(bound**2 / 3, rel=5 * math.sqrt(0.8 / x.size))


def test_a_bias_of_lora_is_that_of_a_layer_of_as_many_inputs_as_a_group_has_ranks() -> None:
    layer = Conv(in_channels=4, out_channels=4000, kernel_size=(1,), groups=4)
    for word, bound in ((False, 1 / math.sqrt(2)), (True, 0.0)):
        c = of(LoRA(r=8, lora_bias=True, init_lora_weights=word), layer).c
        assert not c.any() if word else c.any()
        if not word:
            assert_uniform(c, bound)


@pytest.mark.parametrize("cls", [BDLoRA, MonteCLoRA, QALoRA, VeLoRA])
def test_a_bias_of_loras_relatives_is_that_of_a_layer_of_as_many_inputs_as_there_are_ranks(cls: Any) -> None:
    layer = Linear(in_features=32, out_features=4000)
    assert_uniform(of(cls(r=4, lora_bias=True, init_lora_weights=False), layer).c, 1 / 2)
    assert not of(cls(r=4, lora_bias=True), layer).c.any()


STACK = Stack(in_features=20, out_features=30, experts=40)


def test_the_factors_of_a_stack_start_as_those_of_one_layer_with_all_the_ranks() -> None:
    W = RNG(1).normal(size=STACK.shape)
    start = lora_parameter.init(LoRA(r=5, init_lora_weights=False), STACK, W, RNG(0))
    assert start.W is W
    A, B, _ = start.params
    assert_uniform(A, 1 / math.sqrt(20))
    assert_uniform(B, 1 / math.sqrt(200))
    A, B, _ = lora_parameter.init(LoRA(r=5, init_lora_weights="gaussian"), STACK, W, RNG(0)).params
    assert abs(np.mean(A)) < 5 / 5 / math.sqrt(A.size)
    assert mean_square(A) == pytest.approx(1 / 25, rel=5 * math.sqrt(2 / A.size))
    assert not B.any()


def test_velora_keeps_a_direction_of_length_one_or_none_before_it_has_seen_inputs() -> None:
    layer = Linear(in_features=12, out_features=3)
    v = of(VeLoRA(r=2, velora_config={"num_groups": 2, "init_type": "random"}), layer).v  # type: ignore[arg-type]
    assert float(v @ v) == pytest.approx(1, rel=1e-14)
    assert len({*np.round(v, 9)}) == v.size == 6
    for word in ("batch_average", "batch_average_once"):
        assert not of(VeLoRA(r=2, velora_config={"num_groups": 2, "init_type": word}), layer).v.any()  # type: ignore[arg-type]


def test_adamss_starts_upright_and_nearly_at_zero_where_it_does_not_start_there() -> None:
    """The sums of N's rows and of A's are not negative: what an SVD's signs are is the library's own affair. B is of deviation 1/100."""
    rng, layer = RNG(1), Linear(in_features=9, out_features=64)
    method = AdaMSS(r=64, num_subspaces=8, subspace_rank=4, init_weights=None)
    for seed in range(4):
        W = rng.normal(size=layer.shape)
        p = method.init(layer, W, RNG(seed)).params
        A, B = ([value for field, value in p._asdict().items() if field[0] == end and value is not None] for end in "AB")
        for rows in (p.N, *A):
            assert np.all(np.sum(rows, axis=1) >= -1e-12)
            assert_close(rows @ rows.T, np.eye(len(rows)), "rows of length 1, at right angles")
        every = np.concatenate([b.ravel() for b in B])
        assert mean_square(every) == pytest.approx(1e-4, rel=5 * math.sqrt(2 / every.size))
        assert [b.shape for b in B] == [(8, 4)] * 8


CUT = [name for name, cls in METHODS.weights.items() if {"init_lora_weights", "r"} <= {f.name for f in fields(cls)}]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in CUT if name not in ("kasa", "qalora")])  # one cuts W itself, one averages x
def test_pissa_takes_the_best_part_out_of_the_weight_whatever_the_method_and_its_scale(name: str) -> None:
    """Eckart and Young: the singular values that are left are those after the first r. The adapter puts the part back."""
    method: Any = made(name, r=2, lora_alpha=6, init_lora_weights="pissa")
    layer = Linear(in_features=6, out_features=4)
    W = RNG(0).normal(size=layer.shape)
    start = method.init(layer, W, RNG(1))
    values = np.linalg.svd(W, compute_uv=False)
    assert_close(np.linalg.svd(start.W, compute_uv=False), np.concatenate([values[2:], np.zeros(2)]), "what is left", rounding=1e-10)
    back, _ = method.weight(layer, start.params, start.W, None, start.W)
    assert_close(back, W, "W'", rounding=1e-10)


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("word", ["corda", "eva", "loftq", "lora_ga"])
def test_a_start_from_data_is_made_by_a_function_of_its_own(name: str, word: str) -> None:
    layer, method = Linear(in_features=6, out_features=4), made(name, r=2, init_lora_weights=word)
    with pytest.raises(ConfigError, match=rf"'{word}' is made of data(?s:.*)methods\.{word}_init"):
        method.init(layer, np.ones(layer.shape), RNG(0))


@pytest.mark.parametrize("name", [name for name, cls in METHODS.weights.items() if "use_rslora" in {f.name for f in fields(cls)}])  # type: ignore[arg-type]
def test_the_scale_is_alpha_over_the_rank_or_over_its_root(name: str) -> None:
    for word, over in ((False, 9), (True, 3)):
        assert made(name, r=9, lora_alpha=6, use_rslora=word).scale == pytest.approx(6 / over)  # type: ignore[attr-defined]


def test_qaloras_b_and_frozen_weight_are_those_of_loras_start() -> None:
    """Of W = U S V^T, s the scale: B = U_r (S_r / s)^1/2, and W keeps what is not of the first r. A, of fewer inputs, is drawn anew."""
    method, layer = QALoRA(r=2, lora_alpha=6, init_lora_weights="pissa", qalora_group_size=3), Linear(in_features=6, out_features=4)
    W = RNG(0).normal(size=layer.shape)
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    start = method.init(layer, W, RNG(1))
    assert_close(start.W, (U[:, 2:] * S[2:]) @ Vh[2:], "what is left", rounding=1e-10)
    assert_close(start.params.B @ start.params.B.T, (U[:, :2] * S[:2]) @ U[:, :2].T / method.scale, "B B^T", rounding=1e-10)
    assert start.params.A.shape == (2, 2)


def test_glora_starts_its_constants_normal_its_products_uniform_and_what_is_none_at_zero() -> None:
    """Of 2000 adapters; four constants each, of deviation 1/50."""
    layer, W = Linear(in_features=4, out_features=3, bias=True), np.zeros((3, 4))
    constant = made("glora", config_A_B="constant", config_C="none", config_D_E="constant", init_weights=False)
    every = [constant.init(layer, W, RNG(seed)).params for seed in range(2000)]
    for field in "ABDE":
        drawn = np.asarray([getattr(p, field) for p in every])
        assert drawn.size == len(every)
        assert abs(np.mean(drawn)) < 5 / 50 / math.sqrt(drawn.size)
        assert mean_square(drawn) == pytest.approx(1 / 2500, rel=5 * math.sqrt(2 / drawn.size))
        assert getattr(every[0], field).shape == ((1, 1) if field in "AB" else (1,))
    assert not any(np.any(p.C) for p in every)
    nothing = made("glora", config_A_B="none", config_C="none", config_D_E="none", init_weights=False)
    p = nothing.init(layer, W, RNG(0)).params
    assert [getattr(p, field).shape for field in "ABCDE"] == [(3, 4), (3, 4), (4, 1), (3,), (3,)]
    assert not any(np.any(value) for value in p if value is not None)
