"""A model that runs, in HF's words: called with input_ids and the rest, it returns logits and a loss.

    BaseModel    a graph, and how to call it. `peft_ref.nn` models run; of any other graph a call is refused
    ModelOutput  what a call returns, under the names of HF's outputs

HF      the transformers model that PEFT wraps. Adapters are not put into it: a PeftModel leaves the one it was given as it was.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, final

from peft_ref.arrays import Array
from peft_ref.errors import ConfigError
from peft_ref.graph.protocol import Graph
from peft_ref.model.adapted import Adapted
from peft_ref.nn import BertForQuestionAnswering, Cache, Inputs, Loaded, Model, ModelGraph, Net, Output, load
from peft_ref.nn.generate import Front

RENAMED = {"past": "past_key_values"}  # ours: HF's


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class ModelOutput:
    """None where the model's class has no such thing."""

    loss: Array | None = None
    logits: Array | None = None
    start_logits: Array | None = None  # of question answering, which has these two for logits
    end_logits: Array | None = None
    last_hidden_state: Array | None = None
    pooler_output: Array | None = None
    past_key_values: Cache | None = None


@final
class BaseModel:
    """A model without PEFT around it: what `get_base_model`, `unload` and `merge_and_unload` return."""

    def __init__(self, model: Loaded | Graph | BaseModel, name: str | None = None) -> None:
        self.graph: Graph = model.graph if isinstance(model, Loaded | BaseModel) else model
        known = model.name if isinstance(model, BaseModel) else self.graph.config.get("_name_or_path")
        self.name: str | None = name or known or None  # where it came from, which an adapter notes as base_model_name_or_path

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str]) -> BaseModel:
        """The model in a folder that HF's `save_pretrained` wrote."""
        return cls(load(pretrained_model_name_or_path), os.fspath(pretrained_model_name_or_path))

    def forward(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
        *,
        position_ids: Array | None = None,
        token_type_ids: Array | None = None,
        start_positions: Array | None = None,
        end_positions: Array | None = None,
        past_key_values: Cache | None = None,
        decoder_input_ids: Array | None = None,
        decoder_inputs_embeds: Array | None = None,
        decoder_attention_mask: Array | None = None,
    ) -> ModelOutput:
        return as_output(self.graph, run(self.graph, as_inputs(locals())))

    __call__ = forward

    def __repr__(self) -> str:
        return f"BaseModel({class_name(self.graph) or type(self.graph).__name__})"


def as_inputs(given: Mapping[str, Any]) -> Inputs:
    """The arguments of a call, by HF's names, as a model's inputs; an argument that is none of them is for the caller."""
    called = {f.name: RENAMED.get(f.name, f.name) for f in fields(Inputs)}
    return Inputs(**{name: given[argument] for name, argument in called.items() if argument in given})


def model_in(graph: Graph) -> Model:
    """The transformer that the graph shows. Raises `ConfigError` where it shows arrays alone."""
    while isinstance(graph, Adapted):
        graph = graph.base
    if not isinstance(graph, ModelGraph):
        raise ConfigError(
            f"a {type(graph).__name__} holds arrays and names, and does not run.\n"
            "  Load a model with BaseModel.from_pretrained, or run single layers with peft_ref.model.forward."
        )
    return graph.model


def net_of(graph: Graph) -> Net:
    """The numbers as they are now, with the adapters that act on them."""
    model = model_in(graph)
    net = replace(model.net({name: graph.weight(name) for name in graph.parameters()}), ties=graph.tied())
    return replace(net, adapters=graph.injection(), attention=graph.attention()) if isinstance(graph, Adapted) else net


class Ready(NamedTuple):
    """A model with its numbers, and what goes before its inputs."""

    model: Model
    net: Net
    front: Front | None = None


def run(graph: Graph, inputs: Inputs) -> Output:
    return model_in(graph).forward(net_of(graph), inputs)


def as_output(graph: Graph, output: Output) -> ModelOutput:
    logits, start, end = output.logits, None, None
    if logits is not None and isinstance(model_in(graph), BertForQuestionAnswering):
        start, end = logits[..., 0], logits[..., 1]
        logits = None
    bare = output.logits is None  # HF's classes with a head return none of the next two
    return ModelOutput(
        loss=output.loss,
        logits=logits,
        start_logits=start,
        end_logits=end,
        last_hidden_state=output.hidden if bare else None,
        pooler_output=output.pooled if bare else None,
        past_key_values=output.cache,
    )


def class_name(graph: Graph) -> str:
    """HF's class of the model, as its config says it."""
    named: Any = graph.config.get("architectures") or ()
    return str(named[0]) if named else ""


def auto_mapping(graph: Graph) -> dict[str, str] | None:
    """Where HF's class of the model lives, which PEFT notes where there is no task type."""
    if not graph.pretrained or not class_name(graph):
        return None
    kind = graph.model_type.replace("-", "_")
    return {"base_model_class": class_name(graph), "parent_library": f"transformers.models.{kind}.modeling_{kind}"}
