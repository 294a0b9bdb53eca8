"""A model as arrays by name: {"layers.0.q_proj.weight": array, ...}.

Kinds come from names and shapes (`names.py`), unless `layers` says what a module is. Convolutions should be given there: their stride,
padding, dilation and groups are in no array.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, final

from peft_ref.arrays import Array
from peft_ref.errors import TargetError
from peft_ref.graph.names import stored_modules
from peft_ref.graph.protocol import OTHER, Graph, Module, Parameter
from peft_ref.layers import Layer
from peft_ref.norms import NORM

_DTYPES = {
    **{f"float{n}": f"F{n}" for n in (16, 32, 64)},
    **{f"int{n}": f"I{n}" for n in (8, 16, 32, 64)},
    **{f"uint{n}": f"U{n}" for n in (8, 16, 32, 64)},
    "bool": "BOOL",
    "bfloat16": "BF16",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def dtype_name(dtype: Any) -> str:
    """The safetensors name of an array library's dtype ("torch.bfloat16", dtype('float32'), ...); its own name where there is none."""
    own = str(getattr(dtype, "name", None) or dtype).rpartition(".")[2]
    return _DTYPES.get(own, own)


@final
@dataclass(frozen=True, kw_only=True)
class MappingGraph(Graph):
    """Arrays by name, in the model's order."""

    arrays: Mapping[str, Array]
    layers: Mapping[str, Layer] = field(default_factory=dict)  # by module name: what the names do not tell
    model_config: Mapping[str, Any] = field(default_factory=dict)  # HF's config.json
    ties: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, Array] = field(default_factory=dict)  # its buffers
    head: str | None = None  # the output head, which "all-linear" leaves out

    @property
    def config(self) -> Mapping[str, Any]:
        return self.model_config

    @cached_property
    def _parameters(self) -> Mapping[str, Parameter]:
        named = self.arrays.items()
        return MappingProxyType({n: Parameter(name=n, shape=tuple(a.shape), dtype=dtype_name(a.dtype)) for n, a in named})

    @cached_property
    def _modules(self) -> Mapping[str, Module]:
        parameters = dict(self._parameters)
        parameters |= {second: replace(parameters[first], name=second) for second, first in self.ties.items()}
        found = stored_modules(parameters, self.model_config)
        for name in {key.rpartition(".")[0] for key in self.kept} & found.keys():
            if found[name].kind == NORM:  # a norm that keeps a running mean is more than its weight
                found[name] = replace(found[name], kind=OTHER, layer=None, exact=True)
        for name, layer in self.layers.items():
            if name not in found:
                raise TargetError(f"layers names {name!r}, and no array is called {name}.weight.\n  There are {', '.join(found)}.")
            if (weight := found[name].weight) is not None and parameters[weight].shape != layer.weight_shape:
                raise TargetError(f"{weight} is {parameters[weight].shape}, expected {layer.weight_shape} for {layer}.")
            found[name] = replace(found[name], kind=layer.kind, layer=layer, exact=True)
        return MappingProxyType(found)

    def modules(self) -> Mapping[str, Module]:
        return self._modules

    def parameters(self) -> Mapping[str, Parameter]:
        return self._parameters

    def weight(self, name: str) -> Array:
        return self.arrays[self.resolve(name)]

    def buffers(self) -> Mapping[str, Array]:
        return self.kept

    def tied(self) -> Mapping[str, str]:
        return self.ties

    @property
    def output_head(self) -> str | None:
        return self.head

    @property
    def pretrained(self) -> bool:
        return self.head is not None or "model_type" in self.model_config
