"""CPT and Cartridge before a tiny Llama: logits, loss, and the gradient of every tensor are those of transformers under PEFT."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.hf

import peft  # noqa: E402
import transformers  # noqa: E402

from peft_ref import CPT, Cartridge, splice  # noqa: E402
from peft_ref.nn import Inputs, KeyValue, OutputGradient  # noqa: E402
from peft_ref.prompts import Context, Prompt  # noqa: E402
from tests.nn.beside_hf import Host, Pair, all_close, close, float64, pair, scatter, to_torch  # noqa: E402

LLAMA = {
    "vocab_size": 17,
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
IDS = np.random.default_rng(3).integers(0, 17, (3, 5))
MASK = np.asarray([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
LABELS = np.asarray([[-100, -100, 4, 1, 5], [1, 5, 9, 2, 6], [-100, 3, -100, 8, 2]])
TYPES = np.asarray([[0, 0, 2, 4, 4], [2, 3, 4, 8, 8], [0, 4, 4, 8, 12]])
WORDS: dict[str, Any] = {
    "cpt_token_ids": [7, 3, 10, 5, 2, 9],
    "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 8],
    "opt_projection_epsilon": 8.0,
    "opt_projection_format_epsilon": 64.0,
    "opt_weighted_loss_type": "decay",
    "opt_loss_decay_factor": 0.75,
}


def under_peft(config: Any) -> tuple[Pair, Any, dict[str, Host]]:
    """The pair, PEFT's encoder, and its tensors; every weight of the model is trained too."""
    both = pair(transformers.LlamaForCausalLM, **LLAMA)
    with float64(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = peft.get_peft_model(both.live, config).eval()
        encoder = live.prompt_encoder["default"].double()
        scatter(encoder, 2)
        live.base_model.requires_grad_(True)
    net = replace(both.net, trainable=frozenset(both.net.weights))
    tensors = {name: p.detach().numpy().copy() for name, p in encoder.named_parameters()}
    return both._replace(live=live, net=net), encoder, tensors


def embedded(both: Pair, ids: Host) -> Any:
    return both.net.apply(both.model.embedding, ids)  # type: ignore[attr-defined]


def same_gradients(both: Pair, encoder: Any, method: Prompt, tensors: dict[str, Host], got: Any) -> None:
    """Of the model's weights, those that the input's embeddings have in the table of words included, and of the prompt's tensors."""
    live = {name.removeprefix("base_model."): p.grad for name, p in both.live.named_parameters() if p.grad is not None}
    words = "model.embed_tokens.weight"
    all_close({n: d for n, d in got.net.weights.items() if n != words}, {n: live[n] for n in both.net.trainable if n != words})
    of_words = np.zeros((LLAMA["vocab_size"], LLAMA["hidden_size"]))
    back = splice.splice_vjp(method, method.prompt(tensors, Context(3)), given_of(both, method), "CAUSAL_LM", received_gradient(got))
    np.add.at(of_words, IDS, back.embeddings)
    close(of_words, live[words], words)
    ours = method.prompt_vjp(tensors, Context(3), back.prompt)
    theirs = {n: np.zeros(tuple(p.shape)) if p.grad is None else p.grad.numpy() for n, p in encoder.named_parameters()}
    assert sum(bool(np.any(d)) for d in theirs.values()) == 1
    all_close(dict(ours), theirs)


def received_gradient(got: Any) -> splice.Inputs:
    past = None if got.past is None else np.stack([np.stack(kv) for kv in got.past])
    return splice.Inputs(got.inputs_embeds, past_key_values=past)


def given_of(both: Pair, method: Prompt) -> splice.Inputs:
    types = TYPES if isinstance(method, CPT) else None
    return splice.Inputs(embedded(both, IDS), attention_mask=MASK, labels=LABELS, input_type_mask=types)


@pytest.mark.parametrize("kind", ["decay", "none"])
def test_cpt_does_what_pefts_does_and_has_its_gradients(kind: str) -> None:
    words = {**WORDS, "opt_weighted_loss_type": kind}
    both, encoder, tensors = under_peft(peft.CPTConfig(task_type="CAUSAL_LM", **words))
    method = CPT(**words).sized(LLAMA, "CAUSAL_LM")
    with float64(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sent = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, "input_type_mask": TYPES.copy()}
        expected = both.live(**to_torch(sent))
        expected.loss.backward()
    spliced = splice.splice(method, method.prompt(tensors, Context(3)), given_of(both, method), "CAUSAL_LM")
    inputs = Inputs(
        inputs_embeds=spliced.embeddings,
        attention_mask=spliced.attention_mask,
        labels=spliced.labels,
        label_weights=spliced.loss_weights,
    )
    got = both.model.vjp(both.net, inputs, OutputGradient(loss=1.0))
    close(got.output.logits, expected.logits.detach(), "logits", 1e-12)
    close(got.output.loss, expected.loss.detach(), "loss", 1e-12)
    same_gradients(both, encoder, method, tensors, got)


@pytest.mark.parametrize("frozen", [2, 0])
def test_a_cartridge_is_a_prefix_and_has_pefts_gradients(frozen: int) -> None:
    both, encoder, tensors = under_peft(peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=frozen))
    method = Cartridge(num_virtual_tokens=4, num_frozen_tokens=frozen).sized(LLAMA, "CAUSAL_LM")
    with float64(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = both.live(**to_torch({"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}))
        expected.loss.backward()
    spliced = splice.splice(method, method.prompt(tensors, Context(3)), given_of(both, method), "CAUSAL_LM")
    inputs = Inputs(
        inputs_embeds=spliced.embeddings,
        attention_mask=spliced.attention_mask,
        labels=spliced.labels,
        past=tuple(KeyValue(*layer) for layer in spliced.past_key_values),  # type: ignore[union-attr]
    )
    got = both.model.vjp(both.net, inputs, OutputGradient(loss=1.0))
    close(got.output.logits, expected.logits.detach(), "logits", 1e-12)
    close(got.output.loss, expected.loss.detach(), "loss", 1e-12)
    same_gradients(both, encoder, method, tensors, got)
