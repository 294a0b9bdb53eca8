"""What a transformer states, and what follows from it.

    contract    an architecture writes                                        derived here, once and final
    Model       parts, ties, output_head; forward and vjp                     layers, shapes, modules: what loading and matching ask
    Decoder     a Model by its pieces: enter, block, leave, each with vjp     forward, vjp, the cache

A model is a frozen value: the numbers of HF's config.json, without any array. The arrays are in a `Net`. Base dropout (attention, hidden)
is left out: this is HF's model after `.eval()`; an adapter's dropout is an explicit mask of the adapter.

vjp runs forward once and keeps the input of every block, then walks back; a block's vjp computes again what it needs. About three forwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, final

from peft_ref.arrays import Array, namespace
from peft_ref.errors import ConfigError
from peft_ref.graph.protocol import OTHER, Module
from peft_ref.layers import Layer
from peft_ref.nn.attention import KeyValue, mask_bias, positions_from
from peft_ref.nn.loss import next_token_loss, next_token_loss_vjp
from peft_ref.nn.net import Gradients, Net

NONE: Mapping[str, tuple[int, ...]] = MappingProxyType({})
Cache = tuple[KeyValue, ...]


class Part(NamedTuple):
    """One module of a model: HF's class, the layer it is, and the parameters it owns beside that layer's weight."""

    class_name: str
    layer: Layer | None = None
    bias: bool = False
    own: Mapping[str, tuple[int, ...]] = NONE  # of a module that is no layer: {"weight": (8,)}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        if self.layer is None:
            return self.own
        return {"weight": self.layer.weight_shape} | ({"bias": (self.layer.shape[0],)} if self.bias else {})


@dataclass(frozen=True, eq=False, kw_only=True)
class Inputs:
    """What a model is called with; HF's names. Exactly one of input_ids and inputs_embeds."""

    input_ids: Array | None = None  # (batch, T)
    inputs_embeds: Array | None = None  # (batch, T, hidden)
    attention_mask: Array | None = None  # (batch, past + T), 0 at padding
    position_ids: Array | None = None  # (batch or 1, T); without them they count on from the past's length
    token_type_ids: Array | None = None
    labels: Array | None = None  # -100 does not count
    past: Cache | None = None  # a cache, or a prefix: keys and values in front, one per layer
    # Of an encoder-decoder, whose `past` is the decoder's, and whose mask and ids above are the encoder's:
    decoder_input_ids: Array | None = None
    decoder_inputs_embeds: Array | None = None
    decoder_attention_mask: Array | None = None  # (batch, past + T)
    cross: Cache | None = None  # what the decoder sees of the encoder: an earlier call's, and no encoder runs


@dataclass(frozen=True, eq=False, kw_only=True)
class Output:
    logits: Array
    loss: Array | None = None  # with labels
    cache: Cache | None = None  # the past and the new tokens behind it; give it as `past` of the next call
    cross: Cache | None = None  # of an encoder-decoder; give it as `cross` of the next call


@dataclass(frozen=True, eq=False, kw_only=True)
class OutputGradient:
    """The gradient of a number for what `forward` returned: `OutputGradient(loss=1.0)` is the loss itself. None is zero."""

    logits: Array | None = None
    loss: Array | float | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelGradients:
    output: Output  # what `forward` returns; it came along
    net: Gradients
    inputs_embeds: Array | None  # whether they were given or looked up; None where `cross` stood for them
    past: Cache | None = None
    decoder_inputs_embeds: Array | None = None
    cross: Cache | None = None  # where it was given


class Model(ABC):
    """A transformer without its numbers."""

    base_model_prefix: ClassVar[str]  # HF's: what the names of a file may lack

    @abstractmethod
    def parts(self) -> Mapping[str, Part]:
        """Every module by HF's name and in HF's order, a container before what it holds, the root left out."""

    @abstractmethod
    def ties(self) -> Mapping[str, str]:
        """The second names of parameters, each with the first."""

    @property
    @abstractmethod
    def output_head(self) -> str | None:
        """The module that HF's `get_output_embeddings` returns."""

    @abstractmethod
    def forward(self, net: Net, inputs: Inputs) -> Output: ...

    @abstractmethod
    def vjp(self, net: Net, inputs: Inputs, d: OutputGradient) -> ModelGradients:
        """The gradients of `forward` for all that `net` trains, for the embedded inputs and for the past."""

    @final
    def layers(self) -> dict[str, Layer]:
        return {name: part.layer for name, part in self.parts().items() if part.layer is not None}

    @final
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape, each once."""
        every = {f"{name}.{key}": shape for name, part in self.parts().items() for key, shape in part.shapes.items()}
        return {name: shape for name, shape in every.items() if name not in self.ties()}

    @final
    def modules(self) -> dict[str, Module]:
        """The modules as a graph shows them."""
        found = {}
        for name, part in self.parts().items():
            weight, bias = (f"{name}.{key}" if key in part.shapes else None for key in ("weight", "bias"))
            kind = OTHER if part.layer is None else part.layer.kind
            found[name] = Module(name=name, kind=kind, layer=part.layer, weight=weight, bias=bias, class_name=part.class_name)
        return found

    @final
    def net(self, weights: Mapping[str, Array]) -> Net:
        """The network of these weights, with no adapter."""
        return Net(weights=weights, layers=self.layers(), ties=self.ties())


class Context(NamedTuple):
    """What every block of a decoder is told beside its input."""

    positions: Array  # (batch or 1, T)
    bias: Array  # the mask, as attention adds it


class Decoder(Model):
    """A causal language model:   x = embedding(ids);   x = enter(x);   x = block_l(x) for every l;   logits = leave(x)."""

    embedding: ClassVar[str]  # the module that looks the tokens up

    @abstractmethod
    def block_names(self) -> tuple[str, ...]: ...

    @abstractmethod
    def enter(self, net: Net, x: Array, context: Context) -> Array:
        """What happens to the embedded tokens before the first block."""

    @abstractmethod
    def enter_vjp(self, net: Net, x: Array, context: Context, dy: Array) -> tuple[Array, Gradients]: ...

    @abstractmethod
    def block(self, net: Net, name: str, x: Array, context: Context, past: KeyValue | None) -> tuple[Array, KeyValue]:
        """The block's output, and its keys and values with the past's in front."""

    @abstractmethod
    def block_vjp(
        self, net: Net, name: str, x: Array, context: Context, past: KeyValue | None, dy: Array
    ) -> tuple[Array, KeyValue | None, Gradients]:
        """The gradients for x, for the past and for what `net` trains, given that of the output."""

    @abstractmethod
    def leave(self, net: Net, x: Array) -> Array:
        """The logits."""

    @abstractmethod
    def leave_vjp(self, net: Net, x: Array, dy: Array) -> tuple[Array, Gradients]: ...

    @final
    def forward(self, net: Net, inputs: Inputs) -> Output:
        return self._run(net, inputs).output

    @final
    def vjp(self, net: Net, inputs: Inputs, d: OutputGradient) -> ModelGradients:
        run = self._run(net, inputs)
        dx, gradients = self.leave_vjp(net, run.xs[-1], _dlogits(run.output, inputs, d))
        dpasts: list[KeyValue | None] = []
        for name, x, past in reversed(list(zip(self.block_names(), run.xs[:-1], run.pasts, strict=True))):
            dx, dpast, more = self.block_vjp(net, name, x, run.context, past, dx)
            gradients, dpasts = gradients + more, [dpast, *dpasts]
        dx, more = self.enter_vjp(net, run.embedded, run.context, dx)
        gradients = gradients + more
        if inputs.input_ids is not None:
            gradients = gradients + net.vjp(self.embedding, inputs.input_ids, dx)[1]
        past_gradient = tuple(p for p in dpasts if p is not None)
        return ModelGradients(output=run.output, net=gradients, inputs_embeds=dx, past=past_gradient or None)

    @final
    def _run(self, net: Net, inputs: Inputs) -> _Run:
        names = self.block_names()
        embedded = embed(net, self.embedding, inputs)
        if inputs.past is not None and len(inputs.past) != len(names):
            raise ConfigError(f"past has keys and values for {len(inputs.past)} layers, the model has {len(names)}.")
        pasts: tuple[KeyValue | None, ...] = inputs.past or (None,) * len(names)
        start = inputs.past[0].length if inputs.past else 0
        positions = positions_from(start, embedded.shape[1], embedded) if inputs.position_ids is None else inputs.position_ids
        context = Context(positions, mask_bias(embedded, inputs.attention_mask, start, causal=True))
        xs: list[Array] = [self.enter(net, embedded, context)]
        cache: list[KeyValue] = []
        for name, past in zip(names, pasts, strict=True):
            x, kept = self.block(net, name, xs[-1], context, past)
            xs, cache = [*xs, x], [*cache, kept]
        logits = self.leave(net, xs[-1])
        loss = None if inputs.labels is None else next_token_loss(logits, inputs.labels)
        return _Run(Output(logits=logits, loss=loss, cache=tuple(cache)), embedded, context, pasts, xs)


class _Run(NamedTuple):
    output: Output
    embedded: Array
    context: Context
    pasts: tuple[KeyValue | None, ...]
    xs: list[Array]  # the input of every block, and of `leave`


def embed(net: Net, name: str, inputs: Inputs) -> Array:
    """The tokens looked up in the module `name`, or the embeddings that were given."""
    if (inputs.input_ids is None) == (inputs.inputs_embeds is None):
        raise ConfigError("a model needs input_ids or inputs_embeds, and not both.")
    return inputs.inputs_embeds if inputs.input_ids is None else net.apply(name, inputs.input_ids)


def _dlogits(output: Output, inputs: Inputs, d: OutputGradient) -> Array:
    parts = [] if d.logits is None else [d.logits]
    if d.loss is not None:
        if inputs.labels is None:
            raise ConfigError("a gradient came for the loss, and the inputs have no labels.")
        parts.append(next_token_loss_vjp(output.logits, inputs.labels, d.loss))
    return sum(parts[1:], parts[0]) if parts else namespace(output.logits).zeros_like(output.logits)


def known(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of config.json that a model has a field for; a null is left to the field's default."""
    return {key: value for key, value in config.items() if key in fields and value is not None}
