"""LoRA's layer_replication: a model whose layers are those of another, some of them several times, over the same weights.

    [[0, 4], [2, 5]]    the layers 0 1 2 3 2 3 4 of the base, numbered 0 to 6

A weight has the name of its first layer, and those of the others as tied ones; every layer gets an adapter of its own. The layers are
found as in HF: below "model." as often as there is one, and "bert.": "layers", "encoder.layer" or "h".

HF      peft.tuners.tuners_utils.replicate_layers. A merge adds every copy's delta to the one weight, so that the merged model computes
        something else; HF means to refuse that and does not. Here it is what a merge into any tied weight is: refused, or as `ties` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, final

from peft_ref.arrays import Array
from peft_ref.errors import ConfigError, TargetError
from peft_ref.graph.protocol import Graph, Module, Parameter

LISTS = ("layers", "encoder.layer", "h")


@final
@dataclass(frozen=True, eq=False)
class ReplicatedGraph(Graph):
    """`base` with the layers that `layer_replication` names, as pairs of a first number and one after the last."""

    base: Graph
    layer_replication: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_replication", tuple(tuple(pair) for pair in self.layer_replication))
        if not all(len(pair) == 2 and all(isinstance(n, int) for n in pair) for pair in self.layer_replication):
            raise ConfigError(f"layer_replication={self.layer_replication!r:.80}: pairs [first, after the last] are expected.")
        there = sum(1 for name in self.base.modules() if self._inside(name) is not None and name.count(".") == self._list.count(".") + 1)
        if not self._order or min(self._order) < 0 or max(self._order) >= there:
            raise ConfigError(f"layer_replication={self.layer_replication!r:.80}: the model's layers are 0 to {there - 1}.")

    @cached_property
    def _order(self) -> tuple[int, ...]:
        """The base's layer of each layer here."""
        return tuple(n for first, after in self.layer_replication for n in range(first, after))

    @cached_property
    def _list(self) -> str:
        """The name of the list of layers."""
        modules, prefix = self.base.modules(), ""
        while f"{prefix}model" in modules:
            prefix += "model."
        prefix += "bert." if f"{prefix}bert" in modules else ""
        found = next((f"{prefix}{name}" for name in LISTS if f"{prefix}{name}" in modules), None)
        if found is None:
            raise TargetError(f"layer_replication: no list of layers below {prefix!r} (HF PEFT refuses it too).\n  {', '.join(LISTS)}.")
        return found

    def _inside(self, name: str) -> tuple[int, str] | None:
        """The number of the layer that `name` is in, and what follows it."""
        head, _, rest = name.removeprefix(f"{self._list}.").partition(".")
        return (int(head), rest) if name.startswith(f"{self._list}.") and head.isdecimal() else None

    def _named(self, layer: int, rest: str) -> str:
        return f"{self._list}.{layer}.{rest}" if rest else f"{self._list}.{layer}"

    def _names(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Every name here with the base's, in this model's order."""
        rests: dict[int, list[str]] = {}
        for name in names:
            if (inside := self._inside(name)) is not None:
                rests.setdefault(inside[0], []).append(inside[1])
        done = False
        for name in names:
            if self._inside(name) is None:
                yield name, name
            elif not done:
                done = True
                for here, there in enumerate(self._order):
                    for rest in rests.get(there, ()):
                        yield self._named(here, rest), self._named(there, rest)

    def _moved(self, name: str | None, layer: int) -> str | None:
        inside = None if name is None else self._inside(name)
        return name if inside is None else self._named(layer, inside[1])

    @cached_property
    def _modules(self) -> Mapping[str, Module]:
        found, known = {}, self.base.modules()
        for name, base in self._names(list(known)):
            module, inside = known[base], self._inside(name)
            if inside is not None:
                weight, bias = self._moved(module.weight, inside[0]), self._moved(module.bias, inside[0])
                module = replace(module, name=name, weight=weight, bias=bias)
            found[name] = module
        return MappingProxyType(found)

    @cached_property
    def _origins(self) -> Mapping[str, str]:
        """For every name of a parameter, first or second, the base's own first name."""
        every = [*self.base.parameters(), *self.base.tied()]
        return MappingProxyType({name: self.base.resolve(base) for name, base in self._names(every)})

    @cached_property
    def _firsts(self) -> Mapping[str, str]:
        """For every parameter of the base that is used, its first name here."""
        first: dict[str, str] = {}
        for name, origin in self._origins.items():
            first.setdefault(origin, name)
        return MappingProxyType(first)

    @cached_property
    def _parameters(self) -> Mapping[str, Parameter]:
        known = self.base.parameters()
        return MappingProxyType({name: replace(known[origin], name=name) for origin, name in self._firsts.items()})

    @cached_property
    def _tied(self) -> Mapping[str, str]:
        ties = {name: self._firsts[origin] for name, origin in self._origins.items()}
        return MappingProxyType({name: first for name, first in ties.items() if name != first})

    @property
    def config(self) -> Mapping[str, Any]:
        known = self.base.config
        return {**known, "num_hidden_layers": len(self._order)} if "num_hidden_layers" in known else known

    def modules(self) -> Mapping[str, Module]:
        return self._modules

    def parameters(self) -> Mapping[str, Parameter]:
        return self._parameters

    def tied(self) -> Mapping[str, str]:
        return self._tied

    def aliases(self) -> Mapping[str, str]:
        return MappingProxyType({a: b for a, b in self.base.aliases().items() if self._inside(a) is None and self._inside(b) is None})

    @property
    def output_head(self) -> str | None:
        return self.base.output_head

    @property
    def pretrained(self) -> bool:
        return self.base.pretrained

    def weight(self, name: str) -> Array:
        return self.base.weight(self._origins[name] if name in self._origins else self.resolve(name))
