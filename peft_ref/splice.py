"""Where a prompt goes: what a model receives instead of its inputs.

    place          embeddings             attention mask       labels                 positions          token types
    "embeddings"   [prompt; x]            ones in front        -100 in front (1)      left out           zeros in front (2)
    "cache"        x                      ones in front        as they are            moved on by n (3)  as they are (2)

n is num_virtual_tokens. (1) of a causal language model; other tasks' labels stay.  (2) for classification of sequences and of tokens;
every other task drops them.  (3) but in question answering, which drops them.  A mask, labels, positions or types that are not given
stay so.

An encoder-decoder ("SEQ_2_SEQ_LM") has two of everything.
    prompt and P-tuning   act on the encoder alone: its embeddings and its mask. Half of their rows are never used
    multitask             the first n rows go before the encoder's embeddings, the others before the decoder's, which get ones in their mask
                          and -100 before their labels. With one submodule the decoder's embeddings are not passed on at all
    "cache"               acts on the decoder's self-attention: ones in its mask. The encoder knows nothing of it

CPT's virtual tokens are words: their labels count where their type says so, the input's too, and each has a weight in the loss
(`CPT.counted`). Without labels it goes before the embeddings like every other prompt.

HF      PeftModelFor...'s forward. A PeftModel of any other task type, or none, never uses its prompt, without a word: refused here.
        Where a configuration gives two submodules to a task that has one, all rows go before the embeddings, and mask and labels, which
        grow by n, are too short: a model that gets them raises.
        PEFT does not move the start and end positions of question answering on, and token classification's labels stay as short as they
        were, so that the loss of a model that gets them raises.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from peft_ref.arrays import Array, namespace, zeros_like
from peft_ref.errors import ConfigError, ShapeError
from peft_ref.prompts import IGNORED, Prompt, TypedPrompt

CAUSAL, SEQ_2_SEQ, ANSWERING = "CAUSAL_LM", "SEQ_2_SEQ_LM", "QUESTION_ANS"
WITH_TOKEN_TYPES = ("SEQ_CLS", "TOKEN_CLS")
TASKS = (CAUSAL, SEQ_2_SEQ, *WITH_TOKEN_TYPES, ANSWERING, "FEATURE_EXTRACTION")


class Inputs(NamedTuple):
    """What a model is given: the embeddings (batch, tokens, dim) of its input, and beside them (batch, tokens) integers."""

    embeddings: Array
    attention_mask: Array | None = None
    labels: Array | None = None
    position_ids: Array | None = None
    token_type_ids: Array | None = None
    decoder_embeddings: Array | None = None
    decoder_attention_mask: Array | None = None
    past_key_values: Array | None = None  # (layers, 2, batch, heads, n, head_dim): only `splice` makes them
    input_type_mask: Array | None = None  # CPT's types of the input. No model receives them
    loss_weights: Array | None = None  # (batch, n + tokens): only `splice` makes them, for the loss of CPT


class InputGradients(NamedTuple):
    prompt: Array
    embeddings: Array
    decoder_embeddings: Array | None = None


def splice(method: Prompt, prompt: Array, inputs: Inputs, task_type: str) -> Inputs:
    """The inputs with the prompt (batch, rows, columns) in its place."""
    _check(method, prompt, inputs, task_type)
    n, types = method.size("num_virtual_tokens"), inputs.token_type_ids if task_type in WITH_TOKEN_TYPES else None
    if method.place == "cache":
        positions = None if inputs.position_ids is None or task_type == ANSWERING else inputs.position_ids + n
        spliced = inputs._replace(position_ids=positions, token_type_ids=types, past_key_values=key_values(method, prompt))
        if task_type == SEQ_2_SEQ:
            return spliced._replace(decoder_attention_mask=_before(1, n, inputs.decoder_attention_mask))
        return spliced._replace(attention_mask=_before(1, n, inputs.attention_mask))
    spliced = inputs._replace(
        embeddings=_joined(prompt[:, :n, :] if task_type == SEQ_2_SEQ else prompt, inputs.embeddings),
        attention_mask=_before(1, n, inputs.attention_mask),
        position_ids=None,
        token_type_ids=_before(0, n, types),
    )
    if isinstance(method, TypedPrompt):
        if inputs.labels is None:
            return spliced._replace(input_type_mask=None)
        counted = method.counted(inputs.labels, inputs.input_type_mask, inputs.embeddings)
        return spliced._replace(labels=counted.labels, input_type_mask=None, loss_weights=counted.weights)
    if task_type == CAUSAL:
        return spliced._replace(labels=_before(IGNORED, n, inputs.labels))
    if not _on_both_sides(method, task_type):
        return spliced
    spliced = spliced._replace(decoder_attention_mask=_before(1, n, inputs.decoder_attention_mask))
    if method.size("num_transformer_submodules") == 1:
        return spliced._replace(decoder_embeddings=None)
    return spliced._replace(
        labels=_before(IGNORED, n, inputs.labels),
        decoder_embeddings=None if inputs.decoder_embeddings is None else _joined(prompt[:, n:, :], inputs.decoder_embeddings),
    )


def splice_vjp(method: Prompt, prompt: Array, inputs: Inputs, task_type: str, d: Inputs) -> InputGradients:
    """The gradients of prompt and embeddings, given in `d` those of the embeddings, or of the keys and values, that `splice` returned."""
    _check(method, prompt, inputs, task_type)
    if method.place == "cache":
        return InputGradients(key_values_vjp(method, prompt, d.past_key_values), d.embeddings, d.decoder_embeddings)
    xp, rows = namespace(prompt), prompt.shape[1]
    n = method.size("num_virtual_tokens") if task_type == SEQ_2_SEQ else rows
    parts = [d.embeddings[:, :n, :]]
    decoder = d.decoder_embeddings
    if _on_both_sides(method, task_type) and decoder is not None and rows > n:
        parts.append(decoder[:, :n, :])
        decoder = decoder[:, n:, :]
    elif rows > n:
        parts.append(zeros_like((prompt.shape[0], rows - n, prompt.shape[2]), prompt))
    return InputGradients(xp.concat(parts, axis=1), d.embeddings[:, n:, :], decoder)


def key_values(method: Prompt, prompt: Array) -> Array:
    """Keys and values of every layer: (layers, 2, batch, heads, n, head_dim), from a prompt (batch, n, layers 2 dim).

    A row is cut into 2 layers slots, a key and a value for each layer, each into heads.  With an encoder-decoder PEFT puts the row twice
    one behind the other and gives four slots to a layer, of which self-attention uses the first two: layer l gets the slots 4 l and
    4 l + 1, counted round. Of an even number of layers every second pair is used by nobody, and the others by two layers each; of an
    odd number every pair is used, in another order.
    """
    xp = namespace(prompt)
    slots = xp.permute_dims(xp.reshape(prompt, _slots(method, prompt)), (2, 0, 3, 1, 4))
    return xp.stack([xp.stack([slots[k, ...] for k in pair], axis=0) for pair in _pairs(method)], axis=0)


def key_values_vjp(method: Prompt, prompt: Array, d: Array) -> Array:
    xp = namespace(prompt)
    batch, n, count, heads, head_dim = _slots(method, prompt)
    slots: list[Any] = [zeros_like((batch, heads, n, head_dim), prompt)] * count
    for layer, pair in enumerate(_pairs(method)):
        for half, k in enumerate(pair):
            slots[k] = slots[k] + d[layer, half, ...]
    return xp.reshape(xp.permute_dims(xp.stack(slots, axis=0), (1, 3, 0, 2, 4)), prompt.shape)


def _slots(method: Prompt, prompt: Array) -> tuple[int, int, int, int, int]:
    heads, width = method.size("num_attention_heads"), method.size("token_dim")
    if width % heads:
        raise ConfigError(f"token_dim={width} is not divisible by num_attention_heads={heads}.")
    return prompt.shape[0], prompt.shape[1], 2 * method.size("num_layers"), heads, width // heads


def _pairs(method: Prompt) -> list[tuple[int, int]]:
    """Every layer's slots."""
    layers = method.size("num_layers")
    if method.size("num_transformer_submodules") == 1:
        return [(2 * l, 2 * l + 1) for l in range(layers)]
    return [(4 * l % (2 * layers), (4 * l + 1) % (2 * layers)) for l in range(layers)]


def _on_both_sides(method: Prompt, task_type: str) -> bool:
    return task_type == SEQ_2_SEQ and method.peft_type == "MULTITASK_PROMPT_TUNING"


def _joined(prompt: Array, embeddings: Array) -> Array:
    xp = namespace(embeddings)
    return xp.concat([xp.astype(prompt, embeddings.dtype), embeddings], axis=1)


def _before(value: int, n: int, array: Array | None) -> Array | None:
    """`array` (batch, tokens) with n times `value` in front."""
    if array is None:
        return None
    return namespace(array).concat([zeros_like((array.shape[0], n), array) + value, array], axis=1)


def _check(method: Prompt, prompt: Array, inputs: Inputs, task_type: str) -> None:
    name = type(method).__name__
    if task_type not in TASKS:
        raise ConfigError(
            f"{name} with task_type={task_type!r}: nothing would be put before the inputs (HF PEFT ignores the prompt there).\n"
            f"  Tasks: {', '.join(TASKS)}."
        )
    if method.only_task not in (None, task_type):
        raise ConfigError(f"{name} with task_type={task_type!r}: it is for {method.only_task} alone (HF PEFT refuses it too).")
    if inputs.input_type_mask is not None and not isinstance(method, TypedPrompt):
        raise ConfigError(f"{name}: input_type_mask is given, and its tokens have no types.\n  Leave it out: only CPT reads it.")
    expected = (inputs.embeddings.shape[0], *method.table_shape)
    if tuple(prompt.shape) != expected:
        raise ShapeError(f"{name}: the prompt is {tuple(prompt.shape)}, expected (batch, rows, columns) = {expected}.")
    if method.place == "embeddings" and inputs.embeddings.shape[2] != prompt.shape[2]:
        raise ShapeError(
            f"{name}: the prompt has token_dim={prompt.shape[2]}, the embeddings are {tuple(inputs.embeddings.shape)}."
            "\n  Both must have the model's hidden size."
        )
