"""BERT and its heads compute what transformers' do, and their gradients are PEFT's, in float64 to nine digits and more."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
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
from transformers.cache_utils import DynamicCache  # noqa: E402

from peft_ref.nn import Inputs, KeyValue, OutputGradient  # noqa: E402
from peft_ref.nn.loss import problem_type_of  # noqa: E402
from tests.nn.beside_hf import Pair, adapted, all_close, close, float64, live_gradients, our_gradients, pair, to_torch  # noqa: E402

SIZES = {
    "vocab_size": 17,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 9,
    "pad_token_id": None,
}
CLASSIFIER = "BertForSequenceClassification"
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {}),
    "one label of three": (CLASSIFIER, {"num_labels": 3, "type_vocab_size": 3}),
    "one label of three, said": (CLASSIFIER, {"num_labels": 3, "problem_type": "single_label_classification"}),
    "several labels": (CLASSIFIER, {"num_labels": 3, "hidden_act": "gelu_new"}),
    "several labels, said": (CLASSIFIER, {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "regression": (CLASSIFIER, {"num_labels": 1}),
    "regression, a column": (CLASSIFIER, {"num_labels": 1, "layer_norm_eps": 1e-2}),
    "regression of three": (CLASSIFIER, {"num_labels": 3, "problem_type": "regression"}),
    "tokens": ("BertForTokenClassification", {"num_labels": 4}),
    "questions": ("BertForQuestionAnswering", {"hidden_act": "relu"}),
    "masked": ("BertForMaskedLM", {}),
    "masked, untied": ("BertForMaskedLM", {"tie_word_embeddings": False}),
}
PADDING = {
    "none": None,
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]],
    "all of one": [[0, 0, 0, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]],
}


@cache
def plain(name: str) -> Pair:
    """Shared: do not change it."""
    return fresh(name)


def fresh(name: str) -> Pair:
    return pair(getattr(transformers, CONFIGS[name][0]), **{**SIZES, **CONFIGS[name][1]})


def labels(name: str, rng: Any) -> dict[str, Any]:
    if name == "bert":
        return {}
    if name == "questions":  # one answer ends behind the tokens, one begins before them
        return {"start_positions": np.asarray([1, -7, 5]), "end_positions": np.asarray([3, 2, 9])}
    if name == "tokens" or "masked" in name:
        return {"labels": np.asarray([[-100, 1, 3, -100, 0], [2, 2, 1, 0, -100], [0, -100, -100, -100, 3]])}
    if "one label" in name:
        return {"labels": np.asarray([2, 0, 1])}
    if "several" in name:
        return {"labels": np.asarray([[0.0, 1.0, 1.0], [0.0, 0.0, 0.25], [1.0, 0.0, 0.0]])}
    return {"labels": rng.normal(size=(3,) if name == "regression" else (3, CONFIGS[name][1]["num_labels"]))}


def tokens(name: str, padding: str = "none", seed: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    mask = PADDING[padding]
    given = {"input_ids": rng.integers(0, 17, (3, 5)), **labels(name, rng)}
    return given | ({} if mask is None else {"attention_mask": np.asarray(mask)})


def logits_of(output: Any) -> Any:
    """Question answering returns two."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.get("logits")


def compare(got: Any, expected: Any) -> None:
    for what, theirs in {
        "logits": logits_of(expected),
        "loss": expected.get("loss"),
        "pooled": expected.get("pooler_output", got.pooled if got.logits is not None else None),
        "hidden": expected.hidden_states[-1],
    }.items():
        ours = getattr(got, what)
        assert (ours is None) == (theirs is None), what
        if ours is not None:
            close(ours, theirs.detach() if isinstance(theirs, torch.Tensor) else theirs, what, 1e-12)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_loss(name: str, padding: str) -> None:
    both, given = plain(name), tokens(name, padding)
    with float64(), torch.no_grad():
        expected = both.live(output_hidden_states=True, **to_torch(given))
    got = both.model.forward(both.net, Inputs(**given))
    compare(got, expected)
    assert got.cache is None
    if CONFIGS[name][0] == CLASSIFIER and "problem_type" not in CONFIGS[name][1]:
        assert problem_type_of(got.logits, given["labels"]) == both.live.config.problem_type


def test_token_types_positions_and_a_mask_of_four_axes_are_taken_as_they_are() -> None:
    both, given = plain("one label of three"), tokens("one label of three")
    rng = np.random.default_rng(5)
    given |= {"position_ids": rng.integers(0, 9, (3, 5)), "attention_mask": rng.normal(size=(3, 1, 5, 5))}
    given |= {"token_type_ids": rng.integers(0, 3, (3, 5))}
    with float64(), torch.no_grad():
        expected = both.live(output_hidden_states=True, **to_torch(given))
    compare(both.model.forward(both.net, Inputs(**given)), expected)


EVERY = ["query", "key", "value", "dense"]
ADAPTERS: dict[str, Any] = {
    "lora": lambda **task: peft.LoraConfig(r=3, lora_alpha=5, target_modules=EVERY, **task),
    "lora, all linear": lambda **task: peft.LoraConfig(r=2, target_modules="all-linear", use_rslora=True, **task),
    "lora on embeddings": lambda **task: peft.LoraConfig(
        r=2, target_modules=["word_embeddings", "position_embeddings", "token_type_embeddings"], **task
    ),
    "dora": lambda **task: peft.LoraConfig(
        r=2, use_dora=True, target_modules=["word_embeddings", "position_embeddings", "token_type_embeddings", *EVERY], **task
    ),
    "loha": lambda **task: peft.LoHaConfig(r=2, alpha=3, target_modules=EVERY, **task),
    "ia3": lambda **task: peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"], **task),
    "adalora": lambda **task: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=EVERY, **task),
}
TASKS = {CLASSIFIER: "SEQ_CLS", "BertForTokenClassification": "TOKEN_CLS", "BertForQuestionAnswering": "QUESTION_ANS"}
PLACED = [("one label of three", adapter) for adapter in ADAPTERS]
PLACED += [(name, "lora") for name in ("several labels", "regression", "tokens", "questions", "masked", "masked, untied")]
PLACED += [("masked", "lora on embeddings"), ("questions", "dora"), ("tokens", "ia3")]


@pytest.mark.parametrize(("name", "adapter"), PLACED)
def test_every_adapter_gradient_and_the_heads(name: str, adapter: str, tmp_path: Path) -> None:
    """With a task type PEFT trains the head whole, and saves it."""
    task = TASKS.get(CONFIGS[name][0])
    both = adapted(fresh(name), ADAPTERS[adapter](**({} if task is None else {"task_type": task})), tmp_path)
    given = tokens(name, "right")
    given["token_type_ids"] = np.random.default_rng(6).integers(0, 2, (3, 5))
    with float64():
        expected = both.inner(output_hidden_states=True, **to_torch(given))
        expected.loss.backward()
    got = both.model.vjp(both.net, Inputs(**given), OutputGradient(loss=1.0))
    compare(got.output, expected)
    all_close(our_gradients(both, got.net), live_gradients(both))
    head = {"questions": "qa_outputs", "masked": None, "masked, untied": None}.get(name, "classifier")
    assert both.net.trainable == (set() if head is None else {f"{head}.weight", f"{head}.bias"})
    without = both.model.forward(replace(both.net, adapters={}), Inputs(**given))
    assert np.max(np.abs(without.logits - got.output.logits)) > 1e-3, "the adapter does nothing: the test sees nothing"


@pytest.mark.parametrize("padding", ["none", "right", "all of one"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_for_every_base_parameter_and_the_embeddings(name: str, padding: str) -> None:
    """Of all that the model returns at once, each output with a gradient of its own."""
    both, given = plain(name), tokens(name, padding)
    rng = np.random.default_rng(7)
    given |= {"token_type_ids": rng.integers(0, 2, (3, 5)), "inputs_embeds": rng.normal(size=(3, 5, 12))}
    del given["input_ids"]
    d = OutputGradient(hidden=rng.normal(size=(3, 5, 12)))
    if name == "bert":
        d = replace(d, pooled=rng.normal(size=(3, 12)))
    with float64():
        embeds = torch.tensor(given.pop("inputs_embeds"), requires_grad=True)
        both.live.zero_grad()
        expected = both.live(inputs_embeds=embeds, output_hidden_states=True, **to_torch(given))
        total = torch.sum(torch.tensor(d.hidden) * expected.hidden_states[-1])
        if name == "bert":
            total = total + torch.sum(torch.tensor(d.pooled) * expected.pooler_output)
        else:
            logits = logits_of(expected)
            d = replace(d, loss=1.5, logits=rng.normal(size=tuple(logits.shape)))
            total = total + 1.5 * expected.loss + torch.sum(torch.tensor(d.logits) * logits)
        total.backward()
    net = replace(both.net, trainable=frozenset(both.net.weights))
    got = both.model.vjp(net, Inputs(inputs_embeds=embeds.detach().numpy(), **given), d)
    compare(got.output, expected)
    close(got.inputs_embeds, embeds.grad, "inputs_embeds")
    grads = {n: p.grad.numpy() for n, p in both.live.named_parameters() if p.grad is not None}
    all_close(dict(got.net.weights), grads)
    # No token was looked up; and where nothing ties the head to the table, HF leaves a bias that nobody reads.
    table = f"{both.model.embedding}.weight"  # type: ignore[attr-defined]
    assert net.weights.keys() - grads.keys() == {"masked": set(), "masked, untied": {table, "cls.predictions.bias"}}.get(name, {table})


def test_a_prefix_before_the_bare_encoder() -> None:
    """The one class where PEFT's prefix tuning runs: positions go on behind the prefix, and its places want a mask."""
    both, rng = plain("bert"), np.random.default_rng(8)
    prefix = [rng.normal(size=(3, 3, 2, 4)) for _ in range(4)]
    ids, mask = rng.integers(0, 17, (3, 5)), np.concat([np.ones((3, 2), dtype=int), np.asarray(PADDING["right"])], axis=1)
    d = OutputGradient(hidden=rng.normal(size=(3, 5, 12)), pooled=rng.normal(size=(3, 12)))
    with float64():
        leaves, front = [torch.tensor(a, requires_grad=True) for a in prefix], DynamicCache()
        for layer in range(2):
            front.update(leaves[2 * layer], leaves[2 * layer + 1], layer)
        both.live.zero_grad()
        expected = both.live(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), cache=front, output_hidden_states=True)
        (torch.sum(torch.tensor(d.hidden) * expected[0]) + torch.sum(torch.tensor(d.pooled) * expected.pooler_output)).backward()
    past = (KeyValue(*prefix[:2]), KeyValue(*prefix[2:]))
    net = replace(both.net, trainable=frozenset(both.net.weights))
    got = both.model.vjp(net, Inputs(input_ids=ids, attention_mask=mask, past=past), d)
    compare(got.output, expected)
    assert got.past is not None
    for mine, leaf in zip([a for kv in got.past for a in kv], leaves, strict=True):
        close(mine, leaf.grad, "prefix")
    all_close(dict(got.net.weights), {n: p.grad.numpy() for n, p in both.live.named_parameters()})


def test_torch_withholds_the_gradient_of_the_padding_tokens_row_and_of_nothing_else(tmp_path: Path) -> None:
    """Question answering without a mask: the padding token 0 has a gradient, in the word table and in LoRA's A on it."""
    plain_pair = pair(transformers.BertForQuestionAnswering, **{**SIZES, "pad_token_id": 0})
    given = tokens("questions")
    given["input_ids"][:, 3:] = 0
    both = adapted(plain_pair, peft.LoraConfig(r=2, target_modules=["word_embeddings"]), tmp_path)
    with float64():
        both.inner(**to_torch(given)).loss.backward()
    got = both.model.vjp(both.net, Inputs(**given), OutputGradient(loss=1.0))
    ours, theirs = our_gradients(both, got.net), live_gradients(both)
    (A,) = (name for name in ours if name.endswith("lora_embedding_A"))
    assert np.max(np.abs(ours[A][:, 0])) > 1e-3
    assert not np.any(theirs[A][:, 0])
    ours[A] = np.concat([np.zeros((2, 1)), ours[A][:, 1:]], axis=1)
    all_close(ours, theirs)
