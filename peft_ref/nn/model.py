"""What a transformer states, and what follows from it.

    contract    an architecture writes                                        derived here, once and final
    Model       parts, ties, output_head; forward and vjp                     layers, shapes, modules: what loading and matching ask
    Blocks      a Model by its pieces, see peft_ref/nn/blocks.py              forward, vjp, the cache

A model is a frozen value: the numbers of HF's config.json, without any array. The arrays are in a `Net`. Base dropout (attention, hidden)
is left out: this is HF's model after `.eval()`; an adapter's dropout is an explicit mask of the adapter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, final

from peft_ref.arrays import Array, namespace
from peft_ref.attending import AttentionBlock
from peft_ref.errors import ConfigError
from peft_ref.graph.protocol import OTHER, Module
from peft_ref.layers import Layer
from peft_ref.nn.attention import KeyValue
from peft_ref.nn.net import Gradients, Net

NONE: Mapping[str, tuple[int, ...]] = MappingProxyType({})
Cache = tuple[KeyValue, ...]


class Part(NamedTuple):
    """One module of a model: HF's class, the layer it is, and the parameters it owns beside that layer's weight."""

    class_name: str
    layer: Layer | None = None
    bias: bool = False
    own: Mapping[str, tuple[int, ...]] = NONE  # of a module that is no layer: {"weight": (8,)}
    block: AttentionBlock | None = None  # of an attention block that takes an adapter

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
    label_weights: Array | None = None  # one for each label, and the loss is their weighted sum: what CPT asks of a decoder
    input_type_mask: Array | None = None  # (batch, T), CPT's types of the tokens, which `with_prompt` takes and no model receives
    start_positions: Array | None = None  # (batch,), the answer's first token in question answering, and its last
    end_positions: Array | None = None
    past: Cache | None = None  # a cache, or a prefix: keys and values in front, one per layer
    # Of an encoder-decoder, whose `past` is the decoder's, and whose mask and ids above are the encoder's:
    decoder_input_ids: Array | None = None
    decoder_inputs_embeds: Array | None = None
    decoder_attention_mask: Array | None = None  # (batch, past + T)
    cross: Cache | None = None  # what the decoder sees of the encoder: an earlier call's, and no encoder runs


@dataclass(frozen=True, eq=False, kw_only=True)
class Output:
    """What a model returns; None where its class has no such thing."""

    logits: Array | None = None
    loss: Array | None = None  # with labels
    hidden: Array | None = None  # (batch, T, hidden), HF's last_hidden_state
    pooled: Array | None = None  # (batch, hidden), HF's pooler_output
    cache: Cache | None = None  # the past and the new tokens behind it; give it as `past` of the next call
    cross: Cache | None = None  # of an encoder-decoder; give it as `cross` of the next call


@dataclass(frozen=True, eq=False, kw_only=True)
class OutputGradient:
    """The gradient of a number for what `forward` returned: `OutputGradient(loss=1.0)` is the loss itself. None is zero."""

    logits: Array | None = None
    loss: Array | float | None = None
    hidden: Array | None = None
    pooled: Array | None = None


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
    def loss_vjp(self, logits: Array, inputs: Inputs, dloss: Array | float) -> Array:
        """The gradient of the loss for the logits, if there are labels."""

    @abstractmethod
    def vjp(self, net: Net, inputs: Inputs, d: OutputGradient) -> ModelGradients:
        """The gradients of `forward` for all that `net` trains, for the embedded inputs and for the past."""

    @final
    def layers(self) -> dict[str, Layer]:
        found = ((name, part.layer, part.bias) for name, part in self.parts().items() if part.layer is not None)
        return {name: layer.with_bias(bias) for name, layer, bias in found}

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
            found[name] = Module(
                name=name, kind=kind, layer=part.layer, weight=weight, bias=bias, class_name=part.class_name, block=part.block
            )
        return found

    @final
    def net(self, weights: Mapping[str, Array]) -> Net:
        """The network of these weights, with no adapter."""
        blocks = {name: part.block for name, part in self.parts().items() if part.block is not None}
        return Net(weights=weights, layers=self.layers(), ties=self.ties(), blocks=blocks)


def without_loss(model: Model, output: Output, inputs: Inputs, d: OutputGradient) -> OutputGradient:
    """The loss's gradient handed on to the logits."""
    for name in ("logits", "loss", "hidden", "pooled"):
        if getattr(d, name) is not None and getattr(output, name) is None:
            why = "the inputs have no labels" if name == "loss" else f"{type(model).__name__} returns none"
            raise ConfigError(f"a gradient came for the {name}, and {why}.")
    dlogits = d.logits
    if d.loss is not None:
        of_loss = model.loss_vjp(output.logits, inputs, d.loss)
        dlogits = of_loss if dlogits is None else dlogits + of_loss
    if dlogits is None and output.logits is not None:
        dlogits = namespace(output.logits).zeros_like(output.logits)
    return replace(d, logits=dlogits, loss=None)


def embed(net: Net, name: str, inputs: Inputs) -> Array:
    """The tokens looked up in the module `name`, or the embeddings that were given."""
    if (inputs.input_ids is None) == (inputs.inputs_embeds is None):
        raise ConfigError("a model needs input_ids or inputs_embeds, and not both.")
    if inputs.input_type_mask is not None:
        raise ConfigError("input_type_mask is given, and no prompt takes it: only CPT reads the types of tokens.\n  Leave it out.")
    return inputs.inputs_embeds if inputs.input_ids is None else net.apply(name, inputs.input_ids)


def known(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of config.json that a model has a field for; a null is left to the field's default."""
    return {key: value for key, value in config.items() if key in fields and value is not None}
