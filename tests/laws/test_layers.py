"""A layer's gradient is the derivative of what it computes."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from peft_ref.check.variants import INPUTS, LAYERS
from peft_ref.norms import NORM


@pytest.mark.parametrize("name", LAYERS)
def test_apply_vjp_is_the_derivative_of_apply(name: str) -> None:
    """`apply` is linear in (W, b) and, of all layers but a norm, in x: a difference along a direction is then the derivative itself."""
    layer, rng = LAYERS[name], np.random.default_rng(zlib.crc32(name.encode()))
    rows = INPUTS[name]
    shape = (rows[0], layer.channels, *rows[1:]) if layer.kernel_size else (*rows, layer.channels)
    x = rng.integers(0, layer.shape[1], rows) if layer.kind == "embedding" else rng.normal(size=shape)
    W, b = rng.normal(size=layer.shape), rng.normal(size=layer.shape[0])
    to_W, to_b = rng.normal(size=W.shape), rng.normal(size=b.shape)
    y = layer.apply(x, W, b)
    dy = rng.normal(size=y.shape)
    grads = layer.apply_vjp(x, W, b, dy)
    assert np.sum(dy * (layer.apply(x, W + to_W, b) - y)) == pytest.approx(np.sum(grads.W * to_W), rel=1e-10)
    assert grads.b is not None
    assert np.sum(dy * (layer.apply(x, W, b + to_b) - y)) == pytest.approx(np.sum(grads.b * to_b), rel=1e-10)
    if layer.kind == "embedding":
        assert grads.x is None
    else:
        to_x = rng.normal(size=x.shape)
        along = layer.apply(x + to_x, W, b) - y
        if layer.kind == NORM:  # a central difference of step h is off by about h^2 and by rounding / h
            along = (layer.apply(x + 1e-5 * to_x, W, b) - layer.apply(x - 1e-5 * to_x, W, b)) / 2e-5
        assert np.sum(dy * along) == pytest.approx(np.sum(grads.x * to_x), rel=1e-7 if layer.kind == NORM else 1e-10)
    assert layer.apply_vjp(x, W, None, dy).b is None
