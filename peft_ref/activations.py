"""Functions of one number, element by element, each beside its gradient: what the array API lacks of them is made of what it has.

FUNCTIONS has them by HF's names (transformers.activations.ACT2FN). At a corner they have the slope that torch gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from peft_ref.arrays import Array, namespace, zeros_like

Function: TypeAlias = Callable[[Array], Array]
FunctionVjp: TypeAlias = Callable[[Array, Array], Array]


class Elementwise(NamedTuple):
    f: Function
    vjp: FunctionVjp


def linear(x: Array) -> Array:
    return x


def linear_vjp(x: Array, dy: Array) -> Array:
    return dy


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
    return relu_vjp(x, x)


def relu_vjp(x: Array, dy: Array) -> Array:
    return namespace(dy).where(x > 0, dy, zeros_like(dy.shape, dy))


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


def gelu_tanh(x: Array, steep: float = _STEEP) -> Array:
    """x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3), near `gelu`. HF's "gelu_new" and "gelu_pytorch_tanh"."""
    return 0.5 * x * (1 + tanh(steep * (x + _CUBIC * x * x * x)))


def gelu_tanh_vjp(x: Array, dy: Array, steep: float = _STEEP) -> Array:
    t = tanh(steep * (x + _CUBIC * x * x * x))
    return dy * 0.5 * (1 + t + x * (1 - t * t) * steep * (1 + 3 * _CUBIC * x * x))


_TEN_DIGITS = 0.7978845608  # what "gelu_fast" has for sqrt(2 / pi)


def gelu_fast(x: Array) -> Array:
    return gelu_tanh(x, _TEN_DIGITS)


def gelu_fast_vjp(x: Array, dy: Array) -> Array:
    return gelu_tanh_vjp(x, dy, _TEN_DIGITS)


def sigmoid_vjp(x: Array, dy: Array) -> Array:
    s = sigmoid(x)
    return dy * s * (1 - s)


def relu2(x: Array) -> Array:
    return relu(x) * relu(x)


def relu2_vjp(x: Array, dy: Array) -> Array:
    return 2 * dy * relu(x)


def relu6(x: Array) -> Array:
    """No less than 0 and no more than 6."""
    above = _is(x >= 6, x)
    return relu(x) * (1 - above) + 6 * above


def relu6_vjp(x: Array, dy: Array) -> Array:
    return dy * (_is(x > 0, x) - _is(x >= 6, x))


def leaky_relu(x: Array) -> Array:
    return x * _leaky(x)


def leaky_relu_vjp(x: Array, dy: Array) -> Array:
    return dy * _leaky(x)


def _leaky(x: Array) -> Array:
    above = _is(x > 0, x)
    return above + 0.01 * (1 - above)


def _is(truth: Array, x: Array) -> Array:
    return namespace(x).astype(truth, x.dtype)


QUICK = 1.702


def quick_gelu(x: Array) -> Array:
    return x * sigmoid(QUICK * x)


def quick_gelu_vjp(x: Array, dy: Array) -> Array:
    s = sigmoid(QUICK * x)
    return dy * s * (1 + QUICK * x * (1 - s))


def hardswish(x: Array) -> Array:
    return x * relu6(x + 3) / 6


def hardswish_vjp(x: Array, dy: Array) -> Array:
    """Flat from -3 down, of slope 1 from 3 up."""
    above = _is(x >= 3, x)
    return dy * (_is(x > -3, x) * (1 - above) * (2 * x + 3) / 6 + above)


def clipped_gelu(x: Array) -> Array:
    """`gelu`, no more than 10. HF's "gelu_10"."""
    return namespace(x).clip(gelu(x), -10.0, 10.0)


def clipped_gelu_vjp(x: Array, dy: Array) -> Array:
    return gelu_vjp(x, dy) * _is(gelu(x) <= 10, x)


_MEAN, _SPREAD = 0.707107, 0.282095 * math.sqrt(2)


def laplace(x: Array) -> Array:
    """The distribution function of a normal with mean sqrt(1/2) and deviation 1 / sqrt(4 pi), both to six digits."""
    return 0.5 * (1 + erf((x - _MEAN) / _SPREAD))


def laplace_vjp(x: Array, dy: Array) -> Array:
    return 0.5 * erf_vjp((x - _MEAN) / _SPREAD, dy) / _SPREAD


def softplus(x: Array) -> Array:
    """log(1 + e^x), without an overflow."""
    xp = namespace(x)
    return relu(x) + xp.log1p(xp.exp(-xp.abs(x)))


def mish(x: Array) -> Array:
    return x * tanh(softplus(x))


def mish_vjp(x: Array, dy: Array) -> Array:
    t = tanh(softplus(x))
    return dy * (t + x * (1 - t * t) * sigmoid(x))


_STRAIGHT = 20.0  # from there on torch takes softplus for x itself, which is 2e-9 less


def sqrt_softplus(x: Array) -> Array:
    xp = namespace(x)
    return xp.sqrt(xp.where(x > _STRAIGHT, x, softplus(x)))


def sqrt_softplus_vjp(x: Array, dy: Array) -> Array:
    xp = namespace(x)
    return dy * xp.where(x > _STRAIGHT, xp.ones_like(x), sigmoid(x)) / (2 * sqrt_softplus(x))


def prelu(x: Array) -> Array:
    """`leaky_relu` of slope 1/4: HF makes the module anew at every call, so its slope is never another."""
    return x * _quarter(x)


def prelu_vjp(x: Array, dy: Array) -> Array:
    return dy * _quarter(x)


def _quarter(x: Array) -> Array:
    return 0.25 + 0.75 * _is(x > 0, x)


# xIELU's numbers as HF makes them, in bfloat16: 0.8, 0.8, 0.5 and -1e-6 were meant.
_RIGHT, _LEFT, _SLOPE, _DENT = 0.80078125, 0.80078125, 0.5, -9.98377799987793e-07


def xielu(x: Array) -> Array:
    """a x^2 + x / 2 above 0, and b (e^min(x, -1e-6) - 1 - x) + x / 2 below, arXiv:2411.13010: its numbers as they start, as of `prelu`."""
    xp = namespace(x)
    below = xp.expm1(xp.where(x < _DENT, x, _DENT + 0 * x)) - x
    return xp.where(x > 0, _RIGHT * x * x, _LEFT * below) + _SLOPE * x


def xielu_vjp(x: Array, dy: Array) -> Array:
    xp = namespace(x)
    below = xp.where(x < _DENT, xp.exp(xp.where(x < _DENT, x, 0 * x)), 0 * x) - 1
    return dy * (xp.where(x > 0, 2 * _RIGHT * x, _LEFT * below) + _SLOPE)


_GELU_TANH = Elementwise(gelu_tanh, gelu_tanh_vjp)
FUNCTIONS: Mapping[str, Elementwise] = MappingProxyType(
    {
        "gelu": Elementwise(gelu, gelu_vjp),
        "gelu_10": Elementwise(clipped_gelu, clipped_gelu_vjp),
        "gelu_accurate": _GELU_TANH,
        "gelu_fast": Elementwise(gelu_fast, gelu_fast_vjp),
        "gelu_new": _GELU_TANH,
        "gelu_python": Elementwise(gelu, gelu_vjp),
        "gelu_python_tanh": _GELU_TANH,
        "gelu_pytorch_tanh": _GELU_TANH,
        "hardswish": Elementwise(hardswish, hardswish_vjp),
        "laplace": Elementwise(laplace, laplace_vjp),
        "leaky_relu": Elementwise(leaky_relu, leaky_relu_vjp),
        "linear": Elementwise(linear, linear_vjp),
        "mish": Elementwise(mish, mish_vjp),
        "prelu": Elementwise(prelu, prelu_vjp),
        "quick_gelu": Elementwise(quick_gelu, quick_gelu_vjp),
        "relu": Elementwise(relu, relu_vjp),
        "relu2": Elementwise(relu2, relu2_vjp),
        "relu6": Elementwise(relu6, relu6_vjp),
        "sigmoid": Elementwise(sigmoid, sigmoid_vjp),
        "silu": Elementwise(silu, silu_vjp),
        "sqrtsoftplus": Elementwise(sqrt_softplus, sqrt_softplus_vjp),
        "swish": Elementwise(silu, silu_vjp),
        "tanh": Elementwise(tanh, tanh_vjp),
        "xielu": Elementwise(xielu, xielu_vjp),
    }
)
