"""The table of wavelets: every filter, over sqrt(2), is orthonormal to its own even shifts and has the moments that its name promises."""

from __future__ import annotations

import numpy as np
import pytest

from peft_ref.methods import wavelets

VANISHING = {f"{family}{n}": n for family, first in (("db", 1), ("sym", 2)) for n in range(first, 11)} | {
    f"coif{n}": 2 * n for n in range(1, 5)
}
NO_WAVELET = {"coif4": 0.0485}  # whose numbers, as PEFT has them, sum to so much more than 2
PRINTED = 1e-11  # the table was printed with so many places; the worst is db3's


def test_the_table_has_the_families_of_ten_daubechies_nine_symlets_and_four_coiflets() -> None:
    assert wavelets.LOW_PASS.keys() == VANISHING.keys()


@pytest.mark.parametrize("name", VANISHING)
def test_a_filter_is_as_long_as_its_moments_ask(name: str) -> None:
    assert len(wavelets.LOW_PASS[name]) == VANISHING[name] * (3 if name.startswith("coif") else 2)


@pytest.mark.parametrize("name", VANISHING)
def test_a_filter_sums_to_two(name: str) -> None:
    assert sum(wavelets.LOW_PASS[name]) == pytest.approx(2 + NO_WAVELET.get(name, 0.0), abs=5e-5 if name in NO_WAVELET else PRINTED)


@pytest.mark.parametrize("name", [name for name in VANISHING if name not in NO_WAVELET])
def test_a_filter_is_orthogonal_to_its_even_shifts(name: str) -> None:
    h = np.asarray(wavelets.LOW_PASS[name])
    inner = [float(h[: len(h) - shift] @ h[shift:]) for shift in range(0, len(h), 2)]
    np.testing.assert_allclose(inner, [2.0] + [0.0] * (len(inner) - 1), rtol=0, atol=PRINTED)


@pytest.mark.parametrize("name", [name for name in VANISHING if name not in NO_WAVELET])
def test_the_high_pass_filter_is_blind_to_polynomials_below_its_order(name: str) -> None:
    h, t = np.asarray(wavelets.LOW_PASS[name]), np.linspace(-1, 1, len(wavelets.LOW_PASS[name]))
    signs = (-1.0) ** np.arange(len(h))
    for power in range(VANISHING[name]):
        assert abs(float(np.sum(signs * h * t**power))) < 10 * PRINTED, power
