"""The functions between a transformer's linear maps. Every `f` has its `f_vjp` beside it: the same arguments and the gradient dy of what
`f` returned, and for each array among the arguments the gradient of sum(dy * f).

    rms_norm     y = w x / rms(x),   rms^2 = mean(x^2) + eps
    layer_norm   y = w (x - mean x) / std(x) + b,   std^2 = mean((x - mean x)^2) + eps

Norms act on the last axis; w and b have its length. Softmax is in peft_ref/attention.py, what acts
element by element in peft_ref/activations.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from peft_ref.activations import Function, FunctionVjp
from peft_ref.activations import erf as erf
from peft_ref.activations import erf_vjp as erf_vjp
from peft_ref.activations import gelu as gelu
from peft_ref.activations import gelu_tanh as gelu_tanh
from peft_ref.activations import gelu_tanh_vjp as gelu_tanh_vjp
from peft_ref.activations import gelu_vjp as gelu_vjp
from peft_ref.activations import relu as relu
from peft_ref.activations import relu_vjp as relu_vjp
from peft_ref.activations import sigmoid as sigmoid
from peft_ref.activations import silu as silu
from peft_ref.activations import silu_vjp as silu_vjp
from peft_ref.activations import tanh as tanh
from peft_ref.activations import tanh_vjp as tanh_vjp
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
