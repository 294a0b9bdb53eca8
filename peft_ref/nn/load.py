"""A model from the folder that HF's `save_pretrained` writes: config.json and its safetensors files, one or several with an index.

Tensors are read one by one. What the file has beside the model's own parameters is not read, as in HF (old files hold inv_freq); what it
lacks is an error. A file of the bare base model lacks the prefix ("layers.0..." for "model.layers.0..."), and a file may hold a tied
parameter under its second name. A head that the file holds beside the table it is tied to, with other numbers, is not tied, whatever
config.json says: so transformers 5 reads T5 1.1. The first BERTs call a LayerNorm's weight gamma and its bias beta.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from peft_ref.arrays import Array
from peft_ref.errors import ConfigError, KeyMismatchError, ShapeError, naming
from peft_ref.graph.checkpoint import CheckpointGraph
from peft_ref.nn.bert_heads import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from peft_ref.nn.gpt2 import GPT2
from peft_ref.nn.graph import ModelGraph
from peft_ref.nn.llama import Llama
from peft_ref.nn.model import Model
from peft_ref.nn.net import Net
from peft_ref.nn.t5 import T5

Host = np.ndarray[Any, Any]


class Architecture(Protocol):
    def from_config(self, config: Mapping[str, Any]) -> Model: ...


ARCHITECTURES: Mapping[str, Architecture] = {
    "BertForMaskedLM": BertForMaskedLM,
    "BertForQuestionAnswering": BertForQuestionAnswering,
    "BertForSequenceClassification": BertForSequenceClassification,
    "BertForTokenClassification": BertForTokenClassification,
    "BertModel": BertModel,
    "GPT2LMHeadModel": GPT2,
    "LlamaForCausalLM": Llama,
    "T5ForConditionalGeneration": T5,
}


class Loaded(NamedTuple):
    model: Model
    net: Net
    graph: ModelGraph


def model_of(config: Mapping[str, Any]) -> Model:
    """The model that a config.json describes."""
    named = [str(a) for a in config.get("architectures") or ()]
    found = next((name for name in named if name in ARCHITECTURES), None)
    if found is None:
        raise ConfigError(f"config.json names the architectures {named}.\n  There are {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[found].from_config(config)


def in_working_precision(array: Host) -> Host:
    """16-bit floats in float32, in which they are computed; the others as they are."""
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array


def load(folder: str | os.PathLike[str], hold: Callable[[Host], Array] = in_working_precision) -> Loaded:
    """The model in `folder`; `hold` makes the array to compute with of what the file has (`lambda a: backend.from_numpy(a, "float32")`)."""
    with naming(folder):
        file = CheckpointGraph(folder)
        model = _as_stored(file, model_of(file.config))
        weights = {name: hold(_read(file, model, name, shape)) for name, shape in model.shapes().items()}
        return Loaded(model, model.net(weights), ModelGraph(model=model, weights=weights, model_config=file.config))


def _as_stored(file: CheckpointGraph, model: Model) -> Model:
    """The model, its head untied where the file has one of its own."""
    head = f"{model.output_head}.weight"
    table = model.ties().get(head)
    found = None if table is None else (_stored(file, model, [head]), _stored(file, model, [table]))
    if found is None or None in found or not is_dataclass(model):
        return model
    apart, shared = (file.weight(name) for name in found if name is not None)
    return model if np.array_equal(apart, shared) else replace(model, tie_word_embeddings=False)


def _stored(file: CheckpointGraph, model: Model, names: Iterable[str]) -> str | None:
    """The first of the names that the file has, with the prefix or without."""
    stored = [n for full in names for n in (full, full.removeprefix(f"{model.base_model_prefix}."))]
    return next((n for n in (*stored, *map(_before_2019, stored)) if n in file.parameters()), None)


def _read(file: CheckpointGraph, model: Model, name: str, shape: tuple[int, ...]) -> Host:
    found = _stored(file, model, [name, *(second for second, first in model.ties().items() if first == name)])
    if found is None:
        raise KeyMismatchError(
            f"{file.folder}: no tensor {name!r}, which {type(model).__name__} needs.\n  Is it a whole model of that class?"
        )
    if (got := file.parameters()[found].shape) != shape:
        raise ShapeError(f"{file.folder}: {found} is {got}, expected {shape}.\n  config.json and the weights do not belong together.")
    array: Host = file.weight(found)
    return array


def _before_2019(name: str) -> str:
    for new, old in (("weight", "gamma"), ("bias", "beta")):
        if name.endswith(f"LayerNorm.{new}"):
            return name.removesuffix(new) + old
    return name
