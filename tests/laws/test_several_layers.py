"""What a method says of all layers of a model at once: what it sums over them, deals out to them, or makes as wide as the widest."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.methods import AdaLoRA, FRoD, KaSA, PVeRA, RandLoRA, UniLoRA, VeRA, WaveFT
from peft_ref.methods.adalora_allocator import State, after_step, budget, last_allocation
from peft_ref.methods.unilora import dealt
from tests.laws.compare import assert_close, assert_same_bits

SIZES = {"a.q": (3, 5), "b.q": (4, 2), "c.q": (6, 3)}
LAYERS: dict[str, Layer] = {name: Linear(in_features=n_in, out_features=out) for name, (out, n_in) in SIZES.items()}
WEIGHTS = {name: np.random.default_rng(i).normal(size=size) for i, (name, size) in enumerate(SIZES.items())}


def test_kasas_penalty_is_the_sum_over_all_modules() -> None:
    method = KaSA(r=1, kasa_config={"beta": 0.5, "gamma": 0.25})  # type: ignore[arg-type]  # as a file has it
    params = {name: method.init(LAYERS[name], W, np.random.default_rng(1)).params for name, W in WEIGHTS.items()}
    whole, each = method.penalty(params), [method.penalty({name: p}) for name, p in params.items()]
    assert float(whole) == pytest.approx(math.fsum(map(float, each)), rel=1e-14)


def test_a_submap_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"^kasa_config=3: a map is needed"):
        KaSA(kasa_config=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [12, 13, 17, 5, 0])
def test_unilora_deals_its_numbers_out_as_evenly_as_can_be(count: int) -> None:
    for seed in range(5):
        used = np.bincount(dealt(count, 6, seed), minlength=6)
        assert used.sum() == count
        assert set(used) <= {count // 6, -(-count // 6)}


@pytest.mark.parametrize("length", [7, 40, 60])
def test_unilora_maps_its_numbers_onto_all_factors_without_changing_their_length(length: int) -> None:
    """Of 46 places some numbers get none, some one, some several."""
    method = UniLoRA(r=2, theta_d_length=length)
    common = method.common(LAYERS, WEIGHTS, np.random.default_rng(0))
    where = np.concat([np.ravel(i) for p in common.values() for i in (p.indices_A, p.indices_B)])
    scale = np.concat([np.ravel(s) for p in common.values() for s in (p.scales_A, p.scales_B)])
    assert where.shape == (2 * sum(sum(size) for size in SIZES.values()),)
    squares = np.bincount(where, weights=scale**2, minlength=length)
    assert_close(squares, (np.bincount(where, minlength=length) > 0).astype(float), "the length of a number's images", rounding=1e-6)
    assert_same_bits(scale, scale.astype(np.float32).astype(float), "scales, which PEFT counts in float32")
    assert sorted(where) == sorted(dealt(len(where), length, method.proj_seed))
    for p in common.values():
        assert p.theta is common["a.q"].theta


def test_frod_refuses_a_category_of_two_widths_by_its_modules() -> None:
    layers, weights = ({f"{i}.q": table[f"{word}.q"] for i, word in enumerate("ab")} for table in (LAYERS, WEIGHTS))
    with pytest.raises(ConfigError, match=r"'0.q' .. '1.q' share one V"):
        FRoD().common(layers, weights, np.random.default_rng(0))


SHARED = [
    pytest.param(VeRA(r=2), {"vera_A": (2, 5), "vera_B": (6, 2)}, id="vera"),
    pytest.param(PVeRA(r=2), {"pvera_A": (4, 5), "pvera_B": (6, 2)}, id="pvera"),
    pytest.param(RandLoRA(r=2), {"randlora_A": (2, 1, 5), "randlora_B": (6, 3, 2)}, id="randlora"),
]


@pytest.mark.parametrize(("method", "shared"), SHARED)
def test_shared_matrices_are_as_wide_as_the_widest_layer_and_tell_so(method: Any, shared: dict[str, tuple[int, ...]]) -> None:
    wide = method.spanning(LAYERS)
    assert (wide.widest_in, wide.widest_out) == (5, 6)
    assert {s.key: s.stored_shape for s in wide.spec(LAYERS["b.q"]) if s.shared} == shared
    for others in ({}, {"other": (1, 9)}):
        assert method.spanned_by({**shared, **others}) == wide
    assert all(method.spanned_by({word: shape}) == method for word, shape in shared.items())
    for beyond in (Linear(in_features=6, out_features=6), Linear(in_features=5, out_features=7)):
        said = rf"^{type(method).__name__}: the layer has {beyond.in_features} inputs and {beyond.out_features} outputs, .* for 5 and 6\."
        with pytest.raises(UnsupportedLayerError, match=said):
            wide.check_layer(beyond)


@pytest.mark.parametrize(("method", "shared"), SHARED)
def test_matrices_with_another_number_of_axes_tell_no_width(method: Any, shared: dict[str, tuple[int, ...]]) -> None:
    """They are refused later, by their names."""
    for word in shared:
        for n in {0, 1, 2, 3, 4} - {len(shared[word])}:
            assert method.spanned_by({**shared, word: (2, 1, 5, 6)[:n]}) is method


@pytest.mark.parametrize(("method", "shared"), SHARED)
def test_where_no_layer_is_known_every_width_is_taken(method: Any, shared: dict[str, tuple[int, ...]]) -> None:
    method.spanning({}).check_layer(Linear(in_features=2, out_features=2))


def test_waveft_shares_its_coefficients_out_by_entries_and_gives_every_layer_one() -> None:
    method = WaveFT(n_frequency=2, proportional_parameters=True).spanning({**LAYERS, "large": Linear(in_features=40, out_features=40)})
    entries = sum(out * n_in for out, n_in in SIZES.values()) + 1600
    assert {name: method.count(layer) for name, layer in LAYERS.items()} == dict.fromkeys(SIZES, 1)
    large = Linear(in_features=40, out_features=40)
    assert method.count(large) == method.spec(large)[0].shape[0] == round(8 * 1600 / entries)


def test_adaloras_last_allocation_takes_place_though_one_was_before_it() -> None:
    """From 12 triplets to 4, in two steps: 8 / 2^3 above the target is one too many after the first."""
    method = AdaLoRA(init_r=3, target_r=1, total_step=2, deltaT=1)
    rng = np.random.default_rng(0)
    params = {name: method.init(LAYERS["a.q"], WEIGHTS["a.q"], rng).params for name in "abcd"}
    params = {name: p._replace(E=rng.normal(size=(3, 1)), B=rng.normal(size=(3, 3))) for name, p in params.items()}
    state, kept = State(), []
    for step in range(5):
        state, params = after_step(method, state, params, params, step)
        kept.append(None if state.kept is None else sum(int(k.sum()) for k in state.kept.values()))
    assert kept == [None, 5, 4, 4, 4]
    assert last_allocation(method) == 2
    assert [budget(method, params, step) for step in (-5, 0, 1, 2, 3, 9)] == [12, 12, 5, 4, 4, 4]
