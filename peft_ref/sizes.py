"""How large a model is, read off its config.json: what a prompt's configuration may leave out.

Every family of models has its own words for its sizes. They are tried in PEFT's order, and the first that is there counts.

HF      PEFT asks a model's configuration, an object, for num_hidden_layers, which it has under whatever name. In the file there may be the
        model's own name alone, as in BART's since transformers 5. A few classes say another number than their file: those are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft_ref.errors import ConfigError

LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers")
LAYERS_COMPUTED = ("dory", "longcat_flash", "mask2former", "oneformer")
WIDTHS = ("hidden_size", "n_embd", "d_model")
HEADS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")


def layers(model: Mapping[str, Any]) -> int:
    """How many layers it has; where it has a part for text, what is said of the whole counts first."""
    if (kind := model.get("model_type")) in LAYERS_COMPUTED:
        raise ConfigError(f"num_layers is not given, and the layers of a {kind} are not those of its config.json.\n  Give num_layers.")
    return _first(_text(model) if model.get("num_hidden_layers") is None else model, LAYERS, "num_layers")


def attention_sizes(model: Mapping[str, Any], width: int | None, heads: int | None, *, of_cache: bool) -> tuple[int, int]:
    """(width, heads) of its attention; of keys and values, which may have fewer heads than queries, if it is for the cache."""
    text = _text(model)
    width = width or _first(text, WIDTHS, "token_dim")
    heads = heads or _first(text, HEADS, "num_attention_heads")
    return _of_keys(text, width // heads) if of_cache and "num_key_value_heads" in text else (width, heads)


def _of_keys(model: Mapping[str, Any], head_dim: int) -> tuple[int, int]:
    """All heads' width, and their number. Where layers differ, those of the largest head."""
    heads = own = _number(model, "num_key_value_heads", "token_dim")
    if model.get("global_head_dim") is not None:
        head_dim, heads = model["global_head_dim"], model.get("num_global_key_value_heads") or heads
    else:
        head_dim = head_dim if model.get("head_dim") is None else model["head_dim"]
        for layer in (model.get("per_layer_config") or {}).values():
            if layer.get("head_dim", head_dim) > head_dim:
                head_dim, heads = layer["head_dim"], layer.get("num_key_value_heads", own)
    return int(heads * head_dim), int(heads)


def _text(model: Mapping[str, Any]) -> Mapping[str, Any]:
    return model.get("text_config") or model


def _first(model: Mapping[str, Any], names: Sequence[str], wanted: str) -> int:
    for name in names:
        if model.get(name) is not None:
            return _number(model, name, wanted)
    raise ConfigError(f"{wanted} is not given, and the model's config has none of {', '.join(names)}.\n  Give {wanted}.")


def _number(model: Mapping[str, Any], name: str, wanted: str) -> int:
    value = model[name]
    if not isinstance(value, int):
        raise ConfigError(f"{wanted} is not given, and {name} of the model's config is no number: {value!r:.60}.\n  Give {wanted}.")
    return value
