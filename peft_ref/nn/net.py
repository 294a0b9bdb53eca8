"""A network's numbers, and its one way to use them: `apply` a module to an input, and `vjp` beside it.

    apply(name, x)      = layer(x; T(W, b))       the module's frozen weight under its active adapters, as `stack.forward` has it
    vjp(name, x, dy)    = dx, Gradients           and its transpose, `stack.vjp`

    attention[name]     what is active on an attention block beside its layers, which the architecture asks for itself

So whatever the adapters are, a model that reaches its linear maps and embeddings through these two supports them all.
A model is pure functions over such a value; nothing is written into it: `dataclasses.replace` makes the next one.

Names are HF's: module "model.layers.0.self_attn.q_proj", parameter "model.layers.0.self_attn.q_proj.weight". A tied parameter is
looked up under its own name first: a copy that was trained apart (modules_to_save) stands there and hides the tie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

from peft_ref import stack
from peft_ref.arrays import Array
from peft_ref.attending import AttentionAdapter, AttentionBlock, add_params
from peft_ref.errors import ConfigError, KeyMismatchError
from peft_ref.layers import Layer
from peft_ref.stack import Adapter


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Gradients:
    """A gradient for every adapter tensor, and for the base parameters that were asked for. They add; `Gradients()` is zero."""

    adapters: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # module name -> one Params per adapter; a block's name too
    weights: Mapping[str, Array] = field(default_factory=dict)  # parameter name -> gradient in the stored shape

    def __add__(self, other: Gradients) -> Gradients:
        adapters, weights = dict(self.adapters), dict(self.weights)
        for name, params in other.adapters.items():
            mine = adapters.get(name)
            adapters[name] = params if mine is None else tuple(add_params(p, q) for p, q in zip(mine, params, strict=True))
        for name, d in other.weights.items():
            weights[name] = weights[name] + d if name in weights else d
        return Gradients(adapters=adapters, weights=weights)


class _At(NamedTuple):
    layer: Layer
    W: Array  # (out, in)
    b: Array | None
    adapters: tuple[Adapter, ...]


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Net:
    weights: Mapping[str, Array]  # by parameter name, as stored
    layers: Mapping[str, Layer]  # by module name: every module that an input is put through
    ties: Mapping[str, str] = field(default_factory=dict)  # a parameter's second name -> its first
    adapters: Mapping[str, tuple[Adapter, ...]] = field(default_factory=dict)  # the active ones, by module name, in order
    blocks: Mapping[str, AttentionBlock] = field(default_factory=dict)  # by module name: every attention block that takes an adapter
    attention: Mapping[str, AttentionAdapter] = field(default_factory=dict)  # the active one of a block; another is swapped in for it
    trainable: frozenset[str] = frozenset()  # the base parameters whose gradient is wanted, by their first names

    def __post_init__(self) -> None:
        if unknown := sorted(self.adapters.keys() - self.layers.keys()):
            raise KeyMismatchError(
                f"adapters at {unknown[0]!r}: no layer of that name.\n  `layers` lists the {len(self.layers)} there are."
            )
        if unknown := sorted(self.attention.keys() - self.blocks.keys()):
            raise KeyMismatchError(
                f"an adapter of attention at {unknown[0]!r}: no attention block of that name that takes one.\n"
                f"  There are {', '.join(self.blocks) or 'none: the architecture has none (HF PEFT: llama, mistral, gpt2)'}."
            )
        for name, adapter in self.attention.items():
            adapter.method.unpack(self.blocks[name].hidden_size, adapter.method.pack(adapter.params), name)
        if unknown := sorted(self.trainable - self.weights.keys()):
            second = f"\n  It is tied: ask for {self.ties[unknown[0]]!r}." if unknown[0] in self.ties else ""
            raise KeyMismatchError(f"trainable: no parameter {unknown[0]!r} among the {len(self.weights)} of this net.{second}")
        if both := sorted(n for n, stacked in self.adapters.items() if stacked and self._name(f"{n}.weight") in self.trainable):
            raise ConfigError(
                f"{both[0]}.weight is to be trained and has adapters, which take it for frozen.\n  Train one of them (biases are fine)."
            )

    def apply(self, name: str, x: Array) -> Array:
        """The output of the module `name` for input x; token ids for an embedding."""
        at = self._at(name)
        return stack.forward(at.layer, at.W, at.b, at.adapters, x)

    def vjp(self, name: str, x: Array, dy: Array) -> tuple[Array, Gradients]:
        """The gradients of `apply`: for x (None for an embedding, whose input is integers) and for what is trained."""
        at = self._at(name)
        d = stack.vjp(at.layer, at.W, at.b, at.adapters, x, dy)
        weight, bias = self._name(f"{name}.weight"), self._name(f"{name}.bias")
        found = Gradients(adapters={name: d.params} if at.adapters else {})
        if weight in self.trainable:
            found = found + self.gradient(weight, at.layer.unfold(at.layer.weight_vjp(x, dy)))
        return d.x, found if d.b is None else found + self.gradient(bias, d.b)

    def parameter(self, name: str) -> Array:
        """The parameter `name`, which may be a tied one."""
        if (first := self._name(name)) not in self.weights:
            raise KeyMismatchError(f"no parameter {name!r} in this net.\n  `weights` lists the {len(self.weights)} there are.")
        return self.weights[first]

    def gradient(self, name: str, d: Array) -> Gradients:
        """`d` as the gradient of the parameter `name`, or nothing where nobody wants it."""
        first = self._name(name)
        return Gradients(weights={first: d}) if first in self.trainable else Gradients()

    def _name(self, name: str) -> str:
        return name if name in self.weights else self.ties.get(name, name)

    def _at(self, name: str) -> _At:
        if name not in self.layers:
            raise KeyMismatchError(f"no layer {name!r} in this net.\n  `layers` lists the {len(self.layers)} there are.")
        layer = self.layers[name]
        b = self.weights.get(self._name(f"{name}.bias"))
        return _At(layer, layer.fold(self.parameter(f"{name}.weight")), b, self.adapters.get(name, ()))
