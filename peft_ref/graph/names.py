"""What a stored tensor's name and shape tell of the module it belongs to.

    weight of 2 axes     embedding if its name is one, transposed linear if its architecture has HF's `Conv1D` there, else linear
    weight of 3, 4, 5    convolution of 1, 2, 3 dimensions; stride, padding, dilation and groups are not stored
    weight of 1 axis     norm, where a bias has its shape; what it does before its weight acts is not stored
    anything else        other: containers, modules with tensors of other names

The tables are the exceptions found by building every architecture of transformers 5 and comparing; tests/graph says on which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from peft_ref.graph.protocol import Module, Parameter
from peft_ref.layers import Conv, Embedding, Layer, Linear
from peft_ref.norms import Norm

# Architectures that use transformers' Conv1D, and the names it has there.
_GPT2 = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
CONV1D: Mapping[str, frozenset[str]] = MappingProxyType(
    dict.fromkeys(("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp_decoder", "clvp"), _GPT2)
)
# The last part of an embedding's name, where no architecture has a linear layer of that name.
# fmt: off
EMBEDDINGS = frozenset({
    "audio_bos_eos_token", "box_position_embeddings", "char_position_embeddings", "cls_embed", "codebook", "col_position_embeddings",
    "column_embedder", "column_embeddings", "denoising_class_embed", "distance_embedding", "embed", "embed_audio_tokens", "embed_char",
    "embed_global", "embed_in", "embed_positions", "embed_text_tokens", "embed_timestep", "embed_tokens", "embed_tokens_per_layer",
    "embedding", "embeddings", "encoder_hash_tok_embedding", "entity_embeddings", "freq_emb", "generation_embeddings",
    "h_position_embeddings", "hq_token", "input_embeds_layer", "iou_token", "label_embed", "lang_embeddings", "language_embedding",
    "level_embed", "mask_tokens", "ngram_embeddings", "no_mask_embed", "not_a_point_embed", "num_speakers_embed", "obj_score_token",
    "point_embed", "pos_emb", "pos_embed", "position_embedding", "position_embedding_table", "position_embeddings",
    "position_embeds_layer", "positions_embed", "presence_token", "pronunciation_embed", "queries_embedder", "queries_features",
    "query_embed", "query_position_embeddings", "reference_point_embed", "rel_attn_embed", "rel_embeddings", "rel_pos_emb",
    "relative_attention_bias", "row_embedder", "row_embeddings", "row_position_embeddings", "segment_emb", "segment_embedding",
    "shape_embed", "shared", "speaker_embedding", "text_position_embedding", "text_token_embedding", "tile_embedding", "tok_embeddings",
    "token_embedding", "token_type_embeddings", "tokens_embed", "unit_embedding", "value_embeddings", "visual_embeddings_table",
    "visual_position_embeddings", "visual_token_type_embeddings", "w_position_embeddings", "word_embedding", "word_embeddings", "wpe",
    "wte", "x_position_embeddings", "y_position_embeddings",
})
# fmt: on
# Names that say nothing alone.
RARE_EMBEDDINGS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "cpmant": frozenset({"input_embedding"}),
        "ctrl": frozenset({"w"}),
        "lw_detr": frozenset({"query_feat"}),
        "phi4_multimodal": frozenset({"bias_values"}),
        "rf_detr": frozenset({"query_feat"}),
        "sam3": frozenset({"reference_points"}),
        "speecht5": frozenset({"pe_k"}),
    }
)
# Stacked linear maps of granitemoe and jetmoe: weights of 3 axes, and no convolutions.
EXPERTS = frozenset({"input_linear", "output_linear"})
# Routers of mixtures are bare parameters in transformers 5, but linear layers in these.
ROUTERS = frozenset({"gate", "router"})
LINEAR_ROUTERS = frozenset({"afmoe", "d_fine", "deimv2", "llama4", "llama4_text", "phimoe"})


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
    if isinstance(layer, Norm) and bias is not None and bias.shape != layer.weight_shape:
        return named
    exact = layer is not None and not layer.kernel_size and not isinstance(layer, Norm)
    return named if layer is None else replace(named, kind=layer.kind, layer=layer, exact=exact)


def layer_of(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> Layer | None:
    last, model_type = name.rpartition(".")[2], str(config.get("model_type", ""))
    if 0 in shape:
        return None
    if len(shape) == 1:
        return Norm(features=shape[0])
    if len(shape) == 2:
        if last in ROUTERS and model_type and model_type not in LINEAR_ROUTERS:
            return None
        if last in EMBEDDINGS or last in RARE_EMBEDDINGS.get(model_type, ()):
            return Embedding(num_embeddings=shape[0], embedding_dim=shape[1])
        if last in CONV1D.get(model_type, ()):
            return Linear(in_features=shape[0], out_features=shape[1], transposed=True)
        return Linear(in_features=shape[1], out_features=shape[0])
    if len(shape) == 3 and last in EXPERTS:
        return None
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
