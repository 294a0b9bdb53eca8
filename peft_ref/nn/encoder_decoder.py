"""An encoder-decoder by its pieces.

    e = embed(ids)                  e = block_l(e; M_e)  for every l of the encoder                          E = leave(e)
    x = embed(decoder ids)          x = block_l(x; M_d, past_l, source_l(E), M)  for every l of the decoder  logits = leave(x)
    M_e, M_d: mask and position bias of a stack's self-attention, one for all its blocks;  M: the encoder's mask, seen from the decoder
    loss = cross-entropy of the logits at t and the label at t; without ids of its own the decoder gets the labels, shifted by one place

The decoder reaches the encoder's output only through source_l(E), keys and values. So a cache of them stands for the encoder, and walking
back the gradients of all source_l add up to that of E.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, final

from peft_ref.arrays import Array, namespace, zeros_like
from peft_ref.errors import ConfigError
from peft_ref.nn.attention import KeyValue, join_heads, mask_bias
from peft_ref.nn.loss import cross_entropy, cross_entropy_vjp
from peft_ref.nn.model import Cache, Inputs, Model, ModelGradients, Output, OutputGradient, embed, without_loss
from peft_ref.nn.net import Gradients, Net

ENCODER, DECODER = "encoder", "decoder"


class Source(NamedTuple):
    """What one block of the decoder sees of the encoder."""

    kv: KeyValue
    bias: Array  # the mask, as attention adds it


class BlockGradients(NamedTuple):
    x: Array
    bias: Array
    past: KeyValue | None
    source: KeyValue | None
    net: Gradients


class EncoderDecoder(Model):
    encoder_embedding: ClassVar[str]  # the module that looks the encoder's tokens up
    decoder_embedding: ClassVar[str]

    @abstractmethod
    def block_names(self, stack: str) -> tuple[str, ...]: ...

    @abstractmethod
    def position_bias(self, net: Net, stack: str, x: Array, past: int) -> Array:
        """What is added to the scores of the tokens x behind `past` others, beside the mask: (1, heads, T, past + T)."""

    @abstractmethod
    def position_bias_vjp(self, net: Net, stack: str, x: Array, past: int, d: Array) -> Gradients: ...

    @abstractmethod
    def block(self, net: Net, name: str, x: Array, bias: Array, past: KeyValue | None, source: Source | None) -> tuple[Array, KeyValue]:
        """The block's output, and the keys and values of its self-attention with the past's in front. An encoder's has no source."""

    @abstractmethod
    def block_vjp(
        self, net: Net, name: str, x: Array, bias: Array, past: KeyValue | None, source: Source | None, dy: Array
    ) -> BlockGradients: ...

    @abstractmethod
    def source(self, net: Net, name: str, encoded: Array) -> KeyValue:
        """The keys and values that the decoder's block `name` makes of the encoder's output."""

    @abstractmethod
    def source_vjp(self, net: Net, name: str, encoded: Array, d: KeyValue) -> tuple[Array, Gradients]: ...

    @abstractmethod
    def leave(self, net: Net, stack: str, x: Array) -> Array:
        """The encoder's output, or the logits."""

    @abstractmethod
    def leave_vjp(self, net: Net, stack: str, x: Array, dy: Array) -> tuple[Array, Gradients]: ...

    @abstractmethod
    def shift_right(self, labels: Array) -> Array:
        """The ids that the decoder gets for labels (batch, T) where it gets none."""

    @final
    def forward(self, net: Net, inputs: Inputs) -> Output:
        return self._run(net, inputs).output

    @final
    def vjp(self, net: Net, inputs: Inputs, d: OutputGradient) -> ModelGradients:
        run = self._run(net, inputs)
        back = self._back(net, run.decoder, without_loss(self, run.output, inputs, d).logits)
        gradients, dembeds = back.net, None
        if run.decoder_ids is not None:
            gradients = gradients + net.vjp(self.decoder_embedding, run.decoder_ids, back.x)[1]
        if run.encoder is not None:
            dencoded = namespace(run.encoder.y).zeros_like(run.encoder.y)
            for name, dsource in zip(self.block_names(DECODER), back.sources, strict=True):
                more, of_source = self.source_vjp(net, name, run.encoder.y, dsource)
                dencoded, gradients = dencoded + more, gradients + of_source
            front = self._back(net, run.encoder, dencoded)
            gradients, dembeds = gradients + front.net, front.x
            if inputs.input_ids is not None:
                gradients = gradients + net.vjp(self.encoder_embedding, inputs.input_ids, front.x)[1]
        return ModelGradients(
            output=run.output,
            net=gradients,
            inputs_embeds=dembeds,
            past=back.pasts or None,
            decoder_inputs_embeds=back.x,
            cross=back.sources if run.encoder is None else None,
        )

    @final
    def loss_vjp(self, logits: Array, inputs: Inputs, dloss: Array | float) -> Array:
        return cross_entropy_vjp(logits, inputs.labels, dloss)

    @final
    def _run(self, net: Net, inputs: Inputs) -> _Run:
        if inputs.cross is None:
            encoder = self._stack(net, ENCODER, embed(net, self.encoder_embedding, inputs), inputs.attention_mask)
            cross = tuple(self.source(net, name, encoder.y) for name in self.block_names(DECODER))
        else:
            encoder, cross = None, self._for_every_layer("cross", inputs.cross)
            if inputs.input_ids is not None or inputs.inputs_embeds is not None:
                raise ConfigError("`cross` was given, and inputs of the encoder too.\n  It stands for them: give one or the other.")
        ids = self._decoder_ids(inputs)
        embedded = embed(net, self.decoder_embedding, Inputs(input_ids=ids, inputs_embeds=inputs.decoder_inputs_embeds))
        seen = mask_bias(join_heads(cross[0].k), inputs.attention_mask, causal=False)
        sources = [Source(kv, seen) for kv in cross]
        past = None if inputs.past is None else self._for_every_layer("past", inputs.past)
        decoder = self._stack(net, DECODER, embedded, inputs.decoder_attention_mask, past, sources)
        loss = None if inputs.labels is None else cross_entropy(decoder.y, inputs.labels)
        return _Run(Output(logits=decoder.y, loss=loss, cache=decoder.cache, cross=cross), encoder, decoder, ids)

    @final
    def _for_every_layer(self, what: str, given: Cache) -> Cache:
        if len(given) != (layers := len(self.block_names(DECODER))):
            raise ConfigError(f"{what} has keys and values for {len(given)} layers, the decoder has {layers}.")
        return given

    @final
    def _decoder_ids(self, inputs: Inputs) -> Array | None:
        if inputs.decoder_input_ids is not None and inputs.decoder_inputs_embeds is not None:
            raise ConfigError("decoder_input_ids and decoder_inputs_embeds were both given.\n  Give one of them.")
        if inputs.decoder_input_ids is not None or inputs.decoder_inputs_embeds is not None:
            return inputs.decoder_input_ids
        if inputs.labels is None:
            raise ConfigError("a decoder needs decoder_input_ids, decoder_inputs_embeds, or labels to shift.")
        return self.shift_right(inputs.labels)

    @final
    def _stack(
        self, net: Net, stack: str, embedded: Array, mask: Array | None, past: Cache | None = None, given: Sequence[Source] | None = None
    ) -> _Stack:
        names, start = self.block_names(stack), past[0].length if past else 0
        pasts: Sequence[KeyValue | None] = past or (None,) * len(names)
        sources: Sequence[Source | None] = given or (None,) * len(names)
        what = "decoder_attention_mask" if stack == DECODER else "attention_mask"
        bias = mask_bias(embedded, mask, start, causal=stack == DECODER, what=what) + self.position_bias(net, stack, embedded, start)
        xs: list[Array] = [embedded]
        cache: list[KeyValue] = []
        for name, before, source in zip(names, pasts, sources, strict=True):
            x, kept = self.block(net, name, xs[-1], bias, before, source)
            xs, cache = [*xs, x], [*cache, kept]
        return _Stack(stack, xs, self.leave(net, stack, xs[-1]), tuple(cache), bias, start, pasts, sources)

    @final
    def _back(self, net: Net, run: _Stack, dy: Array) -> _Back:
        dx, gradients = self.leave_vjp(net, run.stack, run.xs[-1], dy)
        dbias = zeros_like(tuple(run.bias.shape), run.bias)
        pasts: list[KeyValue] = []
        sources: list[KeyValue] = []
        blocks = list(zip(self.block_names(run.stack), run.xs[:-1], run.pasts, run.sources, strict=True))
        for name, x, past, source in reversed(blocks):
            d = self.block_vjp(net, name, x, run.bias, past, source, dx)
            dx, dbias, gradients = d.x, dbias + d.bias, gradients + d.net
            pasts = pasts if d.past is None else [d.past, *pasts]
            sources = sources if d.source is None else [d.source, *sources]
        gradients = gradients + self.position_bias_vjp(net, run.stack, run.xs[0], run.start, dbias)
        return _Back(dx, tuple(pasts), tuple(sources), gradients)


class _Stack(NamedTuple):
    stack: str
    xs: list[Array]  # the input of every block, and of `leave`
    y: Array
    cache: Cache
    bias: Array
    start: int
    pasts: Sequence[KeyValue | None]
    sources: Sequence[Source | None]


class _Back(NamedTuple):
    x: Array
    pasts: Cache
    sources: Cache
    net: Gradients


class _Run(NamedTuple):
    output: Output
    encoder: _Stack | None
    decoder: _Stack
    decoder_ids: Array | None
