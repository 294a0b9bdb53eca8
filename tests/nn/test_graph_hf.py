"""Our models as graphs are transformers' live models: the same modules, and PEFT's adapters go to the same places."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.hf

import peft  # noqa: E402
import transformers  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

from peft_ref.graph import Targets, TorchGraph, match  # noqa: E402
from peft_ref.nn import ARCHITECTURES, ModelGraph, model_of  # noqa: E402

SIZES = {"vocab_size": 17, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"vocab_size": 17, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 9}
T5 = {"vocab_size": 17, "d_model": 12, "d_kv": 5, "d_ff": 10, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SIZES),
    "llama tied, gelu": ("LlamaForCausalLM", {**SIZES, "tie_word_embeddings": True, "hidden_act": "gelu"}),
    "llama with biases": ("LlamaForCausalLM", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2 untied, wide": ("GPT2LMHeadModel", {**GPT2, "tie_word_embeddings": False, "n_inner": 10, "activation_function": "relu"}),
    "bert": ("BertModel", SIZES),
    "bert classifier": ("BertForSequenceClassification", {**SIZES, "num_labels": 3, "type_vocab_size": 4}),
    "bert tokens": ("BertForTokenClassification", {**SIZES, "num_labels": 5, "hidden_act": "gelu_new"}),
    "bert questions": ("BertForQuestionAnswering", SIZES),
    "bert masked": ("BertForMaskedLM", SIZES),
    "bert masked, untied": ("BertForMaskedLM", {**SIZES, "tie_word_embeddings": False, "hidden_act": "relu"}),
    "t5": ("T5ForConditionalGeneration", {**T5, "num_decoder_layers": 3}),
    "t5 gated": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5 gated silu": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-silu"}),
}


def live_and_ours(name: str) -> tuple[Any, ModelGraph]:
    cls = getattr(transformers, SMALL[name][0])
    live = cls(cls.config_class(**SMALL[name][1]))
    said = {**live.config.to_dict(), "architectures": [cls.__name__]}
    return live, ModelGraph(model=model_of(said), weights=dict(live.named_parameters()), model_config=said)


def test_every_architecture_is_looked_at() -> None:
    assert {cls for cls, _ in SMALL.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", SMALL)
def test_modules_parameters_ties_and_head_are_the_live_models_in_its_order(name: str) -> None:
    live, ours = live_and_ours(name)
    expected = TorchGraph(live)
    modules = [replace(module, block=None) for module in ours.modules().values()]  # torch does not tell what an attention block is
    assert modules == list(expected.modules().values())
    assert ours.tied() == expected.tied()
    assert dict(ours.parameters()) == dict(expected.parameters())
    assert (ours.output_head, ours.pretrained, ours.model_type) == (expected.output_head, expected.pretrained, expected.model_type)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_a_config_leaves_out_has_transformers_default(name: str) -> None:
    said = getattr(transformers, name).config_class().to_dict()
    assert model_of({"architectures": [name]}) == model_of({**said, "architectures": [name]})


TARGETS: dict[str, dict[str, Any]] = {
    "PEFT's own for the architecture": {},
    "all linear": {"target_modules": "all-linear"},
    "one layer": {"target_modules": ["q_proj", "c_attn", "query", "q"], "layers_to_transform": [1]},
    "head and embedding": {
        "target_modules": ["lm_head", "embed_tokens", "q_proj", "wte", "wpe", "word_embeddings", "qa_outputs", "predictions.decoder"]
    },
    "names that end alike": {"target_modules": ["dense", "mlp.c_proj", "down_proj", "wo"]},
    "regex": {
        "target_modules": r".*\.(0|1)\..*(up_proj|k_proj|c_fc|key|intermediate\.dense|wi_0|wi|EncDec.*k)",
        "exclude_modules": [r"layers.0.mlp.up_proj", "h.0.mlp.c_fc", "layer.0.attention.self.key"],
    },
    "feed-forward and tables": {
        "target_modules": ["wo", "gate_proj", "lm_head", "relative_attention_bias", "shared", "output.dense", "c_fc"]
    },
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", SMALL)
def test_an_adapter_goes_where_peft_puts_it(name: str, targets: str) -> None:
    live, ours = live_and_ours(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(live), peft.LoraConfig(**TARGETS[targets]))
    expected = {n for n, m in wrapped.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert set(match(Targets(**TARGETS[targets]), ours).modules) == expected
    assert expected
