"""Every filter of the table of wavelets is PEFT's own, times sqrt(2)."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("peft")
peft_wavelet = pytest.importorskip("peft.tuners.waveft.wavelet")

from peft_ref.methods import wavelets  # noqa: E402

pytestmark = pytest.mark.hf


@pytest.mark.parametrize("name", [f"db{n}" for n in range(1, 11)] + [f"sym{n}" for n in range(2, 11)] + [f"coif{n}" for n in range(1, 5)])
def test_a_filter_is_pefts(name: str) -> None:
    ours, theirs = np.asarray(wavelets.LOW_PASS[name]), np.asarray(peft_wavelet.Wavelet(name).rec_lo)
    np.testing.assert_allclose(ours, theirs * np.sqrt(2), rtol=1e-14, atol=0)
