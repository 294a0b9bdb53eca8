"""Transformers that are a row of blocks, all of one width: what an architecture states of them, and what follows.

    x = embedding(ids)      x = enter(x)      x = block_l(x) for every l      Output = leave(x)      loss(logits)

    contract    an architecture writes                                       here, once and final
    Blocks      enter, block, leave, loss, each with vjp                     forward, vjp, the cache
    Decoder     the same without the loss                                    tokens look back alone; the loss of the next token

vjp runs forward once and keeps the input of every block, then walks back; a block's vjp computes again what it needs. About three forwards.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar, NamedTuple, final

from peft_ref.arrays import Array
from peft_ref.errors import ConfigError, ShapeError
from peft_ref.nn.attention import KeyValue, mask_bias, positions_from
from peft_ref.nn.loss import next_token_loss, next_token_loss_vjp, weighted_next_token_loss, weighted_next_token_loss_vjp
from peft_ref.nn.model import Inputs, Model, ModelGradients, Output, OutputGradient, embed, without_loss
from peft_ref.nn.net import Gradients, Net


class Context(NamedTuple):
    """What every block is told beside its input."""

    positions: Array  # (batch or 1, T)
    bias: Array  # the mask, as attention adds it
    token_types: Array | None = None  # (batch, T)


class Blocks(Model):
    """A model by its pieces."""

    embedding: ClassVar[str]  # the module that looks the tokens up
    causal: ClassVar[bool]  # whether a token sees none behind it
    takes_past: ClassVar[bool] = True  # keys and values in front: a cache, a prefix

    @property
    @abstractmethod
    def position_count(self) -> int | None:
        """How many positions its table has; None without a table."""

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
    def leave(self, net: Net, x: Array) -> Output:
        """What the model returns, but for loss and cache."""

    @abstractmethod
    def leave_vjp(self, net: Net, x: Array, d: OutputGradient) -> tuple[Array, Gradients]:
        """`d` has logits wherever `leave` has, and no loss."""

    @abstractmethod
    def loss(self, logits: Array | None, inputs: Inputs) -> Array | None:
        """The loss, or None without labels."""

    @final
    def forward(self, net: Net, inputs: Inputs) -> Output:
        return self._run(net, inputs).output

    @final
    def vjp(self, net: Net, inputs: Inputs, d: OutputGradient) -> ModelGradients:
        run = self._run(net, inputs)
        dx, gradients = self.leave_vjp(net, run.xs[-1], without_loss(self, run.output, inputs, d))
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
        pasts = self._pasts(inputs)
        start = pasts[0].length if pasts and pasts[0] is not None else 0
        bias = mask_bias(embedded, inputs.attention_mask, start, causal=self.causal)
        context = Context(self._positions(inputs, start, embedded), bias, inputs.token_type_ids)
        xs: list[Array] = [self.enter(net, embedded, context)]
        cache: list[KeyValue] = []
        for name, past in zip(names, pasts, strict=True):
            x, kept = self.block(net, name, xs[-1], context, past)
            xs, cache = [*xs, x], [*cache, kept]
        output = self.leave(net, xs[-1])
        loss = self.loss(output.logits, inputs)
        return _Run(replace(output, loss=loss, cache=tuple(cache) if self.causal else None), embedded, context, pasts, xs)

    @final
    def _pasts(self, inputs: Inputs) -> tuple[KeyValue | None, ...]:
        layers = len(self.block_names())
        if inputs.past is None:
            return (None,) * layers
        if not self.takes_past:
            raise ConfigError(
                f"{type(self).__name__} was given past keys and values, which it does not take.\n"
                "  There is no prefix tuning here (HF PEFT refuses it too)."
            )
        if len(inputs.past) != layers:
            raise ConfigError(f"past has keys and values for {len(inputs.past)} layers, the model has {layers}.")
        return inputs.past

    @final
    def _positions(self, inputs: Inputs, start: int, x: Array) -> Array:
        if inputs.position_ids is not None:
            return inputs.position_ids
        end, count = start + x.shape[1], self.position_count
        if count is not None and end > count:
            raise ShapeError(
                f"{type(self).__name__} has {count} positions, and there are {end} tokens, those in front counted in.\n"
                "  Shorten the input, or give position_ids."
            )
        return positions_from(start, x.shape[1], x)


class _Run(NamedTuple):
    output: Output
    embedded: Array
    context: Context
    pasts: tuple[KeyValue | None, ...]
    xs: list[Array]  # the input of every block, and of `leave`


class Decoder(Blocks):
    """A causal language model."""

    causal = True

    @final
    def loss(self, logits: Array, inputs: Inputs) -> Array | None:
        if inputs.labels is None:
            return None
        if inputs.label_weights is not None:
            return weighted_next_token_loss(logits, inputs.labels, inputs.label_weights)
        return next_token_loss(logits, inputs.labels)

    @final
    def loss_vjp(self, logits: Array, inputs: Inputs, dloss: Array | float) -> Array:
        if inputs.label_weights is not None:
            return weighted_next_token_loss_vjp(logits, inputs.labels, inputs.label_weights, dloss)
        return next_token_loss_vjp(logits, inputs.labels, dloss)
