"""A live torch model as a graph.

torch is not imported: whoever has a model has torch, and a class is recognised by the names of its ancestors. So a subclass counts as
what it descends from, as with `isinstance`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, final

from peft_ref.arrays import Array
from peft_ref.graph.mapping import dtype_name
from peft_ref.graph.protocol import OTHER, Graph, Module, Parameter
from peft_ref.layers import Conv, Embedding, Layer, Linear
from peft_ref.norms import Norm

# Norms of transformers that are known: as Llama's, and as Gemma's, whose weight is stored less one.
RMS_NORMS = frozenset({f"{name}RMSNorm" for name in ("Llama", "Mistral", "Mixtral", "Phi3", "Qwen2", "Qwen3")} | {"T5LayerNorm"})
UNIT_OFFSET = frozenset({"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"})


def _descends(module: Any, package: str, name: str) -> bool:
    return any(c.__name__ == name and c.__module__.startswith(package) for c in type(module).__mro__)


@final
class TorchGraph(Graph):
    """The modules and parameters of `model`, as they are now."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        config: Any = getattr(self._model, "config", None)
        if config is None:
            return MappingProxyType({})
        if isinstance(config, Mapping):
            return MappingProxyType(dict(config))
        to_dict = getattr(config, "to_dict", None)  # transformers' configs; others may be plain dataclasses
        return MappingProxyType(dict(to_dict() if to_dict else dataclasses.asdict(config)))

    @cached_property
    def _modules(self) -> Mapping[str, Module]:
        return MappingProxyType({name: _module(name, module) for name, module in self._model.named_modules() if name})

    @cached_property
    def _tensors(self) -> Mapping[str, Any]:
        return MappingProxyType(dict(self._model.named_parameters()))

    @cached_property
    def _parameters(self) -> Mapping[str, Parameter]:
        named = self._tensors.items()
        return MappingProxyType({n: Parameter(name=n, shape=tuple(p.shape), dtype=dtype_name(p.dtype)) for n, p in named})

    @cached_property
    def _tied(self) -> Mapping[str, str]:
        first = {id(p): n for n, p in self._tensors.items()}
        every = self._model.named_parameters(remove_duplicate=False)
        return MappingProxyType({n: first[id(p)] for n, p in every if n != first[id(p)]})

    @cached_property
    def _aliases(self) -> Mapping[str, str]:
        first = {id(m): n for n, m in self._model.named_modules()}
        every = self._model.named_modules(remove_duplicate=False)
        return MappingProxyType({n: first[id(m)] for n, m in every if n != first[id(m)]})

    def modules(self) -> Mapping[str, Module]:
        return self._modules

    def parameters(self) -> Mapping[str, Parameter]:
        return self._parameters

    def tied(self) -> Mapping[str, str]:
        return self._tied

    def buffers(self) -> Mapping[str, Array]:
        stored = self._model.state_dict().keys()  # not those that are worked out anew
        return {name: b.detach() for name, b in self._model.named_buffers() if name in stored}

    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    def weight(self, name: str) -> Array:
        return self._tensors[self.resolve(name)].detach()

    @property
    def pretrained(self) -> bool:
        return _descends(self._model, "transformers.", "PreTrainedModel")

    @property
    def output_head(self) -> str | None:
        head = self._model.get_output_embeddings() if self.pretrained else None
        return next((name for name, module in self._model.named_modules() if module is head), None) if head is not None else None


def _module(name: str, module: Any) -> Module:
    own = dict(module.named_parameters(recurse=False))
    kind, layer = _layer(module)
    exact = True
    if kind == OTHER and (norm := _norm(module, own)) is not None:
        kind, layer, exact = norm.kind, norm, _acts_as(norm, module)
    weight, bias = (f"{name}.{key}" if key in own else None for key in ("weight", "bias"))
    return Module(name=name, kind=kind, layer=layer, exact=exact, weight=weight, bias=bias, class_name=type(module).__name__)


def _layer(module: Any) -> tuple[str, Layer | None]:
    """What PEFT would take the module for, in the order in which PEFT asks."""
    if _descends(module, "torch.nn.", "Embedding"):
        return "embedding", Embedding(num_embeddings=module.num_embeddings, embedding_dim=module.embedding_dim)
    for dims in (2, 3, 1):
        if _descends(module, "torch.nn.", f"Conv{dims}d"):
            return f"conv{dims}d", _conv(module)
    if _descends(module, "torch.nn.", "Linear"):
        return "linear", Linear(in_features=module.in_features, out_features=module.out_features)
    if _descends(module, "transformers.", "Conv1D"):
        n_in, out = module.weight.shape
        return "transposed_linear", Linear(in_features=n_in, out_features=out, transposed=True)
    return OTHER, None


def _norm(module: Any, own: Mapping[str, Any]) -> Norm | None:
    """A module whose one weight has a number for each channel, which need not be a norm: as what it is known, else as a plain one."""
    kept = {name for name, _ in module.named_buffers(recurse=False)} - module._non_persistent_buffers_set
    if "weight" not in own or own.keys() - {"weight", "bias"} or kept or len(own["weight"].shape) != 1 or 0 in own["weight"].shape:
        return None
    if "bias" in own and own["bias"].shape != own["weight"].shape:
        return None
    (features,) = own["weight"].shape
    plain = Norm(features=features)
    if _descends(module, "torch.nn.", "LayerNorm"):
        return replace(plain, eps=module.eps)
    if _descends(module, "torch.nn.", "RMSNorm"):
        return replace(plain, eps=_smallest(own["weight"]) if module.eps is None else module.eps, centred=False)
    name = type(module).__name__
    if name in RMS_NORMS:
        return replace(plain, eps=module.variance_epsilon, centred=False)
    return replace(plain, eps=module.eps, centred=False, unit_offset=True) if name in UNIT_OFFSET else plain


def _acts_as(norm: Norm, module: Any) -> bool:
    """Whether that is known: of a class that writes a forward of its own it is not."""
    writer = next(c for c in type(module).__mro__ if "forward" in vars(c))
    torchs = writer.__module__.startswith("torch.nn.") and writer.__name__ in ("LayerNorm", "RMSNorm")
    return torchs or type(module).__name__ in RMS_NORMS | UNIT_OFFSET


def _smallest(weight: Any) -> float:
    """torch's eps where none is given: the distance from one to the next number of the dtype."""
    return float(2.0 ** -{"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}[str(weight.dtype).rpartition(".")[2]])


def _conv(module: Any) -> Conv | None:
    """The geometry, or None where it is none of ours: other padding than zeros, or more of it on one side."""
    padding = module.padding
    if padding == "valid":
        padding = (0,) * len(module.kernel_size)
    elif padding == "same":
        both = tuple(d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
        padding = None if any(n % 2 for n in both) else tuple(n // 2 for n in both)
    if module.padding_mode != "zeros" or padding is None:
        return None
    return Conv(
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel_size=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=tuple(padding),
        dilation=tuple(module.dilation),
        groups=module.groups,
    )
