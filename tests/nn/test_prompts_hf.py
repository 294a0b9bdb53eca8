"""Prompts put before GPT-2 and BERT do what PEFT's do, and their tensors have PEFT's gradients: `splice` is all that a model needs."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.hf

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from peft_ref import splice  # noqa: E402
from peft_ref.errors import ConfigError  # noqa: E402
from peft_ref.files.adapter import load_adapter  # noqa: E402
from peft_ref.files.keys import PREFIX  # noqa: E402
from peft_ref.nn import Inputs, KeyValue, ModelGradients, Net, OutputGradient  # noqa: E402
from peft_ref.prompts import EMBEDDING, Context, Prompt  # noqa: E402
from tests.nn.beside_hf import Pair, all_close, close, float64, pair, scatter, to_torch  # noqa: E402

GPT2 = {"vocab_size": 17, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 9, "pad_token_id": None}
BERT = {
    "vocab_size": 17,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 9,
    "pad_token_id": None,
}
MASK = np.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
NEXT = np.asarray([[3, 1, 4, -100, -100], [1, 5, 9, 2, 6], [5, 3, -100, 8, -100]])
TYPES = np.asarray([[0, 0, 1, 1, 1], [0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
# The class, its sizes, its task, and what its example has beside ids and mask
MODELS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2, "CAUSAL_LM", {"labels": NEXT}),
    "bert": ("BertModel", BERT, "FEATURE_EXTRACTION", {}),
    "classifier": (
        "BertForSequenceClassification",
        {**BERT, "num_labels": 3},
        "SEQ_CLS",
        {"labels": np.asarray([2, 0, 1]), "token_type_ids": TYPES},
    ),
    "questions": (
        "BertForQuestionAnswering",
        BERT,
        "QUESTION_ANS",
        {"start_positions": np.asarray([1, 0, 6]), "end_positions": np.asarray([3, 9, 6])},  # PEFT loses token types here
    ),
}
PROMPTS = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}


def prompted(name: str, prompt: str, folder: Path) -> tuple[Pair, Prompt, Any, Net]:
    """PEFT's model, and ours with what PEFT saved."""
    cls, sizes, task, _ = MODELS[name]
    both = pair(getattr(transformers, cls), **sizes)
    with float64(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = peft.get_peft_model(both.live, PROMPTS[prompt](num_virtual_tokens=2, task_type=task)).eval()
        scatter(live, 2)
        live.save_pretrained(folder)
    read = load_adapter(folder)
    method = read.config.method
    assert isinstance(method, Prompt)
    whole = {key.removeprefix(PREFIX).removeprefix("base_model."): w for key, w in read.modules_to_save.items()}
    assert whole.keys() <= both.net.weights.keys()
    net = replace(both.net, weights={**both.net.weights, **whole}, trainable=frozenset(whole))
    return both._replace(live=live), method, read.prompt, net


def ours(
    both: Pair, method: Prompt, tensors: Any, net: Net, task: str, given: dict[str, Any], d: OutputGradient
) -> tuple[ModelGradients, Any]:
    """The gradients of the model, and of the prompt's tensors."""
    embeddings = net.apply(both.model.embedding, given["input_ids"])  # type: ignore[attr-defined]
    shared = {k: v for k, v in given.items() if k in splice.Inputs._fields}
    inputs = splice.Inputs(embeddings=embeddings, **shared)
    rows = method.prompt(tensors, Context(batch=3))
    spliced = splice.splice(method, rows, inputs, task)
    past = None if spliced.past_key_values is None else tuple(KeyValue(*layer) for layer in spliced.past_key_values)
    got = both.model.vjp(
        net,
        Inputs(
            inputs_embeds=spliced.embeddings,
            attention_mask=spliced.attention_mask,
            position_ids=spliced.position_ids,
            token_type_ids=spliced.token_type_ids,
            labels=spliced.labels,
            past=past,
            **{k: v for k, v in given.items() if k.endswith("_positions")},
        ),
        d,
    )
    keys_values = None if got.past is None else np.stack([np.stack(kv) for kv in got.past])
    back = splice.splice_vjp(method, rows, inputs, task, inputs._replace(embeddings=got.inputs_embeds, past_key_values=keys_values))
    return got, method.prompt_vjp(tensors, Context(batch=3), back.prompt)


@pytest.mark.parametrize(("name", "prompt"), [(name, "prompt") for name in MODELS] + [("gpt2", "prefix"), ("bert", "prefix")])
def test_a_prompt_does_what_pefts_does_and_has_its_gradient(name: str, prompt: str, tmp_path: Path) -> None:
    both, method, tensors, net = prompted(name, prompt, tmp_path)
    given = {"input_ids": np.random.default_rng(3).integers(0, 17, (3, 5)), "attention_mask": MASK, **MODELS[name][3]}
    d = OutputGradient(loss=1.0)
    with float64(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = both.live(**to_torch(given))
        number = expected.get("loss")
        if number is None:
            d = OutputGradient(hidden=np.random.default_rng(4).normal(size=tuple(expected[0].shape)))
            number = torch.sum(torch.tensor(d.hidden) * expected[0])
        number.backward()
    got, of_prompt = ours(both, method, tensors, net, MODELS[name][2], given, d)
    if name == "bert":
        close(got.output.hidden, expected[0].detach(), "hidden", 1e-12)
        close(got.output.pooled, expected[1].detach(), "pooled", 1e-12)
    else:
        close(got.output.loss, expected.loss.detach(), "loss", 1e-12)
    close(of_prompt[EMBEDDING], both.live.prompt_encoder["default"].embedding.weight.grad, "the prompt")
    live = {n.replace(".modules_to_save.default", "").removeprefix("base_model."): p.grad for n, p in both.live.named_parameters()}
    all_close(dict(got.net.weights), {n: live[n] for n in net.trainable})


@pytest.mark.parametrize("name", ["classifier", "questions"])
def test_a_prefix_is_refused_where_peft_refuses_it(name: str, tmp_path: Path) -> None:
    both, method, tensors, net = prompted(name, "prefix", tmp_path)
    given = {"input_ids": np.ones((3, 5), dtype=int), "attention_mask": MASK, **MODELS[name][3]}
    with pytest.raises(ValueError, match="does not support past key values"):
        both.live(**to_torch(given))
    with pytest.raises(ConfigError, match="no prefix tuning here"):
        ours(both, method, tensors, net, MODELS[name][2], given, OutputGradient(loss=1.0))
