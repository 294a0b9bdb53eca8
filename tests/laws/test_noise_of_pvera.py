"""PVeRA's noisy output, which is no map of the weight: its gradients are the derivative, and without noise it is that of the mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_ref.layers import Linear
from peft_ref.methods import PVeRA
from tests.laws.compare import assert_close

METHOD, RNG = PVeRA(r=2, widest_in=6, widest_out=7), np.random.default_rng(0)


@pytest.mark.parametrize("size", [(4, 5), (5, 3), (7, 6)])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 2)])
def test_the_gradients_of_a_noisy_output_are_its_derivative(size: tuple[int, int], leading: tuple[int, ...]) -> None:
    (out, n_in), layer = size, Linear(in_features=size[1], out_features=size[0])
    p: Any = METHOD.to_params(b=RNG.normal(size=out), d=RNG.normal(size=4), A=RNG.normal(size=(4, 6)), B=RNG.normal(size=(7, 2)))
    x, noise, dy = RNG.normal(size=(*leading, n_in)), RNG.normal(size=(*leading, 2)), RNG.normal(size=(*leading, out))
    got = METHOD.sampled_vjp(layer, p, x, noise, dy)
    db, dd, dx = RNG.normal(size=out), RNG.normal(size=4), RNG.normal(size=x.shape)

    def at(t: float) -> Any:
        return METHOD.sampled(layer, p._replace(b=p.b + t * db, d=p.d + t * dd), x + t * dx, noise)

    h = 1e-4
    slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    along = np.sum(got.params.b * db) + np.sum(got.params.d * dd) + np.sum(got.x * dx)
    assert_close(along, np.sum(slope * dy), "the slope", rounding=1e-8)
    assert_close(METHOD.sampled(layer, p, x, 0 * noise), x @ METHOD.delta(layer, p).W.T, "the mean")
