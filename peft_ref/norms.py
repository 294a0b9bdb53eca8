"""Norms, and the layer that a norm is: its weight w acts on the normalised input, channel by channel.

    rms_norm     y = w n,       n = x / rms(x),      rms^2 = mean(x^2) + eps
    layer_norm   y = w n + b,   n that of x - mean x                            (`centred`)

Means run over the last axis; w and b have its length. To the methods w is the matrix W (out, 1), which stands for the diagonal one.
With n fixed y is linear in w, so for an output gradient dy:   dw = sum dy n,   db = sum dy,   and with dn = w dy
    dx = (dn - n mean(dn n)) / rms(x),   centred once more where x was.

`unit_offset` is Gemma's: what is stored is w - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

from peft_ref.arrays import Array, as_rows, column, namespace
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Layer

NORM = "norm"


class NormGradients(NamedTuple):
    x: Array
    w: Array
    b: Array | None = None


def _inverse_norm(x: Array, eps: float) -> Array:
    xp = namespace(x)
    return 1 / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps)


def rms_norm(x: Array, w: Array, eps: float) -> Array:
    """Zhang and Sennrich 2019, arXiv:1910.07467. HF computes it in float32 whatever the model's dtype."""
    return w * (x * _inverse_norm(x, eps))


def rms_norm_vjp(x: Array, w: Array, eps: float, dy: Array) -> NormGradients:
    return NormGradients(_rms_norm_input_vjp(x, w, eps, dy), _scale_vjp(x, eps, dy))


def layer_norm(x: Array, w: Array, b: Array, eps: float) -> Array:
    """Ba et al. 2016, arXiv:1607.06450: the RMS norm of the centred x, and a shift."""
    return rms_norm(_centred(x), w, eps) + b


def layer_norm_vjp(x: Array, w: Array, b: Array, eps: float, dy: Array) -> NormGradients:
    """Centring is its own transpose."""
    d = rms_norm_vjp(_centred(x), w, eps, dy)
    return NormGradients(_centred(d.x), d.w, namespace(dy).sum(as_rows(dy), axis=0))


def _centred(x: Array) -> Array:
    return x - namespace(x).mean(x, axis=-1, keepdims=True)


def _rms_norm_input_vjp(x: Array, w: Array, eps: float, dy: Array) -> Array:
    scale = _inverse_norm(x, eps)
    n, dn = x * scale, w * dy
    return scale * (dn - n * namespace(x, dy).mean(dn * n, axis=-1, keepdims=True))


def _scale_vjp(x: Array, eps: float, dy: Array) -> Array:
    return namespace(x, dy).sum(as_rows(dy * (x * _inverse_norm(x, eps))), axis=0)


@final
@dataclass(frozen=True, kw_only=True)
class Norm(Layer):
    """y = w n + b of the last axis."""

    features: int
    eps: float = 1e-5
    centred: bool = True
    unit_offset: bool = False
    bias: bool = True

    @property
    def kind(self) -> str:
        return NORM

    @property
    def shape(self) -> tuple[int, int]:
        return self.features, 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.features,)

    @property
    def fan_in(self) -> int:
        return 1

    @property
    def channels(self) -> int:
        return self.features

    def fold(self, weight: Array) -> Array:
        return column(weight)

    def unfold(self, W: Array) -> Array:
        return W[:, 0]

    def apply(self, x: Array, W: Array, b: Array | None) -> Array:
        return self.add_bias(rms_norm(self._seen(x), self._scale(W), self.eps), b)

    def input_vjp(self, x: Array, W: Array, dy: Array) -> Array:
        return self._seen(_rms_norm_input_vjp(self._seen(x), self._scale(W), self.eps, dy))

    def weight_vjp(self, x: Array, dy: Array) -> Array:
        return column(_scale_vjp(self._seen(x), self.eps, dy))

    def down(self, r: int) -> Layer:
        raise UnsupportedLayerError(f"a norm of {self.features} channels mixes none of them: there is no norm with {r} outputs.")

    def _seen(self, x: Array) -> Array:
        """What is divided by its size; and its own transpose."""
        return _centred(x) if self.centred else x

    def _scale(self, W: Array) -> Array:
        return W[:, 0] + 1 if self.unit_offset else W[:, 0]
