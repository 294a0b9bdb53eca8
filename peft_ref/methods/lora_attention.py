"""LoRA on torch's MultiheadAttention: on the stacked projections of q, k and v, and on the output projection, always both.

    W_in' = W_in + s B A  (3 E, E)        W_out' = W_out + 2 s B_o A_o  (E, E)
    A (r, E)    B (3 E, r)    A_o (r, E)    B_o (E, r)

The block runs with W_in' and W_out' in place of its own, so a gradient of W_in' is one of B A as on any linear layer of E inputs and 3 E
outputs. In a file the output projection is one "base_layer" further in.

HF      peft.tuners.lora.MultiheadAttention. It merges before every call and unmerges after it, so that lora_dropout does nothing.
        Followed: it merges the output projection twice, once by itself and once through the layer, whose part has no gradient. So what acts
        is twice the delta, and its gradient that of one; right is once, for both. It refuses DoRA, mixed rows, and keys of another size
        than the queries; "pissa", "orthogonal" and their like find no weight: refused here
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from peft_ref.arrays import Array
from peft_ref.errors import ConfigError, KeyMismatchError
from peft_ref.layers import Linear
from peft_ref.methods.lora import LoRA, Params

OUT = "base_layer.out_proj."
TWICE = 2.0  # right is 1


class Projections(NamedTuple):
    """The two linear layers that a block's weights are."""

    into: Linear
    out: Linear


class BlockParams(NamedTuple):
    into: Params
    out: Params


def projections(embed_dim: int) -> Projections:
    return Projections(Linear(in_features=embed_dim, out_features=3 * embed_dim), Linear(in_features=embed_dim, out_features=embed_dim))


def check(method: LoRA) -> None:
    """Raise `ConfigError` for what HF PEFT does not do on such a block."""
    if not isinstance(method.init_lora_weights, bool) and method.init_lora_weights != "gaussian":
        raise ConfigError(f"init_lora_weights={method.init_lora_weights!r} on a MultiheadAttention: HF PEFT finds no weight there.")


def init(method: LoRA, embed_dim: int, W_in: Array, W_out: Array, rng: np.random.Generator) -> BlockParams:
    """A fresh adapter: LoRA's on each of the two."""
    check(method)
    into, out = projections(embed_dim)
    return BlockParams(method.init(into, W_in, rng).params, method.init(out, W_out, rng).params)


def merged(method: LoRA, embed_dim: int, p: BlockParams, W_in: Array, W_out: Array) -> tuple[Array, Array]:
    """in_proj_weight (3 E, E) and out_proj.weight (E, E) as the block uses them."""
    into, out = projections(embed_dim)
    return W_in + method.delta(into, p.into).W, W_out + TWICE * method.delta(out, p.out).W


def merged_vjp(method: LoRA, embed_dim: int, p: BlockParams, dW_in: Array, dW_out: Array) -> BlockParams:
    """The gradients that HF takes, for gradients of what `merged` returned: of the output projection half the derivative."""
    into, out = projections(embed_dim)
    return BlockParams(
        method.weight_vjp(into, p.into, dW_in, None, dW_in, dW_in, None).params,  # a delta depends on no weight
        method.weight_vjp(out, p.out, dW_out, None, dW_out, dW_out, None).params,
    )


def pack(method: LoRA, embed_dim: int, p: BlockParams) -> dict[str, Array]:
    """The parameters under their keys below the block's name."""
    into, out = projections(embed_dim)
    return {**method.pack(into, p.into), **{f"{OUT}{key}": tensor for key, tensor in method.pack(out, p.out).items()}}


def unpack(method: LoRA, embed_dim: int, tensors: Mapping[str, Array], where: str) -> BlockParams:
    """Undoes `pack`."""
    into, out = projections(embed_dim)
    inner = {key.removeprefix(OUT): tensor for key, tensor in tensors.items() if key.startswith(OUT)}
    if not inner:
        raise KeyMismatchError(f"LoRA at {where!r}: no {OUT}lora_A.weight: HF PEFT adapts both projections of a block, or none.")
    outer = {key: tensor for key, tensor in tensors.items() if not key.startswith(OUT)}
    return BlockParams(method.unpack(into, outer, where), method.unpack(out, inner, f"{where}.{OUT[:-1]}"))
