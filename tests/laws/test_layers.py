"""A layer's gradient is the derivative of what it computes."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from peft_ref.check.variants import INPUTS, LAYERS
from peft_ref.errors import ConfigError
from peft_ref.layers import Conv, Embedding, Linear
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


REFUSED = {
    "a convolution without a dimension": ({"kernel_size": ()}, "has 1 to 3 spatial dimensions"),
    "a convolution of four dimensions": ({"kernel_size": (1, 1, 1, 1)}, "has 1 to 3 spatial dimensions"),
    "a stride too many": ({"kernel_size": (3,), "stride": (1, 1)}, "does not fit kernel_size"),
    "groups that do not divide the inputs": ({"kernel_size": (3,), "in_channels": 3, "groups": 2}, "must divide in_channels=3"),
    "groups that do not divide the outputs": ({"kernel_size": (3,), "out_channels": 3, "groups": 2}, "and out_channels=3"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_convolution_that_cannot_be_is_refused(what: str) -> None:
    given, text = REFUSED[what]
    with pytest.raises(ConfigError, match=text):
        Conv(**{"in_channels": 4, "out_channels": 4, **given})


def test_a_layer_says_what_it_was_given_and_takes_no_more() -> None:
    """What a linear layer has of a convolution is no size of its own; an embedding has no bias."""
    assert repr(Linear(in_features=2, out_features=3)) == "Linear(bias=True, in_features=2, out_features=3, transposed=False)"
    assert repr(Embedding(num_embeddings=2, embedding_dim=3)) == "Embedding(num_embeddings=2, embedding_dim=3)"
    for field, value in (("kernel_size", (3,)), ("groups", 2)):
        with pytest.raises(TypeError, match=field):
            Linear(in_features=2, out_features=3, **{field: value})
    with pytest.raises(TypeError, match="bias"):
        Embedding(num_embeddings=2, embedding_dim=3, bias=True)
