"""A model as named modules, and which of them an adapter goes to.

protocol     what a model graph is
mapping      arrays by name
checkpoint   a safetensors folder, by its headers
torch        a live torch model; nothing here imports torch
replicated   a model whose layers are those of another, some several times: LoRA's layer_replication
targets      target_modules and its companions, matched as HF PEFT matches them
defaults     PEFT's target modules per method and architecture: DEFAULT_TARGETS["LORA"]["llama"], and IA3's FEEDFORWARD
"""

from peft_ref.graph.checkpoint import CheckpointGraph, under_live_names
from peft_ref.graph.defaults import DEFAULT_TARGETS, FEEDFORWARD
from peft_ref.graph.mapping import MappingGraph
from peft_ref.graph.protocol import Graph, Module, Parameter
from peft_ref.graph.replicated import ReplicatedGraph
from peft_ref.graph.rules import WITHOUT_TARGETS, default_feedforward, default_targets
from peft_ref.graph.targets import Matched, Targets, explain, match
from peft_ref.graph.torch import TorchGraph

__all__ = [
    "DEFAULT_TARGETS",
    "FEEDFORWARD",
    "WITHOUT_TARGETS",
    "CheckpointGraph",
    "Graph",
    "MappingGraph",
    "Matched",
    "Module",
    "Parameter",
    "ReplicatedGraph",
    "Targets",
    "TorchGraph",
    "default_feedforward",
    "default_targets",
    "explain",
    "match",
    "under_live_names",
]
