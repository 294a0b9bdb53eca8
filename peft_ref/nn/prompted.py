"""A model with a prompt before its inputs: `splice` between the prompt's vectors and the model's `Inputs`.

prompt --splice--> inputs_embeds or past      and back: their gradients --splice_vjp--> the prompt's, and the embedding table's
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from peft_ref import splice
from peft_ref.arrays import Array
from peft_ref.errors import ConfigError
from peft_ref.nn.attention import as_cache, as_cache_vjp
from peft_ref.nn.blocks import Blocks
from peft_ref.nn.encoder_decoder import DECODER, EncoderDecoder
from peft_ref.nn.model import Inputs, Model, ModelGradients
from peft_ref.nn.net import Gradients, Net
from peft_ref.prompts import Prompt


class PromptGradients(NamedTuple):
    prompt: Array
    net: Gradients  # of the tables that looked the tokens up


def with_prompt(model: Model, net: Net, method: Prompt, prompt: Array, inputs: Inputs, task_type: str) -> Inputs:
    """What the model receives for `inputs` with `prompt` (batch, rows, columns) in its place."""
    spliced = splice.splice(method, prompt, _embedded(model, net, inputs), task_type)
    key_values = spliced.past_key_values
    return replace(
        inputs,
        input_ids=None,
        inputs_embeds=spliced.embeddings,
        attention_mask=spliced.attention_mask,
        labels=spliced.labels,
        label_weights=spliced.loss_weights,
        input_type_mask=None,
        position_ids=spliced.position_ids,
        token_type_ids=spliced.token_type_ids,
        decoder_input_ids=None if spliced.decoder_embeddings is not None else inputs.decoder_input_ids,
        decoder_inputs_embeds=spliced.decoder_embeddings,
        decoder_attention_mask=spliced.decoder_attention_mask,
        past=inputs.past if key_values is None else as_cache(key_values, _layers(model)),
    )


def with_prompt_vjp(
    model: Model, net: Net, method: Prompt, prompt: Array, inputs: Inputs, task_type: str, d: ModelGradients
) -> PromptGradients:
    """The gradients of `with_prompt`, given what the model's vjp says of the inputs that it returned."""
    embedded, of_cache = _embedded(model, net, inputs), None
    if method.place == "cache":
        if d.past is None:
            raise ConfigError("the model has no gradient of keys and values in front, so a prefix has none either.")
        of_cache = as_cache_vjp(splice.key_values(method, prompt), _layers(model), d.past)
    of_inputs = splice.Inputs(d.inputs_embeds, decoder_embeddings=d.decoder_inputs_embeds, past_key_values=of_cache)
    back = splice.splice_vjp(method, prompt, embedded, task_type, of_inputs)
    gradients = Gradients()
    for name, ids, given in _tables(model, inputs):
        dx = back.embeddings if given == "inputs" else back.decoder_embeddings
        if ids is not None and dx is not None:
            gradients = gradients + net.vjp(name, ids, dx)[1]
    return PromptGradients(back.prompt, gradients)


def word_table(model: Model) -> str:
    """The module that looks a model's words up, an encoder-decoder's on the encoder's side."""
    if isinstance(model, EncoderDecoder):
        return model.encoder_embedding
    if not isinstance(model, Blocks):
        raise ConfigError(f"{type(model).__name__} has no words before which a prompt could go.")
    return model.embedding


def _embedded(model: Model, net: Net, inputs: Inputs) -> splice.Inputs:
    found = {side: None if ids is None else net.apply(name, ids) for name, ids, side in _tables(model, inputs)}
    embeddings = found["inputs"] if inputs.inputs_embeds is None else inputs.inputs_embeds
    if embeddings is None:
        raise ConfigError("a prompt goes before tokens, and there are neither input_ids nor inputs_embeds.")
    return splice.Inputs(
        embeddings=embeddings,
        attention_mask=inputs.attention_mask,
        labels=inputs.labels,
        position_ids=inputs.position_ids,
        token_type_ids=inputs.token_type_ids,
        decoder_embeddings=found.get("decoder") if inputs.decoder_inputs_embeds is None else inputs.decoder_inputs_embeds,
        decoder_attention_mask=inputs.decoder_attention_mask,
        input_type_mask=inputs.input_type_mask,
    )


def _tables(model: Model, inputs: Inputs) -> list[tuple[str, Array | None, str]]:
    """Every module that looks tokens up, the tokens, and whose they are."""
    words = (word_table(model), inputs.input_ids, "inputs")
    if not isinstance(model, EncoderDecoder):
        return [words]
    ids = inputs.decoder_input_ids
    if ids is None and inputs.decoder_inputs_embeds is None and inputs.labels is not None:
        ids = model.shift_right(inputs.labels)
    return [words, (model.decoder_embedding, ids, "decoder")]


def _layers(model: Model) -> int:
    if isinstance(model, EncoderDecoder):
        return len(model.block_names(DECODER))
    assert isinstance(model, Blocks)
    return len(model.block_names())
