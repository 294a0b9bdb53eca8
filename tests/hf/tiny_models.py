"""Tiny transformers models from configurations, and what a model under PEFT receives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t

VOCABULARY, DIM = 11, 8
SIZES = {"vocab_size": VOCABULARY, "hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _bert() -> Any:
    return t.BertConfig(**SIZES, **NO_DROPOUT, max_position_embeddings=24)


def _gpt2() -> Any:
    return t.GPT2Config(vocab_size=VOCABULARY, n_embd=DIM, n_layer=2, n_head=2, n_positions=24, num_labels=2, **SPECIAL)


def _llama() -> Any:
    return t.LlamaConfig(**SIZES, **SPECIAL, num_key_value_heads=1, max_position_embeddings=24)


def _t5() -> Any:
    sizes = {"vocab_size": VOCABULARY, "d_model": DIM, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}
    return t.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, dropout_rate=0.0)


def _gemma3() -> Any:
    return t.Gemma3TextConfig(**SIZES, **SPECIAL, num_key_value_heads=1, head_dim=4, max_position_embeddings=24)


MODELS: dict[str, Callable[[], Any]] = {
    "CAUSAL_LM": lambda: t.LlamaForCausalLM(_llama()),
    "gpt2": lambda: t.GPT2LMHeadModel(_gpt2()),
    "gemma3": lambda: t.Gemma3ForCausalLM(_gemma3()),
    "gpt2-classifier": lambda: t.GPT2ForSequenceClassification(_gpt2()),
    "SEQ_CLS": lambda: t.BertForSequenceClassification(_bert()),
    "TOKEN_CLS": lambda: t.BertForTokenClassification(_bert()),
    "QUESTION_ANS": lambda: t.BertForQuestionAnswering(_bert()),
    "FEATURE_EXTRACTION": lambda: t.BertModel(_bert()),
    "SEQ_2_SEQ_LM": lambda: t.T5ForConditionalGeneration(_t5()),
}


def tiny(name: str) -> Any:
    """A model in inference, by task or by name, in torch's default dtype."""
    return MODELS[name]().eval()


def received(model: Any, **inputs: Any) -> dict[str, Any]:
    """The tensors and other keyword arguments that the model under PEFT is called with; it is not run."""
    seen: dict[str, Any] = {}

    def note(*args: Any, **kwargs: Any) -> None:
        assert not args
        seen.update({name: value for name, value in kwargs.items() if value is not None})

    ran, model.base_model.forward = model.base_model.forward, note
    try:
        model(**inputs)
    finally:
        model.base_model.forward = ran
    return seen


def as_numpy(value: Any) -> Any:
    return value.detach().numpy() if isinstance(value, torch.Tensor) else value
