"""A model and its arrays as a graph, with the names, kinds and classes that HF's live model has: what target matching asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, final

from peft_ref.arrays import Array
from peft_ref.graph.mapping import dtype_name
from peft_ref.graph.protocol import Graph, Module, Parameter
from peft_ref.nn.model import Model


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class ModelGraph(Graph):
    model: Model
    weights: Mapping[str, Array]
    model_config: Mapping[str, Any] = field(default_factory=dict)  # HF's config.json

    @property
    def config(self) -> Mapping[str, Any]:
        return self.model_config

    @cached_property
    def _modules(self) -> Mapping[str, Module]:
        return MappingProxyType(self.model.modules())

    @cached_property
    def _parameters(self) -> Mapping[str, Parameter]:
        shapes = self.model.shapes().items()
        return MappingProxyType({n: Parameter(name=n, shape=s, dtype=dtype_name(self.weights[n].dtype)) for n, s in shapes})

    def modules(self) -> Mapping[str, Module]:
        return self._modules

    def parameters(self) -> Mapping[str, Parameter]:
        return self._parameters

    def weight(self, name: str) -> Array:
        return self.weights[self.resolve(name)]

    def tied(self) -> Mapping[str, str]:
        return self.model.ties()

    @property
    def output_head(self) -> str | None:
        return self.model.output_head

    @property
    def pretrained(self) -> bool:
        return True
