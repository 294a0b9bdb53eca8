"""What a model graph is: named modules in the model's order, the parameters they own, and a way to read one of them at a time.

    module      a dotted name ("model.layers.0.self_attn.q_proj"), a kind, and the layer it is; the root, whose name is empty, is left out
    parameter   a dotted name ("model.layers.0.self_attn.q_proj.weight"), a shape and a safetensors dtype ("F32", "BF16")
    tied        a parameter that is another one under a second name: {"lm_head.weight": "model.embed_tokens.weight"}
    alias       a module that is another one under a second name; rare, and nothing but `modules_to_save` looks at it

A kind is one of the layers' ("linear", "transposed_linear", "embedding", "conv1d", "conv2d", "conv3d", "norm") or "other": containers,
attention blocks. A norm is here whatever has one number for each channel as its weight, and perhaps a bias, and nothing else.
Matching asks for names and kinds only, so a graph is never asked for a number before something is merged or trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

from peft_ref.arrays import Array
from peft_ref.attending import AttentionBlock
from peft_ref.contracts import EVERY_KIND
from peft_ref.errors import ConfigError, KeyMismatchError
from peft_ref.layers import Layer

OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class Module:
    """One named module of a model.

    `layer` is None for kind "other", and where a layer's geometry cannot be written as one of ours (a convolution that pads by reflection).
    `exact` is False where stride, padding, dilation and groups, or what a norm does before its weight acts, were not given and plain ones
    stand in for them, as in a checkpoint: such a layer folds and merges a weight, but must not be run.
    """

    name: str
    kind: str = OTHER
    layer: Layer | None = None
    exact: bool = True
    weight: str | None = None  # the name of its parameter "weight"
    bias: str | None = None
    class_name: str = ""  # empty where only the kind is known
    block: AttentionBlock | None = None  # of an attention block that takes an adapter, where the model is known that well

    def __post_init__(self) -> None:
        if self.kind not in EVERY_KIND | {OTHER}:
            raise ConfigError(
                f"module {self.name!r}: kind {self.kind!r} is unknown.\n  There are {', '.join(sorted(EVERY_KIND))} and {OTHER}."
            )
        if self.layer is not None and self.layer.kind != self.kind:
            raise ConfigError(f"module {self.name!r} is of kind {self.kind!r}, its layer of kind {self.layer.kind!r}.\n  Give one of them.")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """What is known of a stored tensor without reading it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Graph(ABC):
    """A model: names, kinds and shapes at once, numbers one tensor at a time."""

    @property
    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """HF's config.json; empty for a model that has none."""

    @abstractmethod
    def modules(self) -> Mapping[str, Module]:
        """Every module by its name, each once, a container before what it holds."""

    @abstractmethod
    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter by its name, each once."""

    @abstractmethod
    def weight(self, name: str) -> Array:
        """The numbers of the parameter `name`, which may be a tied one."""

    def tied(self) -> Mapping[str, str]:
        """The second names of parameters, each with the first."""
        return MappingProxyType({})

    def buffers(self) -> Mapping[str, Array]:
        """What a model keeps beside its parameters, a running mean say: nothing but `modules_to_save` looks at it."""
        return MappingProxyType({})

    def aliases(self) -> Mapping[str, str]:
        """The second names of modules, each with the first."""
        return MappingProxyType({})

    @property
    def output_head(self) -> str | None:
        """The module that HF's `get_output_embeddings` returns; "all-linear" leaves it out."""
        return None

    @property
    def in_order(self) -> bool:
        """Whether the modules come in the order in which the live model holds them."""
        return True

    @property
    def pretrained(self) -> bool:
        """Whether this is a transformers model. Of any other model, "all-linear" takes the head too."""
        return False

    @final
    @property
    def model_type(self) -> str:
        """The architecture, as PEFT's default targets know it."""
        return str(self.config.get("model_type", "custom"))

    @final
    def resolve(self, name: str) -> str:
        """The first name of the parameter `name`."""
        first = self.tied().get(name, name)
        if first not in self.parameters():
            raise KeyMismatchError(f"no parameter {name!r} in this model.\n  `parameters()` lists the {len(self.parameters())} there are.")
        return first
