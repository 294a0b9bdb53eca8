"""The functions between a transformer's linear maps. Every `f` has its `f_vjp` beside it: the same arguments and the gradient dy of what
`f` returned, and for each array among the arguments the gradient of sum(dy * f).

    rms_norm     y = w x / rms(x),   rms^2 = mean(x^2) + eps
    layer_norm   y = w (x - mean x) / std(x) + b,   std^2 = mean((x - mean x)^2) + eps

Norms act on the last axis; w and b have its length. Softmax is in peft_ref/attention.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from peft_ref.arrays import Array, as_rows, namespace
from peft_ref.arrays import sum_to as sum_to
from peft_ref.attention import softmax as softmax
from peft_ref.attention import softmax_vjp as softmax_vjp
from peft_ref.errors import ConfigError


def log_sum_exp(x: Array) -> Array:
    """log sum e^x over the last axis, which is kept with length 1."""
    xp = namespace(x)
    top = xp.max(x, axis=-1, keepdims=True)
    return top + xp.log(xp.sum(xp.exp(x - top), axis=-1, keepdims=True))


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
    """With n = x / rms(x):  dw = sum dy n,   dx = (dn - n mean(dn n)) / rms(x),   dn = w dy."""
    xp = namespace(x, dy)
    scale = _inverse_norm(x, eps)
    n, dn = x * scale, w * dy
    dx = scale * (dn - n * xp.mean(dn * n, axis=-1, keepdims=True))
    return NormGradients(dx, xp.sum(as_rows(dy * n), axis=0))


def layer_norm(x: Array, w: Array, b: Array, eps: float) -> Array:
    """Ba et al. 2016, arXiv:1607.06450: the RMS norm of the centred x, and a shift."""
    return rms_norm(_centred(x), w, eps) + b


def layer_norm_vjp(x: Array, w: Array, b: Array, eps: float, dy: Array) -> NormGradients:
    """Centring is its own transpose."""
    d = rms_norm_vjp(_centred(x), w, eps, dy)
    return NormGradients(_centred(d.x), d.w, namespace(dy).sum(as_rows(dy), axis=0))


def _centred(x: Array) -> Array:
    return x - namespace(x).mean(x, axis=-1, keepdims=True)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x) = e^min(x, 0) / (1 + e^-|x|): no power is positive, so nothing overflows."""
    xp = namespace(x)
    size = xp.abs(x)
    return xp.exp(0.5 * (x - size)) / (1 + xp.exp(-size))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def silu_vjp(x: Array, dy: Array) -> Array:
    s = sigmoid(x)
    return dy * s * (1 + x * (1 - s))


def relu(x: Array) -> Array:
    return x * namespace(x).astype(x > 0, x.dtype)


def relu_vjp(x: Array, dy: Array) -> Array:
    return dy * namespace(x).astype(x > 0, x.dtype)


def tanh(x: Array) -> Array:
    return namespace(x).tanh(x)


def tanh_vjp(x: Array, dy: Array) -> Array:
    y = tanh(x)
    return dy * (1 - y * y)


_FLAT = 6.0  # erf(6) is 1 in float64
_PERIOD = 24.0
_ERF = tuple((n * 2 * math.pi / _PERIOD, 4 / (math.pi * n) * math.exp(-((n * math.pi / _PERIOD) ** 2))) for n in range(1, 50, 2))


def erf(x: Array) -> Array:
    """The error function, which the array API lacks, from sines alone.

    erf is the sign function blurred by the density e^{-t^2} / sqrt(pi). Blur a square wave of period P instead: each sine of its Fourier
    series, 4 / (pi n) sin(n w t) for odd n with w = 2 pi / P, shrinks by e^{-(n w)^2 / 4}. For |x| <= 6 and P = 24 the nearest other edge
    of the wave is 6 away and changes nothing above 1e-16, nor does the sine n = 51. From there on erf is 1 to the last bit.
    """
    xp = namespace(x)
    t = xp.clip(x, -_FLAT, _FLAT)
    y = 0 * t
    for frequency, height in reversed(_ERF):
        y = y + height * xp.sin(frequency * t)
    return y


def erf_vjp(x: Array, dy: Array) -> Array:
    return dy * (2 / math.sqrt(math.pi)) * namespace(x).exp(-x * x)


def gelu(x: Array) -> Array:
    """x Phi(x), Phi the normal distribution function. HF's "gelu"."""
    return 0.5 * x * (1 + erf(x * math.sqrt(0.5)))


def gelu_vjp(x: Array, dy: Array) -> Array:
    """x' Phi + x Phi', Phi' the normal density."""
    density = namespace(x).exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return dy * (0.5 * (1 + erf(x * math.sqrt(0.5))) + x * density)


_CUBIC, _STEEP = 0.044715, math.sqrt(2 / math.pi)


def gelu_tanh(x: Array) -> Array:
    """x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3), near `gelu`. HF's "gelu_new" and "gelu_pytorch_tanh"."""
    return 0.5 * x * (1 + tanh(_STEEP * (x + _CUBIC * x * x * x)))


def gelu_tanh_vjp(x: Array, dy: Array) -> Array:
    t = tanh(_STEEP * (x + _CUBIC * x * x * x))
    return dy * 0.5 * (1 + t + x * (1 - t * t) * _STEEP * (1 + 3 * _CUBIC * x * x))


Function: TypeAlias = Callable[[Array], Array]
FunctionVjp: TypeAlias = Callable[[Array, Array], Array]


class Activation(NamedTuple):
    f: Function
    vjp: FunctionVjp
    class_name: str  # of HF's module


# By HF's names (transformers.activations.ACT2FN).
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "gelu": Activation(gelu, gelu_vjp, "GELUActivation"),
        "gelu_new": Activation(gelu_tanh, gelu_tanh_vjp, "NewGELUActivation"),
        "gelu_pytorch_tanh": Activation(gelu_tanh, gelu_tanh_vjp, "GELUTanh"),
        "relu": Activation(relu, relu_vjp, "ReLU"),
        "silu": Activation(silu, silu_vjp, "SiLUActivation"),
        "swish": Activation(silu, silu_vjp, "SiLU"),
        "tanh": Activation(tanh, tanh_vjp, "Tanh"),
    }
)


def activation(name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation {name!r} is not known here.\n  There are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]
