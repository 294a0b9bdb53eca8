"""The functions between a transformer's linear maps. Every `f` has its `f_vjp` beside it: the same arguments and the gradient dy of what
`f` returned, and for each array among the arguments the gradient of sum(dy * f).

Softmax is in peft_ref/attention.py, norms in peft_ref/norms.py, what acts element by element in peft_ref/activations.py.
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
from peft_ref.arrays import Array, namespace
from peft_ref.arrays import sum_to as sum_to
from peft_ref.attention import softmax as softmax
from peft_ref.attention import softmax_vjp as softmax_vjp
from peft_ref.errors import ConfigError
from peft_ref.norms import layer_norm as layer_norm
from peft_ref.norms import layer_norm_vjp as layer_norm_vjp
from peft_ref.norms import rms_norm as rms_norm
from peft_ref.norms import rms_norm_vjp as rms_norm_vjp


def log_sum_exp(x: Array) -> Array:
    """log sum e^x over the last axis, which is kept with length 1."""
    xp = namespace(x)
    top = xp.max(x, axis=-1, keepdims=True)
    return top + xp.log(xp.sum(xp.exp(x - top), axis=-1, keepdims=True))


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
