"""The last value of a hyper-parameter that is taken, and the first beyond it, where neither is said by one of `test_ranges`' words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_ref.errors import ConfigError
from peft_ref.layers import Linear
from peft_ref.methods import BOFT, OSF, AdaMSS, PEANuT, SuperTuning, WaveFT
from tests.laws.compare import assert_same_bits

FAMILIES = {"db": (1, 38), "sym": (2, 20), "coif": (1, 17)}
ENDS: list[tuple[Any, str, str, int, int]] = [
    (PEANuT, "depth", "", 0, 8),
    (AdaMSS, "num_subspaces", "", 1, 16),
    *((WaveFT, "wavelet_family", family, first, last) for family, (first, last) in FAMILIES.items()),
]


@pytest.mark.parametrize(("cls", "field", "word", "first", "last"), ENDS)
def test_the_ends_are_taken_and_what_is_beyond_them_is_refused(cls: Any, field: str, word: str, first: int, last: int) -> None:
    options = {"use_idwt": False} if cls is WaveFT else {}
    at: Any = (lambda n: f"{word}{n}") if word else (lambda n: n)
    for value in (at(first - 1), at(last + 1)):
        with pytest.raises(ConfigError, match=rf"{field}='?{value}\b"):
            cls(**options, **{field: value})
    for value in (at(first), at(last)):
        assert getattr(cls(**options, **{field: value}), field) == value


def test_boft_has_one_to_sixty_three_factors() -> None:
    for count in (1, 2, 62, 63):
        assert BOFT(boft_n_butterfly_factor=count).boft_n_butterfly_factor == count
    for count in (0, 64):
        with pytest.raises(ConfigError, match=rf"^boft_n_butterfly_factor={count}:"):
            BOFT(boft_n_butterfly_factor=count)


@pytest.mark.parametrize("value", [True, False, "2", [2]])
def test_the_rank_that_osf_keeps_is_a_number_and_no_boolean(value: Any) -> None:
    with pytest.raises(ConfigError, match="expected int, float or null"):
        OSF(effective_rank=value)


@pytest.mark.parametrize("r", [None, 2])
def test_the_two_parts_of_super_tuning_add_up_and_the_places_are_those_of_the_weight(r: int | None) -> None:
    """The sparse part has no factors, and the low-rank one no numbers at the places; a start of nothing but zeros has parts too."""
    layer, method, rng = Linear(in_features=5, out_features=4), SuperTuning(sparsity=0.5, r=r), np.random.default_rng(0)
    W = rng.normal(size=(4, 5))
    p = method.init(layer, W, rng).params
    common = method.common({"q": layer}, {"q": W}, rng)["q"]
    assert_same_bits(common.indices, p.indices, "the places")
    assert (common.v, common.A, common.B) == (None, None, None)
    for at in (p, p._replace(v=rng.normal(size=10), B=None if r is None else rng.normal(size=(4, 2)))):
        kept, dropped = method.apart(at)
        assert (kept.A, kept.B) == (None, None)
        assert_same_bits(dropped.v, np.zeros(10), "the numbers at the places")
        whole = method.together(kept, dropped)
        assert all(a is b for a, b in zip(whole, at, strict=True))
        both = method.delta(layer, kept).W + method.delta(layer, dropped).W
        assert_same_bits(both, method.delta(layer, at).W, "the two deltas")


@pytest.mark.parametrize("top", [True, False])
def test_of_entries_that_are_equally_large_the_first_are_tuned(top: bool) -> None:
    """A thousand entries of three sizes, so that an order which is not that of the weight shows."""
    layer, method = Linear(in_features=40, out_features=25), SuperTuning(sparsity=0.5, select_top=top)
    W = np.random.default_rng(0).integers(-1, 2, (25, 40)).astype(float)
    sizes = {size: np.flatnonzero(abs(W).ravel() == size) for size in (1, 0)}
    expected = np.concat([sizes[1], sizes[0]] if top else [sizes[0], sizes[1]])[:500]
    assert_same_bits(method.init(layer, W, np.random.default_rng(1)).params.indices, expected.astype(np.int32), "the places")
