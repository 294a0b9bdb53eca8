"""Prompts in T5: what `splice` puts before its inputs does what PEFT's prompts do, and their gradients are PEFT's, in float64."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")]

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from peft_ref import splice  # noqa: E402
from peft_ref.methods import MultitaskPromptTuning, PrefixTuning, PromptTuning, PTuning  # noqa: E402
from peft_ref.nn import Inputs, ModelGradients, OutputGradient, as_cache, as_cache_vjp  # noqa: E402
from peft_ref.prompts import Context, Prompt  # noqa: E402
from tests.nn.beside_hf import Pair, all_close, close, float64, pair, scatter  # noqa: E402

S, T, VOCABULARY, WIDTH, HEADS, HEAD, TASK = 6, 5, 17, 12, 3, 2, "SEQ_2_SEQ_LM"
SIZES = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": HEAD, "d_ff": 10, "num_heads": HEADS, "decoder_start_token_id": 2}
FEW = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 5}
LAYERS = {"2 and 2": {"num_layers": 2}, "3 and 3": {"num_layers": 3}, "3 and 1": {"num_layers": 3, "num_decoder_layers": 1}}
MASKS: dict[str, Any] = {
    "none": (None, None),
    "left": ([[0, 0, 1, 1, 1, 1], [1] * 6], [[0, 0, 1, 1, 1], [1] * 5]),
    "the encoder's alone": ([[1, 1, 1, 1, 0, 0], [1] * 6], None),
    "the decoder's alone": (None, [[1, 1, 1, 1, 0], [1] * 5]),
}
N = 3  # virtual tokens


class Case(NamedTuple):
    config: Any  # PEFT's class
    method: type[Prompt]
    options: dict[str, Any]


WIDE = {"token_dim": HEADS * HEAD}  # PEFT takes d_model for the width of keys and values; T5's need not be
CASES = {
    "prompt": Case(peft.PromptTuningConfig, PromptTuning, {}),
    "p": Case(peft.PromptEncoderConfig, PTuning, {"encoder_hidden_size": 4}),
    "multitask": Case(peft.MultitaskPromptTuningConfig, MultitaskPromptTuning, {"num_tasks": 2, "num_ranks": 2}),
    "prefix": Case(peft.PrefixTuningConfig, PrefixTuning, WIDE),
    "projected prefix": Case(peft.PrefixTuningConfig, PrefixTuning, {**WIDE, "prefix_projection": True, "encoder_hidden_size": 4}),
}


class Prompted(NamedTuple):
    live: Any
    plain: Pair
    method: Prompt
    tensors: dict[str, Any]
    context: Context


@cache
def plain(layers: str) -> Pair:
    """Shared: nothing of it is trained."""
    return pair(transformers.T5ForConditionalGeneration, **SIZES, **FEW, **LAYERS[layers])


def prompted(name: str, layers: str) -> Prompted:
    """PEFT's prompt, its numbers random, and ours with the same numbers and the sizes that the model's config tells."""
    both, case = plain(layers), CASES[name]
    with float64(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = peft.get_peft_model(both.live, case.config(num_virtual_tokens=N, task_type=TASK, **case.options)).eval()
        scatter(live.prompt_encoder, 2)
    method = case.method(num_virtual_tokens=N, **case.options).sized(both.graph.config, TASK)
    tensors = {n: p.detach().numpy().copy() for n, p in live.prompt_encoder["default"].named_parameters()}
    ids = np.asarray([1, 0]) if name == "multitask" else None
    return Prompted(live, both, method, method.check(tensors), Context(batch=2, task_ids=ids))


def tokens(masks: str) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    ids, labels = rng.integers(0, VOCABULARY, (2, S)), rng.integers(0, VOCABULARY, (2, T))
    labels[0, :2] = -100
    named = zip(("attention_mask", "decoder_attention_mask"), MASKS[masks], strict=True)
    return {"input_ids": ids, "labels": labels} | {k: np.asarray(m) for k, m in named if m is not None}


def to_torch(given: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.tensor(value) for name, value in given.items()}


def embedded(p: Prompted, given: dict[str, Any]) -> splice.Inputs:
    model, net = p.plain.model, p.plain.net
    start = model.shift_right(given["labels"])
    return splice.Inputs(
        embeddings=net.apply(model.encoder_embedding, given["input_ids"]),
        decoder_embeddings=net.apply(model.decoder_embedding, start),
        **{k: v for k, v in given.items() if k != "input_ids"},
    )


def layers(p: Prompted) -> int:
    return int(p.plain.live.config.num_decoder_layers)


def for_model(p: Prompted, spliced: splice.Inputs) -> Inputs:
    return Inputs(
        inputs_embeds=spliced.embeddings,
        decoder_inputs_embeds=spliced.decoder_embeddings,
        past=None if spliced.past_key_values is None else as_cache(spliced.past_key_values, layers(p)),
        attention_mask=spliced.attention_mask,
        decoder_attention_mask=spliced.decoder_attention_mask,
        labels=spliced.labels,
    )


def back(p: Prompted, given: dict[str, Any], d: ModelGradients) -> splice.InputGradients:
    """The gradients of prompt and embeddings, from the model's."""
    prompt, inputs = p.method.prompt(p.tensors, p.context), embedded(p, given)
    spliced = splice.splice(p.method, prompt, inputs, TASK)
    of_cache = None if d.past is None else as_cache_vjp(spliced.past_key_values, layers(p), d.past)
    assert d.inputs_embeds is not None
    found = splice.Inputs(embeddings=d.inputs_embeds, decoder_embeddings=d.decoder_inputs_embeds, past_key_values=of_cache)
    return splice.splice_vjp(p.method, prompt, inputs, TASK, found)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("depth", LAYERS)
@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_the_gradients_of_the_prompt_and_of_both_embeddings(name: str, depth: str, masks: str) -> None:
    p, given = prompted(name, depth), tokens(masks)
    embeddings = embedded(p, given)
    leaves: dict[str, Any] = {}
    with float64():
        leaves["inputs_embeds"] = torch.tensor(embeddings.embeddings, requires_grad=True)
        leaves["decoder_inputs_embeds"] = torch.tensor(embeddings.decoder_embeddings, requires_grad=True)
        theirs = to_torch({k: v for k, v in given.items() if k != "input_ids"})
        tasks = {} if p.context.task_ids is None else {"task_ids": torch.tensor(p.context.task_ids)}
        expected = p.live(**leaves, **theirs, **tasks)
        expected.loss.backward()
    inputs = for_model(p, splice.splice(p.method, p.method.prompt(p.tensors, p.context), embeddings, TASK))
    got = p.plain.model.vjp(p.plain.net, inputs, OutputGradient(loss=1.0))
    close(got.output.logits, expected.logits.detach(), "logits", 1e-12)
    close(got.output.loss, expected.loss.detach(), "loss", 1e-12)

    d = back(p, given, got)
    close(d.embeddings, leaves["inputs_embeds"].grad, "inputs_embeds")
    close(d.decoder_embeddings, leaves["decoder_inputs_embeds"].grad, "decoder_inputs_embeds")
    live = {n: t.grad.numpy() for n, t in p.live.prompt_encoder["default"].named_parameters()}
    all_close(dict(p.method.prompt_vjp(p.tensors, p.context, d.prompt)), live)
    assert all(np.any(g != 0) for g in live.values())


def greedy(p: Prompted, given: dict[str, Any], length: int) -> Any:
    """The likeliest tokens one after another, behind the prompt, with a cache."""
    model, net = p.plain.model, p.plain.net
    ids = np.full((2, 1), SIZES["decoder_start_token_id"])
    prompt = p.method.prompt(p.tensors, p.context)
    inputs = splice.Inputs(net.apply(model.encoder_embedding, given["input_ids"]), given["attention_mask"])
    spliced = for_model(p, splice.splice(p.method, prompt, inputs, TASK))
    got = model.forward(net, replace(spliced, decoder_input_ids=ids))
    for _ in range(length - 1):
        ids = np.concat([ids, np.argmax(got.logits[:, -1:], axis=-1)], axis=1)
        again = Inputs(decoder_input_ids=ids[:, -1:], past=got.cache, cross=got.cross, attention_mask=spliced.attention_mask)
        got = model.forward(net, again)
    return np.concat([ids, np.argmax(got.logits[:, -1:], axis=-1)], axis=1)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_greedy_decoding_behind_a_prompt(name: str) -> None:
    """Beside PEFT's whole forward pass for every token: under transformers 5.24 its `generate` drops a prefix, of which it warns."""
    p, given = prompted(name, "2 and 2"), tokens("left")
    given = {k: v for k, v in given.items() if k in ("input_ids", "attention_mask")}
    ids = np.full((2, 1), SIZES["decoder_start_token_id"])
    with float64(), torch.no_grad():
        for _ in range(8):
            logits = p.live(**to_torch(given), decoder_input_ids=torch.tensor(ids)).logits
            ids = np.concat([ids, np.argmax(logits[:, -1:].numpy(), axis=-1)], axis=1)
        generated = p.live.generate(**to_torch(given), max_new_tokens=8, do_sample=False, eos_token_id=None).numpy()
        without = plain("2 and 2").live.generate(**to_torch(given), max_new_tokens=8, do_sample=False, eos_token_id=None).numpy()
    np.testing.assert_array_equal(greedy(p, given, 8), ids)
    assert np.any(ids != without), "the prompt does nothing: the test sees nothing"
    if name == "prompt":
        np.testing.assert_array_equal(generated, ids)
