"""What is drawn as torch draws it has torch's bits."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from peft_ref.methods.torch_draws import Generator  # noqa: E402

pytestmark = pytest.mark.hf


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**33 + 5])
@pytest.mark.parametrize("shapes", [((1,), (3, 5)), ((16,), (15,)), ((7, 13), (100, 9), (2,)), ((4099,), (17,))])
def test_uniform_numbers_one_draw_after_the_other(seed: int, shapes: tuple[tuple[int, ...], ...]) -> None:
    theirs, ours = torch.Generator().manual_seed(seed), Generator(seed)
    for n, shape in enumerate(shapes):
        low, high = -0.3 * (n + 1), 0.7 / (n + 1)
        want = torch.empty(shape).uniform_(low, high, generator=theirs).numpy()
        got = ours.uniform(shape, low, high)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want)
