"""T5: an encoder and a decoder of pre-normalised blocks, whose positions are told by a bias of the scores alone.

    a = x + o(attention(q(n), k(n), v(n); M))        n = rms_norm(x)       scores are not scaled: s = 1
    c = a + o(attention(q(m), K, V; M'))             m = rms_norm(a)       the decoder alone;  K = k(E), V = v(E) of the encoder's output E
    y = c + wo(act(wi(r)))                           r = rms_norm(c)       or  wo(act(wi_0(r)) * wi_1(r))  ("gated")

M is the mask plus `relative.py`'s bias, whose table the first block of a stack holds and all its blocks use; M' is the mask alone.
logits = lm_head(d_model^(-1/2) rms_norm(x)) in the first release, without the factor in 1.1 and after it (scale_decoder_outputs).

Paper   Raffel et al. 2020, arXiv:1910.10683; gates: Shazeer 2020, arXiv:2002.05202
HF      transformers.T5ForConditionalGeneration. Since transformers 5 tie_word_embeddings=false in a config.json means no more than
        scale_decoder_outputs=false, which is written from then on. The head is the table of embeddings unless a file holds both, with
        different numbers (1.1, Flan): `load` looks, and `tie_word_embeddings` here says what it saw.
        A model in 16 bits keeps every `wo` in float32 and clamps infinities; here all weights have one dtype and nothing is clamped.
        Position ids and token types are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

from peft_ref.arrays import Array, namespace
from peft_ref.errors import ConfigError
from peft_ref.layers import Embedding, Linear
from peft_ref.nn.attention import (
    KeyValue,
    append,
    append_vjp,
    attention,
    attention_vjp,
    join_heads,
    positions_from,
    split_heads,
)
from peft_ref.nn.encoder_decoder import DECODER, ENCODER, BlockGradients, EncoderDecoder, Source
from peft_ref.nn.functions import activation
from peft_ref.nn.loss import IGNORED
from peft_ref.nn.model import Part, known
from peft_ref.nn.net import Gradients, Net
from peft_ref.nn.relative import buckets, edges
from peft_ref.norms import Norm

SCALE = 1.0


class _Attended(NamedTuple):
    x: Array
    kv: KeyValue
    bias: Array
    net: Gradients


@final
@dataclass(frozen=True, kw_only=True)
class T5(EncoderDecoder):
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dense_act_fn: str = "relu"
    is_gated_act: bool = False
    scale_decoder_outputs: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    decoder_start_token_id: int | None = None

    base_model_prefix: ClassVar[str] = "transformer"
    shared: ClassVar[str] = "shared"
    encoder_embedding: ClassVar[str] = "encoder.embed_tokens"
    decoder_embedding: ClassVar[str] = "decoder.embed_tokens"

    def __post_init__(self) -> None:
        activation(self.dense_act_fn)
        for n in (self.relative_attention_num_buckets // 2, self.relative_attention_num_buckets):
            edges(n, self.relative_attention_max_distance)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> T5:
        """From HF's config.json; what it leaves out has T5Config's default."""
        given = known(config, cls.__dataclass_fields__)
        given.setdefault("num_decoder_layers", given.get("num_layers", cls.num_layers))
        gate, _, act = (config.get("feed_forward_proj") or cls.dense_act_fn).rpartition("-")
        if gate not in ("", "gated"):
            raise ConfigError(f"feed_forward_proj={config['feed_forward_proj']!r}: an activation is expected, or 'gated-' and one.")
        given.setdefault("is_gated_act", bool(gate))
        given.setdefault("dense_act_fn", "gelu_new" if (gate, act) == ("gated", "gelu") else act)
        given.setdefault("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
        return cls(**{**given, "tie_word_embeddings": True, "pad_token_id": config.get("pad_token_id", cls.pad_token_id)})

    def parts(self) -> Mapping[str, Part]:
        table = Part("Embedding", Embedding(num_embeddings=self.vocab_size, embedding_dim=self.d_model))
        parts = {self.shared: table}
        for stack in (ENCODER, DECODER):
            parts |= {stack: Part("T5Stack"), f"{stack}.embed_tokens": table, f"{stack}.block": Part("ModuleList")}
            for name in self.block_names(stack):
                parts |= self._block_parts(name, first=name.endswith(".0"), cross=stack == DECODER)
            parts |= {f"{stack}.final_layer_norm": self._norm_part, f"{stack}.dropout": Part("Dropout")}
        return parts | {"lm_head": _linear(self.d_model, self.vocab_size)}

    def _block_parts(self, name: str, *, first: bool, cross: bool) -> dict[str, Part]:
        layers = [("T5LayerSelfAttention", self._attention_parts("SelfAttention", relative=first))]
        if cross:
            layers.append(("T5LayerCrossAttention", self._attention_parts("EncDecAttention", relative=False)))
        layers.append(("T5LayerFF", self._feed_forward_parts()))
        parts = {name: Part("T5Block"), f"{name}.layer": Part("ModuleList")}
        for n, (class_name, inner) in enumerate(layers):
            layer = f"{name}.layer.{n}"
            parts |= {layer: Part(class_name)} | {f"{layer}.{key}": part for key, part in inner.items()}
            parts |= {f"{layer}.layer_norm": self._norm_part, f"{layer}.dropout": Part("Dropout")}
        return parts

    def _attention_parts(self, name: str, *, relative: bool) -> dict[str, Part]:
        wide = self.num_heads * self.d_kv
        parts = {name: Part("T5Attention")} | {f"{name}.{p}": _linear(self.d_model, wide) for p in "qkv"}
        parts[f"{name}.o"] = _linear(wide, self.d_model)
        if relative:
            table = Embedding(num_embeddings=self.relative_attention_num_buckets, embedding_dim=self.num_heads)
            parts[f"{name}.relative_attention_bias"] = Part("Embedding", table)
        return parts

    def _feed_forward_parts(self) -> dict[str, Part]:
        name = "DenseReluDense"  # whatever the activation
        parts = {name: Part("T5DenseGatedActDense" if self.is_gated_act else "T5DenseActDense")}
        parts |= {f"{name}.{wi}": _linear(self.d_model, self.d_ff) for wi in (("wi_0", "wi_1") if self.is_gated_act else ("wi",))}
        dropout, act = Part("Dropout"), Part(activation(self.dense_act_fn).class_name)
        return {**parts, f"{name}.wo": _linear(self.d_ff, self.d_model), f"{name}.dropout": dropout, f"{name}.act": act}

    @property
    def _norm_part(self) -> Part:
        return Part("T5LayerNorm", Norm(features=self.d_model, eps=self.layer_norm_epsilon, centred=False))

    def ties(self) -> Mapping[str, str]:
        seconds = [self.encoder_embedding, self.decoder_embedding, *(["lm_head"] if self.tie_word_embeddings else [])]
        return {f"{name}.weight": f"{self.shared}.weight" for name in seconds}

    @property
    def output_head(self) -> str:
        return "lm_head"

    def block_names(self, stack: str) -> tuple[str, ...]:
        return tuple(f"{stack}.block.{n}" for n in range(self.num_layers if stack == ENCODER else self.num_decoder_layers))

    def shift_right(self, labels: Array) -> Array:
        """decoder_start_token_id in front and the last label gone; pad_token_id where a label does not count."""
        if self.decoder_start_token_id is None or self.pad_token_id is None:
            raise ConfigError(
                f"decoder_start_token_id={self.decoder_start_token_id}, pad_token_id={self.pad_token_id}: both are needed to shift labels."
                "\n  T5 starts with its pad token. Or give decoder_input_ids."
            )
        xp = namespace(labels)
        ids = xp.concat([0 * labels[:, :1] + self.decoder_start_token_id, labels[:, :-1]], axis=1)
        return xp.where(ids == IGNORED, 0 * ids + self.pad_token_id, ids)

    def position_bias(self, net: Net, stack: str, x: Array, past: int) -> Array:
        xp = namespace(x)
        found = net.apply(_table(stack), self._buckets(stack, x, past))
        return xp.expand_dims(xp.permute_dims(found, (2, 0, 1)), axis=0)

    def position_bias_vjp(self, net: Net, stack: str, x: Array, past: int, d: Array) -> Gradients:
        xp = namespace(x)
        return net.vjp(_table(stack), self._buckets(stack, x, past), xp.permute_dims(xp.sum(d, axis=0), (1, 2, 0)))[1]

    def _buckets(self, stack: str, x: Array, past: int) -> Array:
        """(T, past + T)"""
        T = x.shape[1]
        ahead = positions_from(0, past + T, x) - namespace(x).matrix_transpose(positions_from(past, T, x))
        n, most = self.relative_attention_num_buckets, self.relative_attention_max_distance
        return buckets(ahead, n, most, both_ways=stack == ENCODER)

    def block(self, net: Net, name: str, x: Array, bias: Array, past: KeyValue | None, source: Source | None) -> tuple[Array, KeyValue]:
        x, kept = self._self_attention(net, f"{name}.layer.0", x, bias, past)
        if source is None:
            return self._feed_forward(net, f"{name}.layer.1", x), kept
        return self._feed_forward(net, f"{name}.layer.2", self._cross_attention(net, f"{name}.layer.1", x, source)), kept

    def block_vjp(
        self, net: Net, name: str, x: Array, bias: Array, past: KeyValue | None, source: Source | None, dy: Array
    ) -> BlockGradients:
        a, _ = self._self_attention(net, f"{name}.layer.0", x, bias, past)
        if source is None:
            da, gradients = self._feed_forward_vjp(net, f"{name}.layer.1", a, dy)
            dsource = None
        else:
            c = self._cross_attention(net, f"{name}.layer.1", a, source)
            dc, of_feed_forward = self._feed_forward_vjp(net, f"{name}.layer.2", c, dy)
            da, dsource, of_cross = self._cross_attention_vjp(net, f"{name}.layer.1", a, source, dc)
            gradients = of_feed_forward + of_cross
        dx, dbias, dpast, of_self = self._self_attention_vjp(net, f"{name}.layer.0", x, bias, past, da)
        return BlockGradients(dx, dbias, dpast, dsource, gradients + of_self)

    def source(self, net: Net, name: str, encoded: Array) -> KeyValue:
        return self._keys_values(net, f"{name}.layer.1.EncDecAttention", encoded)

    def source_vjp(self, net: Net, name: str, encoded: Array, d: KeyValue) -> tuple[Array, Gradients]:
        return self._keys_values_vjp(net, f"{name}.layer.1.EncDecAttention", encoded, d)

    def leave(self, net: Net, stack: str, x: Array) -> Array:
        n = net.apply(f"{stack}.final_layer_norm", x)
        return n if stack == ENCODER else net.apply("lm_head", self._head_scale * n)

    def leave_vjp(self, net: Net, stack: str, x: Array, dy: Array) -> tuple[Array, Gradients]:
        name = f"{stack}.final_layer_norm"
        if stack == ENCODER:
            return net.vjp(name, x, dy)
        dn, of_head = net.vjp("lm_head", self._head_scale * net.apply(name, x), dy)
        dx, of_norm = net.vjp(name, x, self._head_scale * dn)
        return dx, of_head + of_norm

    @property
    def _head_scale(self) -> float:
        return self.d_model**-0.5 if self.scale_decoder_outputs else 1.0

    def _self_attention(self, net: Net, name: str, x: Array, bias: Array, past: KeyValue | None) -> tuple[Array, KeyValue]:
        n = net.apply(f"{name}.layer_norm", x)
        kv = append(past, self._keys_values(net, f"{name}.SelfAttention", n))
        return x + self._attend(net, f"{name}.SelfAttention", n, kv, bias), kv

    def _self_attention_vjp(
        self, net: Net, name: str, x: Array, bias: Array, past: KeyValue | None, dy: Array
    ) -> tuple[Array, Array, KeyValue | None, Gradients]:
        n = net.apply(f"{name}.layer_norm", x)
        new = self._keys_values(net, f"{name}.SelfAttention", n)
        d = self._attend_vjp(net, f"{name}.SelfAttention", n, append(past, new), bias, dy)
        dpast, dnew = append_vjp(past, new, d.kv)
        dn, of_kv = self._keys_values_vjp(net, f"{name}.SelfAttention", n, dnew)
        dx, of_norm = net.vjp(f"{name}.layer_norm", x, d.x + dn)
        return dy + dx, d.bias, dpast, d.net + of_kv + of_norm

    def _cross_attention(self, net: Net, name: str, x: Array, source: Source) -> Array:
        n = net.apply(f"{name}.layer_norm", x)
        return x + self._attend(net, f"{name}.EncDecAttention", n, source.kv, source.bias)

    def _cross_attention_vjp(self, net: Net, name: str, x: Array, source: Source, dy: Array) -> tuple[Array, KeyValue, Gradients]:
        n = net.apply(f"{name}.layer_norm", x)
        d = self._attend_vjp(net, f"{name}.EncDecAttention", n, source.kv, source.bias, dy)
        dx, of_norm = net.vjp(f"{name}.layer_norm", x, d.x)
        return dy + dx, d.kv, d.net + of_norm

    def _keys_values(self, net: Net, name: str, x: Array) -> KeyValue:
        return KeyValue(*(split_heads(net.apply(f"{name}.{p}", x), self.num_heads) for p in "kv"))

    def _keys_values_vjp(self, net: Net, name: str, x: Array, d: KeyValue) -> tuple[Array, Gradients]:
        dx_k, of_k = net.vjp(f"{name}.k", x, join_heads(d.k))
        dx_v, of_v = net.vjp(f"{name}.v", x, join_heads(d.v))
        return dx_k + dx_v, of_k + of_v

    def _attend(self, net: Net, name: str, x: Array, kv: KeyValue, bias: Array) -> Array:
        q = split_heads(net.apply(f"{name}.q", x), self.num_heads)
        return net.apply(f"{name}.o", join_heads(attention(q, kv.k, kv.v, bias, SCALE)))

    def _attend_vjp(self, net: Net, name: str, x: Array, kv: KeyValue, bias: Array, dy: Array) -> _Attended:
        q = split_heads(net.apply(f"{name}.q", x), self.num_heads)
        d_joined, of_o = net.vjp(f"{name}.o", join_heads(attention(q, kv.k, kv.v, bias, SCALE)), dy)
        d = attention_vjp(q, kv.k, kv.v, bias, SCALE, split_heads(d_joined, self.num_heads))
        dx, of_q = net.vjp(f"{name}.q", x, join_heads(d.q))
        return _Attended(dx, KeyValue(d.k, d.v), d.bias, of_o + of_q)

    def _feed_forward(self, net: Net, name: str, x: Array) -> Array:
        n, inner, act = net.apply(f"{name}.layer_norm", x), f"{name}.DenseReluDense", activation(self.dense_act_fn)
        if self.is_gated_act:
            return x + net.apply(f"{inner}.wo", act.f(net.apply(f"{inner}.wi_0", n)) * net.apply(f"{inner}.wi_1", n))
        return x + net.apply(f"{inner}.wo", act.f(net.apply(f"{inner}.wi", n)))

    def _feed_forward_vjp(self, net: Net, name: str, x: Array, dy: Array) -> tuple[Array, Gradients]:
        n, inner, act = net.apply(f"{name}.layer_norm", x), f"{name}.DenseReluDense", activation(self.dense_act_fn)
        if self.is_gated_act:
            gate, up = net.apply(f"{inner}.wi_0", n), net.apply(f"{inner}.wi_1", n)
            dh, of_wo = net.vjp(f"{inner}.wo", act.f(gate) * up, dy)
            dn_gate, of_gate = net.vjp(f"{inner}.wi_0", n, act.vjp(gate, dh * up))
            dn_up, of_up = net.vjp(f"{inner}.wi_1", n, dh * act.f(gate))
            dn, gradients = dn_gate + dn_up, of_wo + of_gate + of_up
        else:
            h = net.apply(f"{inner}.wi", n)
            dh, of_wo = net.vjp(f"{inner}.wo", act.f(h), dy)
            dn, of_wi = net.vjp(f"{inner}.wi", n, act.vjp(h, dh))
            gradients = of_wo + of_wi
        dx, of_norm = net.vjp(f"{name}.layer_norm", x, dn)
        return dy + dx, gradients + of_norm


def _linear(n_in: int, out: int) -> Part:
    return Part("Linear", Linear(in_features=n_in, out_features=out))


def _table(stack: str) -> str:
    return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
