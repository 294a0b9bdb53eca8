"""Llama: a decoder of pre-normalised blocks.

    h = x + o(attention(rotate(q(n)), rotate(k(n)), v(n)))       n = rms_norm(x)
    y = h + down(silu(gate(m)) * up(m))                          m = rms_norm(h)

q, k, v, o, gate, up and down are linear; several heads of q share one of k and v ("grouped queries").
logits = lm_head(rms_norm(x)); lm_head may be the embedding table itself (tie_word_embeddings).

Paper   Touvron et al. 2023, arXiv:2302.13971; rotary: Su et al. 2021, arXiv:2104.09864; SwiGLU: Shazeer 2020, arXiv:2002.05202;
        grouped queries: Ainslie et al. 2023, arXiv:2305.13245
HF      transformers.LlamaForCausalLM. The angles of its rotary positions are float32; here they have the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, final

from peft_ref.arrays import Array
from peft_ref.attending import AttentionBlock, add_params
from peft_ref.errors import ConfigError
from peft_ref.layers import Embedding, Linear
from peft_ref.nn.attention import (
    KeyValue,
    append,
    append_vjp,
    attention,
    attention_vjp,
    join_heads,
    rotate,
    rotate_vjp,
    split_heads,
)
from peft_ref.nn.blocks import Context
from peft_ref.nn.functions import activation
from peft_ref.nn.model import Part, known
from peft_ref.nn.net import Gradients, Net
from peft_ref.nn.pre_norm import PreNormDecoder
from peft_ref.nn.rope import Rope
from peft_ref.norms import Norm


@final
@dataclass(frozen=True, kw_only=True)
class Llama(PreNormDecoder):
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: Rope = field(default_factory=Rope)

    base_model_prefix: ClassVar[str] = "model"
    embedding: ClassVar[str] = "model.embed_tokens"
    attention: ClassVar[str] = "self_attn"
    norms: ClassVar[tuple[str, str]] = ("input_layernorm", "post_attention_layernorm")
    last_norm: ClassVar[str] = "model.norm"

    def __post_init__(self) -> None:
        activation(self.hidden_act)
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of num_key_value_heads={self.num_key_value_heads},"
                f"\n  and head_dim={self.head_dim} even."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Llama:
        """From HF's config.json; what it leaves out has LlamaConfig's default."""
        given = known(config, cls.__dataclass_fields__)
        heads = given.get("num_attention_heads", cls.num_attention_heads)
        given.setdefault("num_key_value_heads", heads)
        given.setdefault("head_dim", given.get("hidden_size", cls.hidden_size) // heads)
        return cls(**{**given, "rope": Rope.from_config(config)})

    def parts(self) -> Mapping[str, Part]:
        parts = {
            "model": Part("LlamaModel"),
            self.embedding: Part("Embedding", Embedding(num_embeddings=self.vocab_size, embedding_dim=self.hidden_size)),
            "model.layers": Part("ModuleList"),
        }
        for name in self.block_names():
            parts |= {name + inner: part for inner, part in self._block_parts().items()}
        head = Part("Linear", Linear(in_features=self.hidden_size, out_features=self.vocab_size))
        return {**parts, "model.norm": self._norm, "model.rotary_emb": Part("LlamaRotaryEmbedding"), "lm_head": head}

    def _block_parts(self) -> dict[str, Part]:
        def linear(n_in: int, out: int, bias: bool) -> Part:
            return Part("Linear", Linear(in_features=n_in, out_features=out), bias)

        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "": Part("LlamaDecoderLayer"),
            ".self_attn": Part("LlamaAttention", block=self._attention_block),
            ".self_attn.q_proj": linear(hidden, q, self.attention_bias),
            ".self_attn.k_proj": linear(hidden, kv, self.attention_bias),
            ".self_attn.v_proj": linear(hidden, kv, self.attention_bias),
            ".self_attn.o_proj": linear(q, hidden, self.attention_bias),
            ".mlp": Part("LlamaMLP"),
            ".mlp.gate_proj": linear(hidden, inner, self.mlp_bias),
            ".mlp.up_proj": linear(hidden, inner, self.mlp_bias),
            ".mlp.down_proj": linear(inner, hidden, self.mlp_bias),
            ".mlp.act_fn": Part(activation(self.hidden_act).class_name),
            ".input_layernorm": self._norm,
            ".post_attention_layernorm": self._norm,
        }

    @property
    def _attention_block(self) -> AttentionBlock:
        return AttentionBlock(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
        )

    @property
    def _norm(self) -> Part:
        return Part("LlamaRMSNorm", Norm(features=self.hidden_size, eps=self.rms_norm_eps, centred=False))

    def ties(self) -> Mapping[str, str]:
        return {"lm_head.weight": f"{self.embedding}.weight"} if self.tie_word_embeddings else {}

    @property
    def position_count(self) -> None:
        return None  # angles, no table

    def block_names(self) -> tuple[str, ...]:
        return tuple(f"model.layers.{n}" for n in range(self.num_hidden_layers))

    @cached_property
    def _frequencies(self) -> tuple[float, ...]:
        return self.rope.frequencies(self.head_dim)

    def enter(self, net: Net, x: Array, context: Context) -> Array:
        return x

    def enter_vjp(self, net: Net, x: Array, context: Context, dy: Array) -> tuple[Array, Gradients]:
        return dy, Gradients()

    def mlp(self, net: Net, name: str, x: Array) -> Array:
        gate, up = net.apply(f"{name}.gate_proj", x), net.apply(f"{name}.up_proj", x)
        return net.apply(f"{name}.down_proj", activation(self.hidden_act).f(gate) * up)

    def mlp_vjp(self, net: Net, name: str, x: Array, dy: Array) -> tuple[Array, Gradients]:
        act = activation(self.hidden_act)
        gate, up = net.apply(f"{name}.gate_proj", x), net.apply(f"{name}.up_proj", x)
        opened = act.f(gate)
        dh, of_down = net.vjp(f"{name}.down_proj", opened * up, dy)
        dx_up, of_up = net.vjp(f"{name}.up_proj", x, dh * opened)
        dx_gate, of_gate = net.vjp(f"{name}.gate_proj", x, act.vjp(gate, dh * up))
        return dx_up + dx_gate, of_down + of_up + of_gate

    def _queries(self, net: Net, name: str, x: Array, context: Context) -> Array:
        q = split_heads(net.apply(f"{name}.q_proj", x), self.num_attention_heads)
        return rotate(q, context.positions, self._frequencies)

    def _keys_values(self, net: Net, name: str, x: Array, context: Context) -> KeyValue:
        k, v = (split_heads(net.apply(f"{name}.{p}_proj", x), self.num_key_value_heads) for p in "kv")
        return KeyValue(rotate(k, context.positions, self._frequencies), v)

    def attend(self, net: Net, name: str, x: Array, context: Context, past: KeyValue | None) -> tuple[Array, KeyValue]:
        q, kv = self._queries(net, name, x, context), append(past, self._keys_values(net, name, x, context))
        y = net.apply(f"{name}.o_proj", join_heads(attention(q, kv.k, kv.v, context.bias, self.head_dim**-0.5)))
        if (a := net.attention.get(name)) is None:
            return y, kv
        k, v = self._rows(net, name, a.method.rows(a.params))
        return y + net.apply(f"{name}.o_proj", join_heads(a.method.added(a.params, q, k, v))), kv

    def attend_vjp(
        self, net: Net, name: str, x: Array, context: Context, past: KeyValue | None, dy: Array
    ) -> tuple[Array, KeyValue | None, Gradients]:
        q, new = self._queries(net, name, x, context), self._keys_values(net, name, x, context)
        kv, scale = append(past, new), self.head_dim**-0.5
        y = attention(q, kv.k, kv.v, context.bias, scale)
        d_joined, of_o = net.vjp(f"{name}.o_proj", join_heads(y), dy)
        d = attention_vjp(q, kv.k, kv.v, context.bias, scale, split_heads(d_joined, self.num_attention_heads))
        dpast, dnew = append_vjp(past, new, KeyValue(d.k, d.v))
        dq_added, of_added = self._added_vjp(net, name, q, dy)
        dq = d.q if dq_added is None else d.q + dq_added
        dq = rotate_vjp(q, context.positions, self._frequencies, dq)
        dk = rotate_vjp(new.k, context.positions, self._frequencies, dnew.k)
        dx_q, of_q = net.vjp(f"{name}.q_proj", x, join_heads(dq))
        dx_k, of_k = net.vjp(f"{name}.k_proj", x, join_heads(dk))
        dx_v, of_v = net.vjp(f"{name}.v_proj", x, join_heads(dnew.v))
        return dx_q + dx_k + dx_v, dpast, of_o + of_q + of_k + of_v + of_added

    def _rows(self, net: Net, name: str, rows: Array) -> KeyValue:
        """The keys and values of a block's adapter, which have no position."""
        return KeyValue(*(split_heads(net.apply(f"{name}.{p}_proj", rows), self.num_key_value_heads) for p in "kv"))

    def _added_vjp(self, net: Net, name: str, q: Array, dy: Array) -> tuple[Array | None, Gradients]:
        """The gradients of what a block's adapter adds: for q, and for what is trained."""
        if (a := net.attention.get(name)) is None:
            return None, Gradients()
        rows = a.method.rows(a.params)
        k, v = self._rows(net, name, rows)
        d_joined, of_o = net.vjp(f"{name}.o_proj", join_heads(a.method.added(a.params, q, k, v)), dy)
        d = a.method.added_vjp(a.params, q, k, v, split_heads(d_joined, self.num_attention_heads))
        drows_k, of_k = net.vjp(f"{name}.k_proj", rows, join_heads(d.k))
        drows_v, of_v = net.vjp(f"{name}.v_proj", rows, join_heads(d.v))
        params = add_params(a.method.rows_vjp(a.params, drows_k + drows_v), d.params)
        return d.q, of_o + of_k + of_v + Gradients(adapters={name: (params,)})
