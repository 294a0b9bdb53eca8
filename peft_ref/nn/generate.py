"""Tokens one after the other: the model's own continuation of a batch of rows.

    z = logits at the last place      next = argmax z,   or drawn from softmax(warp(z))

    warp     z / temperature;  all but the top_k largest are -inf;  so are, the smallest first, those that sum to 1 - top_p or less
    draw     the first token whose cumulative probability exceeds u,  u uniform in [0, 1)

Rows are padded on the left, where attention_mask is 0. A row that has said `eos` goes on with `pad`. With a cache every step runs the new
token alone, without one everything; the tokens are the same.

HF      generate() of transformers, with its positions: counted over the tokens that are not padding; behind a prompt of embeddings, as
        PEFT has it, simply from 0, padding counted in. PEFT's generate puts nothing before an encoder-decoder's decoder but a prefix, so
        a multitask prompt, which was trained there too, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias, final

import numpy as np

from peft_ref.arrays import Array, namespace, to, zeros_like
from peft_ref.errors import ConfigError, ShapeError
from peft_ref.nn.encoder_decoder import EncoderDecoder
from peft_ref.nn.functions import softmax
from peft_ref.nn.model import Inputs, Model, Output
from peft_ref.nn.net import Net
from peft_ref.nn.prompted import with_prompt
from peft_ref.prompts import Prompt
from peft_ref.splice import CAUSAL, SEQ_2_SEQ

Choice: TypeAlias = Callable[[Array, int], Array]  # the logits (batch, vocabulary) and the number of the step -> tokens (batch,)


class Front(NamedTuple):
    """What goes before the rows: a method's prompt (batch, rows, columns)."""

    method: Prompt
    prompt: Array


@final
@dataclass(frozen=True, kw_only=True)
class Sampling:
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 < self.top_p <= 1 or (self.top_k is not None and self.top_k < 1):
            raise ConfigError(
                f"{self}: temperature above 0, top_k of 1 and more, top_p above 0 and at most 1 (transformers refuses it too)."
            )


def warp(logits: Array, sampling: Sampling) -> Array:
    """The logits (batch, vocabulary), -inf where a token is out of the question."""
    xp = namespace(logits)
    z = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < z.shape[1]:
        least = xp.sort(z, axis=1)[:, z.shape[1] - sampling.top_k :][:, :1]
        z = xp.where(z < least, _never(z), z)
    if sampling.top_p < 1:
        order = xp.argsort(z, axis=1)
        behind = xp.cumulative_sum(softmax(xp.sort(z, axis=1)), axis=1) <= 1 - sampling.top_p
        removed = xp.sum(xp.astype(behind[:, :-1], order.dtype), axis=1, keepdims=True)  # the smallest ones; one always stays
        z = xp.where(xp.argsort(order, axis=1) < removed, _never(z), z)
    return z


def _never(z: Array) -> Array:
    return zeros_like(tuple(z.shape), z) - float("inf")


def greedy(logits: Array, step: int) -> Array:
    return namespace(logits).argmax(logits, axis=1)


def draw(logits: Array, sampling: Sampling, u: Array) -> Array:
    """A token for every row, given u (batch,) in [0, 1)."""
    xp = namespace(logits)
    below = xp.cumulative_sum(softmax(warp(logits, sampling)), axis=1)
    whole = below[:, -1:]
    passed = (below <= xp.expand_dims(u, axis=1) * whole) & (below < whole)
    return xp.sum(xp.astype(passed, xp.int64), axis=1)


def sampler(sampling: Sampling, rng: np.random.Generator) -> Choice:
    return lambda logits, step: draw(logits, sampling, to(rng.random(logits.shape[0]), logits))


def replayed(sampling: Sampling, uniforms: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> Choice:
    """A sampler whose uniforms (steps, batch) are given."""
    return lambda logits, step: draw(logits, sampling, to(uniforms[step], logits))


def generate(
    model: Model,
    net: Net,
    ids: Array,
    *,
    new_tokens: int,
    attention_mask: Array | None = None,
    choose: Choice = greedy,
    eos: Sequence[int] = (),
    pad: int | None = None,
    front: Front | None = None,
    use_cache: bool = True,
) -> Array:
    """The rows with what follows them, (batch, T + new tokens) for ids (batch, T), fewer where all rows are through.

    Of an encoder-decoder: the decoder's tokens, its start token first.
    """
    if new_tokens < 1 or len(ids.shape) != 2:
        raise ShapeError(f"ids {tuple(ids.shape)} and new_tokens={new_tokens}: rows (batch, T), and at least one new token, are expected.")
    xp = namespace(ids)
    rows = _Rows(model, net, ids, zeros_like(tuple(ids.shape), ids) + 1 if attention_mask is None else attention_mask, front)
    said = rows.start()
    filler = zeros_like((ids.shape[0],), ids) + (pad if pad is not None else eos[0] if eos else 0)
    going = filler == filler
    call, output = rows.whole(said), None
    for step in range(new_tokens):
        if step:
            call = rows.next(call, output, said[:, -1:]) if use_cache and output is not None else rows.whole(said)
        output = model.forward(net, call)
        if output.logits is None:
            raise ConfigError(f"{type(model).__name__} has no logits to take a next token from.\n  Take a language model.")
        chosen = xp.astype(choose(output.logits[:, -1, :], step), ids.dtype)
        chosen = xp.where(going, chosen, filler)
        said = xp.concat([said, xp.expand_dims(chosen, axis=1)], axis=1)
        for end in eos:
            going = going & (chosen != end)
        if eos and not bool(xp.any(going)):
            break
    return said


class _Rows(NamedTuple):
    """The rows that are gone on with, and what the model is called with for them."""

    model: Model
    net: Net
    ids: Array
    mask: Array
    front: Front | None

    def start(self) -> Array:
        """The tokens said before the first is chosen."""
        if not isinstance(self.model, EncoderDecoder):
            return self.ids
        if self.front is not None and self.front.method.peft_type == "MULTITASK_PROMPT_TUNING":
            raise ConfigError("PEFT generates with half of a multitask prompt, which was trained before the decoder's tokens too: refused.")
        return self.model.shift_right(self.ids[:, :1])

    def whole(self, said: Array) -> Inputs:
        """The call that runs everything that was said."""
        task = SEQ_2_SEQ if isinstance(self.model, EncoderDecoder) else CAUSAL
        if task == SEQ_2_SEQ:
            inputs = Inputs(input_ids=self.ids, attention_mask=self.mask, decoder_input_ids=said)
        else:
            mask = _longer(self.mask, said.shape[1] - self.mask.shape[1])
            inputs = Inputs(input_ids=said, attention_mask=mask, position_ids=_counted(mask))
        if self.front is None:
            return inputs
        called = with_prompt(self.model, self.net, *self.front, inputs, task)
        return replace(called, decoder_input_ids=said, decoder_inputs_embeds=None) if task == SEQ_2_SEQ else called

    def next(self, before: Inputs, output: Output, last: Array) -> Inputs:
        """The call that runs one token behind the call `before`, which returned `output`."""
        if isinstance(self.model, EncoderDecoder):
            mask = before.attention_mask
            return Inputs(attention_mask=mask, decoder_input_ids=last, past=output.cache, cross=output.cross)
        positions = None if before.position_ids is None else before.position_ids[:, -1:] + 1
        return Inputs(input_ids=last, attention_mask=_longer(before.attention_mask, 1), position_ids=positions, past=output.cache)


def _longer(mask: Array, n: int) -> Array:
    return mask if n == 0 else namespace(mask).concat([mask, zeros_like((mask.shape[0], n), mask) + 1], axis=1)


def _counted(mask: Array) -> Array:
    """The positions of tokens: how many that are not padding stand before. Padding is at 0."""
    xp = namespace(mask)
    return xp.clip(xp.cumulative_sum(mask, axis=1) - 1, 0, mask.shape[1]) * mask
