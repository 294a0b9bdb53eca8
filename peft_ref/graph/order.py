"""The order in which a live model holds its modules, of which a checkpoint's files say nothing: their tensors are sorted by name.

Few methods ask for it: those that give a layer its part of what all share by its place among the others (`counts_layers`), so that another
order is another adapter. It is known here for the architectures below, each as the names within a model in the order of its classes; a
model with one name more is in no known order.
"""

from __future__ import annotations

from collections.abc import Iterable

_LLAMA = "model embed_tokens layers self_attn q_proj k_proj v_proj o_proj q_norm k_norm mlp gate_proj up_proj down_proj"
_LLAMA += " input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm score lm_head"
_BERT = "bert roberta embeddings word_embeddings position_embeddings token_type_embeddings encoder layer attention self query key value"
_BERT += " intermediate output dense LayerNorm pooler classifier lm_head layer_norm qa_outputs cls predictions transform decoder"
_GPT2 = "transformer wte wpe h ln_1 attn c_attn c_fc c_proj ln_2 mlp ln_f score lm_head"
ORDERS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), _LLAMA.split()),
    "gpt2": _GPT2.split(),
    "bert": _BERT.split(),
}


def in_live_order(modules: Iterable[str], model_type: str) -> tuple[str, ...] | None:
    """The names in the order of the live model; None where it is not known."""
    known = {name: place for place, name in enumerate(ORDERS.get(model_type, ()))}
    names = tuple(modules)
    if any(part not in known and not part.isdecimal() for name in names for part in name.split(".") if part):
        return None
    return tuple(sorted(names, key=lambda name: [known[part] if part in known else int(part) for part in name.split(".") if part]))
