"""One program on two sides: live PEFT on a transformers model, and peft_ref.hf on a graph with the same numbers."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import peft_ref.hf
from peft_ref.files.safetensors import open_file
from peft_ref.hf import BaseModel
from tests.nn.beside_hf import CLOSE, close, float64, pair, scatter, to_torch

SIZES = {"vocab_size": 17, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 3}
GPT2 = {"vocab_size": 17, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 9, "pad_token_id": None}
BERT = {**SIZES, "max_position_embeddings": 9, "pad_token_id": None}
T5 = {"vocab_size": 17, "d_model": 12, "d_kv": 4, "d_ff": 10, "num_heads": 3, "num_layers": 2, "decoder_start_token_id": 2}
MASK = np.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
IDS = np.random.default_rng(3).integers(0, 17, (2, 5))
NEXT = np.asarray([[3, 1, 4, -100, -100], [1, 5, 9, 2, 6]])
TYPES = np.asarray([[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]])
GIVEN = {"input_ids": IDS, "attention_mask": MASK}
# The class, its sizes, its task, what it is called with beside ids and mask, what an adapter goes to
MODELS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", SIZES, "CAUSAL_LM", {"labels": NEXT}, "q_proj"),
    "gpt2": ("GPT2LMHeadModel", GPT2, "CAUSAL_LM", {"labels": NEXT}, "c_attn"),
    "classifier": (
        "BertForSequenceClassification",
        {**BERT, "num_labels": 3},
        "SEQ_CLS",
        {"labels": np.asarray([2, 0]), "token_type_ids": TYPES},
        "query",
    ),
    "tokens": ("BertForTokenClassification", {**BERT, "num_labels": 3}, "TOKEN_CLS", {"token_type_ids": TYPES}, "query"),
    "questions": (
        "BertForQuestionAnswering",
        BERT,
        "QUESTION_ANS",
        {"start_positions": np.asarray([1, 0]), "end_positions": np.asarray([3, 4])},
        "query",
    ),
    "bert": ("BertModel", BERT, "FEATURE_EXTRACTION", {}, "query"),
    "t5": ("T5ForConditionalGeneration", T5, "SEQ_2_SEQ_LM", {"labels": NEXT}, "q"),
}
OUTPUTS = ("loss", "logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")


@contextmanager
def live() -> Iterator[None]:
    with float64(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def made(name: str) -> Any:
    cls, sizes, *_ = MODELS[name]
    return pair(getattr(transformers, cls), **sizes)


def bases(name: str) -> tuple[Any, BaseModel]:
    """A transformers model for PEFT to change, and ours."""
    both = made(name)
    return copy.deepcopy(both.live), BaseModel(both.graph)


def called(name: str, **more: Any) -> dict[str, Any]:
    return {**GIVEN, **MODELS[name][3], **more}


def same_output(theirs: Any, ours: Any, given: dict[str, Any], what: str = "", rounding: float = CLOSE) -> None:
    with live(), torch.no_grad():
        expected = theirs(**to_torch(given))
    got = ours(**given)
    seen = [key for key in OUTPUTS if expected.get(key) is not None]
    assert seen == [key for key in OUTPUTS if getattr(got, key) is not None], what
    for key in seen:
        close(getattr(got, key), expected[key], f"{key} {what}", rounding)


def tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.detach().numpy().copy() for key, value in state.items()}


def as_one_set(text: str) -> dict[str, Any]:
    """A configuration whose sets are in order: PEFT's come in the order of their hashes, and the head of a task twice."""
    data: dict[str, Any] = json.loads(text)
    lists = {key: sorted(set(value)) for key, value in data.items() if isinstance(value, list) and "modules" in key}
    return {**data, **lists}


def same_folder(theirs: Path, ours: Path, exact: bool, rounding: float = 0.0) -> None:
    """The same two files: with `exact` the configuration to the byte, and the tensors to the bit where nothing is rounded."""
    their_text, our_text = ((place / "adapter_config.json").read_text() for place in (theirs, ours))
    if exact:
        assert our_text == their_text
    assert as_one_set(our_text) == as_one_set(their_text)
    a, b = (open_file(place / "adapter_model.safetensors") for place in (theirs, ours))
    assert a.entries.keys() == b.entries.keys()
    for key in a.entries:
        np.testing.assert_allclose(b.tensor(key), a.tensor(key), rtol=rounding, atol=rounding, err_msg=key)


def printed(model: Any, capsys: pytest.CaptureFixture[str]) -> str:
    model.print_trainable_parameters()
    return capsys.readouterr().out


def their_state(model: Any, name: str = "default") -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tensors(peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))


__all__ = ["peft", "peft_ref", "scatter"]
