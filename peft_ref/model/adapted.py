"""A model with adapters on it, as a value: every operation of this room returns a new one and leaves the old as it was.

    frozen weight    the base's, or what an init or a trained bias put in its place (`changed`)
    merged weight    the frozen one with the merged adapters in it, in the order of merging (`merged.weights`)
    copy             a module of modules_to_save that the active adapter trains in full

`weight` gives the copy, else the merged weight, else the frozen one. `active` says what is still to be applied on top of it:

    disabled                            nothing, and no copy and no merged weight either; nothing at attention blocks
    an adapter is merged at the module  nothing: HF's layer then runs its weight alone, even where another adapter is active
    else                                the active adapters that the module has, in their order

With adapters of several types HF puts several layers around a module, and all this holds for each of them; what is inside acts first.

A merge changes no number of the frozen weight, so that unmerging is forgetting, exact to the bit.

HF      peft.PeftModel and the tuner layers, which hold the same state module by module and let it diverge ("irregular"); here it is one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple, final

from peft_ref.arrays import Array
from peft_ref.attending import AttentionAdapter
from peft_ref.errors import ConfigError, NotMergeableError, TargetError
from peft_ref.files.adapter import AdapterModule
from peft_ref.files.config import AdapterConfig
from peft_ref.graph.protocol import Graph, Module, Parameter
from peft_ref.layers import Layer
from peft_ref.model.ties import Ties
from peft_ref.stack import Adapter

NOTHING: Mapping[str, Any] = MappingProxyType({})
SCALED = ("B", "c")  # the fields of a LoRA that carry its scale


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Attached:
    """One adapter on a model."""

    config: AdapterConfig
    modules: Mapping[str, AdapterModule] = field(default_factory=dict)
    blocks: Mapping[str, AttentionAdapter] = field(default_factory=dict)  # of a method that adds to attention blocks, in place of modules
    saved: Mapping[str, Array] = field(default_factory=dict)  # copies of whole modules, by the parameters' own names
    whole: tuple[str, ...] = ()  # those modules
    tied: Mapping[str, str] = field(default_factory=dict)  # parameters whose copy is that of another name
    mirrored: Mapping[str, str] = field(default_factory=dict)  # modules whose factors are those of another one, transposed
    following: Mapping[str, str] = field(default_factory=dict)  # modules whose trained tokens are those of another one
    trainable: bool = False
    multiplier: float = 1.0  # of its scale, for a while: no part of the configuration

    def adapter(self, module: str) -> Adapter:
        """What it does at `module`."""
        method, _, params = self.modules[module]
        if self.multiplier != 1.0:
            present = {name: getattr(params, name) for name in SCALED if name in params._fields}
            params = params._replace(**{name: self.multiplier * value for name, value in present.items() if value is not None})
        return Adapter(method, params)


class Merged(NamedTuple):
    """Which adapters are merged, in order, and what came of it."""

    names: tuple[str, ...] = ()
    weights: Mapping[str, Array] = NOTHING
    untied: frozenset[str] = frozenset()
    ties: Ties = "refuse"


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Adapted(Graph):
    """A base model, adapters by name, and which of them act. Made by `adapt`; it is itself a model."""

    base: Graph
    changed: Mapping[str, Array] = field(default_factory=dict)
    untied: frozenset[str] = frozenset()  # second names of tied weights that have numbers of their own
    adapters: Mapping[str, Attached] = field(default_factory=dict)
    active_names: tuple[str, ...] = ()
    enabled: bool = True
    merged: Merged = field(default_factory=Merged)
    trainable_biases: frozenset[str] = frozenset()
    mixed: bool = False  # whether adapters of several types may be added

    def __post_init__(self) -> None:
        for name in ("changed", "adapters"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def config(self) -> Mapping[str, Any]:
        return self.base.config

    @property
    def output_head(self) -> str | None:
        return self.base.output_head

    @property
    def pretrained(self) -> bool:
        return self.base.pretrained

    def modules(self) -> Mapping[str, Module]:
        return self.base.modules()

    def buffers(self) -> Mapping[str, Array]:
        """What the model keeps beside its parameters, as an adapter that was unloaded left it."""
        return {name: self.changed.get(name, kept) for name, kept in self.base.buffers().items()}

    def aliases(self) -> Mapping[str, str]:
        return self.base.aliases()

    def parameters(self) -> Mapping[str, Parameter]:
        return self._parameters

    def tied(self) -> Mapping[str, str]:
        return self._tied

    def weight(self, name: str) -> Array:
        """The numbers of the parameter `name` as the model uses them now."""
        if (copied := self._tied.get(name, name)) in self.copies:
            return self.copies[copied]
        first = self.resolve(name)
        return self.merged.weights[first] if self.enabled and first in self.merged.weights else self.frozen(first)

    def frozen(self, name: str) -> Array:
        """The numbers of the parameter `name` without adapters and copies."""
        if name in self.changed:
            return self.changed[name]
        first = self.base.resolve(name)
        return self.changed[first] if first in self.changed else self.base.weight(first)

    def active(self, module: str) -> tuple[Adapter, ...]:
        """What is to be applied on top of the module's weight, in order."""
        if not self.enabled:
            return ()
        return tuple(self.adapters[name].adapter(module) for name in self.acting(module))

    def injection(self) -> Mapping[str, tuple[Adapter, ...]]:
        """`active` of every module that has an adapter: HF's inject_adapter_in_model as a plain mapping, with nothing wrapped."""
        on = {module for adapter in self.adapters.values() for module in adapter.modules}
        return {module: self.active(module) for module in self.modules() if module in on}

    def attention(self) -> Mapping[str, AttentionAdapter]:
        """What is active on attention blocks, by their names."""
        if not self.enabled:
            return {}
        return {block: found for name in self.active_names for block, found in self.adapters[name].blocks.items()}

    def acting(self, module: str) -> tuple[str, ...]:
        """The names of the active adapters that are on the module and are not stopped there by a merged one."""
        free = [run for run in self._runs(module) if not set(run) & set(self.merged.names)]
        return tuple(name for run in free for name in self.active_names if name in run)

    def order(self, module: str, names: Collection[str]) -> tuple[str, ...]:
        """Those of `names` that are on the module, in the order in which they act."""
        return tuple(name for run in self._runs(module) for name in names if name in run)

    def _runs(self, module: str) -> list[list[str]]:
        """The adapters on the module, one run for each of HF's layers around it, the inmost first.

        A mixed model gets a new layer where an adapter comes that is of another type than the outmost one takes.
        """
        runs: list[list[str]] = []
        for name, adapter in self.adapters.items():
            if module in adapter.modules:
                if runs and self._type(runs[-1][0]) == self._type(name):
                    runs[-1].append(name)
                else:
                    runs.append([name])
        return runs

    def layer(self, module: str) -> Layer:
        """The layer that the module is."""
        found = self.modules().get(module)
        if found is None or found.layer is None:
            what = "there is no such module" if found is None else f"a module of kind {found.kind!r} is none of the layers here"
            raise TargetError(f"{module!r}: {what}.\n  `modules()` lists them with their kinds.")
        return found.layer.with_bias(found.bias is not None)

    def attached(self, name: str) -> Attached:
        """The adapter called `name`."""
        if name not in self.adapters:
            raise ConfigError(f"there is no adapter {name!r} (HF PEFT refuses it too).\n  There are {', '.join(self.adapters) or 'none'}.")
        return self.adapters[name]

    def refuse_attention(self, what: str) -> None:
        """Raise `NotMergeableError` where adapters add to attention blocks, which is in no layer and no weight."""
        if name := next((name for name, adapter in self.adapters.items() if adapter.blocks), None):
            raise NotMergeableError(
                f"{what}: adapter {name!r} is {self._type(name)}, which adds to attention blocks and changes no layer (HF PEFT has no such"
                " method there either).\n  Activate, disable or delete it instead."
            )

    @cached_property
    def copies(self) -> Mapping[str, Array]:
        """The parameters of modules_to_save that stand for the model's own now."""
        if not self.enabled:
            return NOTHING
        return MappingProxyType({key: copy for name in self.active_names for key, copy in self.adapters[name].saved.items()})

    @cached_property
    def _tied(self) -> Mapping[str, str]:
        own = self.untied | (self.merged.untied if self.enabled else frozenset())
        ties = self.base.tied().items()
        kept = {s for name in self.active_names if self.enabled for s in self.adapters[name].tied}
        return MappingProxyType({s: first for s, first in ties if s in kept or (s not in own and not {s, first} & self.copies.keys())})

    @cached_property
    def _parameters(self) -> Mapping[str, Parameter]:
        known = self.base.parameters()
        apart = {s: replace(known[first], name=s) for s, first in self.base.tied().items() if s not in self._tied}
        return MappingProxyType({**known, **apart})

    def _type(self, name: str) -> str:
        return self.adapters[name].config.method.peft_type


def adapt(base: Graph, *, mixed: bool = False) -> Adapted:
    """`base` as a model that takes adapters; with `mixed`, of several types at once."""
    return Adapted(base=base, mixed=mixed)
