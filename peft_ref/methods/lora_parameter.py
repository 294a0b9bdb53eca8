"""LoRA on a bare parameter (`target_parameters`): a matrix that no layer owns, or a stack of them, as fused experts are.

    W[e]' = W[e] + s B_e A_e        A_e = rows e r ... e r + r - 1 of A          A (r E, in)
                                    B_e = columns e, e + E, e + 2 E ... of B      B (out, r E)

A is expert by expert, B rank by rank: the two orders differ. For a gradient G[e] of W[e]':   dA_e = s B_e^T G[e],   dB_e = s G[e] A_e^T.

    stored               shape          is_transposed
    matrix               (out, in)      no difference
    stack                (E, out, in)   absent or false: mixtures in transformers 5
    stack, transposed    (E, in, out)   true: gpt_oss, llama4

The module runs as it is with W' in the parameter's place, so that its gradient is whatever the module makes of W'. Several parameters of
one module are wrapped one in the other, in the module's order: `keys` says what their tensors are called in a file.

HF      peft.tuners.lora.ParamWrapper. It refuses dropout, lora_bias, DoRA, fan_in_fan_out and mixed rows; a stack of one transposed matrix
        gets its delta the wrong way round, or breaks: refused here, as are named inits but "gaussian"
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from peft_ref.arrays import Array, namespace, to, zeros_like
from peft_ref.contracts import Start
from peft_ref.errors import ConfigError, KeyMismatchError, ShapeError, UnsupportedLayerError
from peft_ref.methods.lora import LoRA, Params


@final
@dataclass(frozen=True, kw_only=True)
class Stack:
    """A parameter without its numbers. `experts` is None for a single matrix."""

    in_features: int
    out_features: int
    experts: int | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        one = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        return one if self.experts is None else (self.experts, *one)

    @property
    def count(self) -> int:
        return 1 if self.experts is None else self.experts


def stack_of(shape: tuple[int, ...], is_transposed: bool = False) -> Stack:
    """The stack that a parameter of this shape is, in a module whose `is_transposed` is given."""
    if len(shape) == 2:
        return Stack(in_features=shape[1], out_features=shape[0])
    if len(shape) != 3:
        raise UnsupportedLayerError(f"a parameter {shape} is neither a matrix nor a stack of them (HF PEFT refuses it too).")
    if is_transposed and shape[0] == 1:
        raise UnsupportedLayerError(f"a parameter {shape}, transposed: HF PEFT adds the delta of a single matrix the other way round.")
    n_in, out = shape[1:] if is_transposed else shape[:0:-1]
    return Stack(in_features=n_in, out_features=out, experts=shape[0], transposed=is_transposed)


def check(method: LoRA) -> None:
    """Raise `ConfigError` for what is not done on a parameter."""
    for name, given in (("lora_dropout", method.lora_dropout), ("lora_bias", method.lora_bias)):
        if given:
            raise ConfigError(f"{name}={given!r} with target_parameters (HF PEFT refuses it too).\n  Leave it out.")
    if not isinstance(method.init_lora_weights, bool) and method.init_lora_weights != "gaussian":
        raise ConfigError(f"init_lora_weights={method.init_lora_weights!r} with target_parameters: use true, false or 'gaussian'.")


def shapes(method: LoRA, stack: Stack) -> Params:
    """The shapes of A and B."""
    total = method.r * stack.count
    return Params((total, stack.in_features), (stack.out_features, total))


def init(method: LoRA, stack: Stack, W: Array, rng: np.random.Generator) -> Start[Params]:
    """A fresh adapter: as LoRA's on a linear layer with r E ranks, but "gaussian" has deviation 1 / r."""
    check(method)
    (total, n_in), (out, _) = shapes(method, stack)[:2]

    def uniform(rows: int, columns: int) -> Array:
        bound = 1 / math.sqrt(columns)
        return to(rng.uniform(-bound, bound, (rows, columns)), W)

    A = to(rng.normal(0.0, 1 / method.r, (total, n_in)), W) if method.init_lora_weights == "gaussian" else uniform(total, n_in)
    B = uniform(out, total) if method.init_lora_weights is False else zeros_like((out, total), W)
    return Start(Params(A, B), W)


def delta(method: LoRA, stack: Stack, p: Params) -> Array:
    """W' - W, as the parameter is stored."""
    A, B = split(method, stack, p)
    return _stored(stack, method.scale * (B @ A))


def delta_vjp(method: LoRA, stack: Stack, p: Params, dW: Array) -> Params:
    """The gradients of A and B for a gradient dW of `delta`, in its shape."""
    xp = namespace(dW)
    A, B = split(method, stack, p)
    G = xp.reshape(dW, (stack.count, *dW.shape[-2:]))
    G = xp.matrix_transpose(G) if stack.transposed else G
    dA, dB = method.scale * (xp.matrix_transpose(B) @ G), method.scale * (G @ xp.matrix_transpose(A))
    total, out = method.r * stack.count, stack.out_features
    return Params(xp.reshape(dA, (total, stack.in_features)), xp.reshape(xp.permute_dims(dB, (1, 2, 0)), (out, total)))


def keys(targeted: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Under which name a parameter's A and B are in a file, by the parameter's name. A module's parameters come in its own order.

    The last one is outermost and under the module itself; each before it is one "base_layer" further in.
    """
    found = {}
    for module, names in targeted.items():
        for depth, name in enumerate(reversed(names)):
            found[f"{module}.{name}" if module else name] = ".".join([*([module] if module else []), *["base_layer"] * depth])
    return found


def pack(method: LoRA, stack: Stack, p: Params) -> dict[str, Array]:
    return {"lora_A.weight": p.A, "lora_B.weight": p.B}


def unpack(method: LoRA, stack: Stack, tensors: Mapping[str, Array], where: str = "") -> Params:
    """Undoes `pack`."""
    if tensors.keys() != {"lora_A.weight", "lora_B.weight"}:
        raise KeyMismatchError(f"LoRA at {where!r}: came {', '.join(sorted(tensors)) or 'nothing'}, expected lora_A.weight, lora_B.weight.")
    p, expected = Params(tensors["lora_A.weight"], tensors["lora_B.weight"]), shapes(method, stack)
    for name, shape in zip("AB", expected, strict=False):
        tensor = tensors[f"lora_{name}.weight"]
        if tuple(tensor.shape) != shape:
            raise ShapeError(f"LoRA at {where!r}: lora_{name}.weight is {tuple(tensor.shape)}, expected {shape}.\n  {method} on {stack}.")
    return p


def split(method: LoRA, stack: Stack, p: Params) -> tuple[Array, Array]:
    """A (E, r, in) and B (E, out, r)."""
    xp, E = namespace(p.A), stack.count
    A = xp.reshape(p.A, (E, method.r, stack.in_features))
    return A, xp.permute_dims(xp.reshape(p.B, (stack.out_features, method.r, E)), (2, 0, 1))


def _stored(stack: Stack, W: Array) -> Array:
    xp = namespace(W)
    return xp.reshape(xp.matrix_transpose(W) if stack.transposed else W, stack.shape)
