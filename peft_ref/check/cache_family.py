"""What methods get wrong whose prompt is keys and values: how a row is cut, and what goes with them. The clauses are prefix tuning's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check.case import Answer, Case
from peft_ref.check.encoder_family import CACHE, other_cache
from peft_ref.check.mistake import Mistake, Replay, as_if, only, with_config
from peft_ref.check.oracle import answer
from peft_ref.check.prompt_family import other_splice, splice_mistakes
from peft_ref.check.prompting import PromptProblem
from peft_ref.prompts import Prompt
from peft_ref.splice import key_values

# ---- the row cut otherwise


def _row(order: Callable[[Prompt, Array], Array]) -> Replay:
    """The numbers of the prompt (batch, tokens, layers, 2, heads, head_dim) come in another order."""

    def cut(method: Prompt, prompt: Array) -> Array:
        return key_values(method, order(method, prompt).reshape(prompt.shape))

    return other_cache(cut)


def _sizes(method: Prompt, prompt: Array) -> tuple[int, int, int, int, int]:
    """batch, tokens, layers, heads, head_dim"""
    heads = method.size("num_attention_heads")
    return prompt.shape[0], prompt.shape[1], method.size("num_layers"), heads, method.size("token_dim") // heads


def _keys_first(method: Prompt, prompt: Array) -> Array:
    batch, n, layers, heads, dim = _sizes(method, prompt)
    return prompt.reshape(batch, n, 2, layers, heads * dim).transpose(0, 1, 3, 2, 4)


def _interleaved(method: Prompt, prompt: Array) -> Array:
    batch, n, layers, heads, dim = _sizes(method, prompt)
    return prompt.reshape(batch, n, 2 * layers, dim, heads).transpose(0, 1, 2, 4, 3)


def _heads_first(method: Prompt, prompt: Array) -> Array:
    batch, n, layers, heads, dim = _sizes(method, prompt)
    return prompt.reshape(batch, n, heads, 2 * layers, dim).transpose(0, 1, 3, 2, 4)


def _tokens_run_on(method: Prompt, prompt: Array) -> Array:
    """A slot's (tokens, heads head_dim) reshaped to (heads, tokens, head_dim)."""
    batch, n, layers, heads, dim = _sizes(method, prompt)
    slots = prompt.reshape(batch, n, 2 * layers, heads * dim).transpose(0, 2, 1, 3)
    return slots.reshape(batch, 2 * layers, heads, n, dim).transpose(0, 3, 1, 2, 4)


def _reshaped(method: Prompt, prompt: Array) -> Array:
    batch, n, layers, heads, dim = _sizes(method, prompt)
    return prompt.reshape(2 * layers, batch, heads, n, dim).transpose(1, 3, 0, 2, 4)


def _two_slots_on(method: Prompt, prompt: Array) -> Array:
    batch, n, layers, heads, dim = _sizes(method, prompt)
    return np.roll(prompt.reshape(batch, n, layers, 2 * heads * dim), -1, axis=2)


def _rotated(method: Prompt, prompt: Array) -> Array:
    """Keys turned as rotary positions turn them: halves of a head as pairs, base 10000, position t for token t."""
    cache = key_values(method, prompt)
    half = cache.shape[-1] // 2
    angle = np.arange(cache.shape[-2])[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle), np.sin(angle)
    keys = cache[:, 0]
    a, b = keys[..., :half], keys[..., half:]
    turned = np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return np.stack([turned, cache[:, 1]], axis=1)


def _two_sided(method: Prompt) -> bool:
    return method.size("num_transformer_submodules") == 2


def _own_slots(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "num_transformer_submodules": 1}


def _last_layer_only(case: Case) -> Answer | None:
    """The gradient of slots that two layers share, from the second of them alone."""
    config, dy = case.adapters[0].config, case.dy
    layers = config["num_layers"]
    assert dy is not None
    if config["num_transformer_submodules"] == 1 or layers % 2:
        return None
    last = np.arange(layers) >= layers // 2
    return answer(replace(case, dy=dy * last.reshape(-1, 1, 1, 1, 1, 1)))


# ---- splicing


def _unmoved(p: PromptProblem, right: Answer) -> Answer | None:
    return {**right, "position_ids": right["position_ids"] - p.method.size("num_virtual_tokens")} if "position_ids" in right else None


def _counted_anew(p: PromptProblem, right: Answer) -> Answer | None:
    if "position_ids" not in right:
        return None
    batch, tokens = right["position_ids"].shape
    return {**right, "position_ids": np.broadcast_to(np.arange(tokens) + p.method.size("num_virtual_tokens"), (batch, tokens))}


def _all_seen(p: PromptProblem, right: Answer) -> Answer | None:
    masks: Answer = {k: np.ones_like(right[k]) for k in ("attention_mask", "decoder_attention_mask") if k in right}
    return {**right, **masks} if masks else None


def _first_prompt(p: PromptProblem, right: Answer) -> Answer:
    first = right[CACHE][:, :, :1]
    return {**right, CACHE: np.broadcast_to(first, right[CACHE].shape)}


def _mask_mistakes(clause: str) -> tuple[Mistake, ...]:
    """Those of the prompts of embeddings that a cache has too."""
    alike = splice_mistakes(dict.fromkeys(("embeddings", "mask", "labels", "types"), clause))
    return tuple(m for m in alike if m.name in ("mask-behind", "mask-of-zeros"))


def row_mistakes() -> tuple[Mistake, ...]:
    """Of the way from a row to keys and values, and back."""
    return (
        Mistake(
            name="keys-and-values-swapped",
            clause="PREFIXTUNING-C4",
            sentence="a layer's first slot is taken for its values and the second for its keys",
            replay=other_cache(lambda method, prompt: key_values(method, prompt)[:, ::-1]),
        ),
        Mistake(
            name="keys-before-values",
            clause="PREFIXTUNING-C4",
            sentence="a row is read as the keys of all layers and then their values, instead of a key and a value for every layer",
            replay=_row(_keys_first),
        ),
        Mistake(
            name="values-are-keys",
            clause="PREFIXTUNING-C4",
            sentence="every layer's key slot is used for its values too",
            replay=other_cache(lambda method, prompt: key_values(method, prompt)[:, [0, 0]]),
        ),
        Mistake(
            name="layers-reversed",
            clause="PREFIXTUNING-C4",
            sentence="the first layer gets the last layer's keys and values, and so on",
            replay=other_cache(lambda method, prompt: key_values(method, prompt)[::-1]),
        ),
        Mistake(
            name="heads-interleaved",
            clause="PREFIXTUNING-C5",
            sentence="a slot is cut into (head_dim, heads) instead of (heads, head_dim)",
            replay=_row(_interleaved),
        ),
        Mistake(
            name="heads-before-layers",
            clause="PREFIXTUNING-C5",
            sentence="a row is cut into heads first and each head into layers, instead of layers first",
            replay=_row(_heads_first),
        ),
        Mistake(
            name="heads-reshaped",
            clause="PREFIXTUNING-C6",
            sentence="a slot (tokens, heads head_dim) is reshaped to (heads, tokens, head_dim) where its axes have to be exchanged",
            replay=_row(_tokens_run_on),
        ),
        Mistake(
            name="cache-reshaped",
            clause="PREFIXTUNING-C6",
            sentence="the whole prompt is reshaped to the cache's axes, where they have to be exchanged",
            replay=_row(_reshaped),
        ),
        Mistake(
            name="keys-rotated",
            clause="PREFIXTUNING-C8",
            sentence="the prefix's keys are turned by rotary positions 0, 1, ..., like keys of the input",
            replay=other_cache(_rotated),
        ),
        Mistake(
            name="own-slots",
            clause="PREFIXTUNING-C9",
            sentence="with an encoder-decoder every layer gets slots of its own, 2 l and 2 l + 1, which is not how PEFT deals them",
            replay=as_if(lambda case: with_config(case, _own_slots)),
            dialect=True,
        ),
        Mistake(
            name="cross-attention-slots",
            clause="PREFIXTUNING-C9",
            sentence="with an encoder-decoder a layer gets the slots 4 l + 2 and 4 l + 3, meant for cross-attention and dropped by PEFT",
            replay=other_cache(lambda method, prompt: key_values(method, _two_slots_on(method, prompt).reshape(prompt.shape)), _two_sided),
        ),
        Mistake(
            name="shared-slots-overwritten",
            clause="PREFIXTUNING-C15",
            sentence="slots that two layers share get the gradient of the second alone instead of the sum",
            replay=only(prompt_backward=_last_layer_only),
        ),
    )


def cache_splice_mistakes() -> tuple[Mistake, ...]:
    return (
        Mistake(
            name="positions-not-moved",
            clause="PREFIXTUNING-C12",
            sentence="given positions stay as they are instead of moving on by the number of virtual tokens",
            replay=other_splice(_unmoved),
        ),
        Mistake(
            name="positions-counted-anew",
            clause="PREFIXTUNING-C12",
            sentence="positions are counted from the number of virtual tokens on, whatever positions were given",
            replay=other_splice(_counted_anew),
        ),
        *_mask_mistakes("PREFIXTUNING-C11"),
        Mistake(
            name="padding-seen",
            clause="PREFIXTUNING-C11",
            sentence="the attention mask is made anew, ones everywhere, and the input's own zeros are lost",
            replay=other_splice(_all_seen),
        ),
        Mistake(
            name="first-prompt-for-all",
            clause="PREFIXTUNING-C7",
            sentence="every example gets the first one's keys and values",
            replay=other_splice(_first_prompt),
        ),
    )
