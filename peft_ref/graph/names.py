"""What a stored tensor's name and shape tell of the module it belongs to.

    weight of 2 axes     embedding if its name is one, transposed linear if its architecture has HF's `Conv1D` there, else linear
    weight of 3, 4, 5    convolution of 1, 2, 3 dimensions; stride, padding, dilation and groups are not stored
    anything else        other: norms (1 axis), containers, modules with parameters of other names

The tables are the exceptions found by building every architecture of transformers 5 and comparing; tests/graph says on which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from peft_ref.graph.protocol import Module, Parameter
from peft_ref.layers import Conv, Embedding, Layer, Linear

# Architectures that use transformers' Conv1D, and the names it has there.
_GPT2 = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
CONV1D: Mapping[str, frozenset[str]] = MappingProxyType(
    dict.fromkeys(("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp_decoder", "clvp"), _GPT2)
)
# The last part of an embedding's name. `embed_out` and `patch_embed` are not: those are linear maps.
EMBEDDINGS = frozenset(
    {"embed_in", "embed_positions", "embed_tokens", "embedding", "embeddings", "lang_embeddings", "pos_embed", "position_embedding"}
    | {"position_embeddings", "positions_embed", "rel_embeddings", "relative_attention_bias", "shared", "tok_embeddings", "token_embedding"}
    | {"token_type_embeddings", "tokens_embed", "word_embedding", "word_embeddings", "wpe", "wte"}
)


def holders(parameters: Iterable[str]) -> list[str]:
    """Every module that owns a parameter or holds one that does, a container before what it holds, the root left out."""
    seen: dict[str, None] = {}
    for parameter in parameters:
        parts = parameter.split(".")[:-1]
        for depth in range(1, len(parts) + 1):
            seen.setdefault(".".join(parts[:depth]))
    return list(seen)


def module_of(name: str, own: Mapping[str, Parameter], config: Mapping[str, Any]) -> Module:
    """The module `name`, told from the parameters it owns, by their last names."""
    weight, bias = own.get("weight"), own.get("bias")
    named = Module(name=name, weight=weight.name if weight else None, bias=bias.name if bias else None)
    layer = None if weight is None or own.keys() - {"weight", "bias"} else layer_of(name, weight.shape, config)
    return named if layer is None else replace(named, kind=layer.kind, layer=layer, exact=not layer.kernel_size)


def layer_of(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> Layer | None:
    last, model_type = name.rpartition(".")[2], str(config.get("model_type", ""))
    if 0 in shape:
        return None
    if len(shape) == 2:
        if last in EMBEDDINGS:
            return Embedding(num_embeddings=shape[0], embedding_dim=shape[1])
        if last in CONV1D.get(model_type, ()):
            return Linear(in_features=shape[0], out_features=shape[1], transposed=True)
        return Linear(in_features=shape[1], out_features=shape[0])
    if 3 <= len(shape) <= 5:
        return Conv(in_channels=shape[1], out_channels=shape[0], kernel_size=shape[2:])
    return None


def stored_modules(parameters: Mapping[str, Parameter], config: Mapping[str, Any]) -> dict[str, Module]:
    """The modules of a model that is known by its parameters alone, in the parameters' order."""
    own: dict[str, dict[str, Parameter]] = {name: {} for name in holders(parameters)}
    for name, parameter in parameters.items():
        holder, _, last = name.rpartition(".")
        if holder:
            own[holder][last] = parameter
    return {name: module_of(name, mine, config) for name, mine in own.items()}

