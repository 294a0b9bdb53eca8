"""GPT-2: a decoder of pre-normalised blocks with learned positions.

    x = wte(ids) + wpe(positions)                      and + wte(token types), where they are given
    h = x + c_proj(attention(q, k, v))                 q, k, v = c_attn(layer_norm(x)) in three parts
    y = h + c_proj(f(c_fc(layer_norm(h))))             f is gelu_new
    logits = lm_head(layer_norm(x))                    lm_head is the table wte itself (tie_word_embeddings)

c_attn, c_proj and c_fc are HF's `Conv1D`: linear maps whose weight is stored (in, out). Scores are scaled by 1 / sqrt(d), and by
1 / (l + 1) in block l with scale_attn_by_inverse_layer_idx.

Paper   Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
HF      transformers.GPT2LMHeadModel. reorder_and_upcast_attn changes the order of rounding alone: read and not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from peft_ref.arrays import Array, namespace
from peft_ref.attending import AttentionBlock, add_params
from peft_ref.errors import ConfigError
from peft_ref.layers import Embedding, Linear
from peft_ref.nn.attention import KeyValue, append, append_vjp, attention, attention_vjp, join_heads, split_heads
from peft_ref.nn.blocks import Context
from peft_ref.nn.functions import activation, sum_to
from peft_ref.nn.model import Part, known
from peft_ref.nn.modules import feed_forward, feed_forward_vjp
from peft_ref.nn.net import Gradients, Net
from peft_ref.nn.pre_norm import PreNormDecoder
from peft_ref.norms import Norm


@final
@dataclass(frozen=True, kw_only=True)
class GPT2(PreNormDecoder):
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # 4 n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True

    base_model_prefix: ClassVar[str] = "transformer"
    embedding: ClassVar[str] = "transformer.wte"
    attention: ClassVar[str] = "attn"
    norms: ClassVar[tuple[str, str]] = ("ln_1", "ln_2")
    last_norm: ClassVar[str] = "transformer.ln_f"

    def __post_init__(self) -> None:
        activation(self.activation_function)
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GPT2:
        """From HF's config.json; what it leaves out has GPT2Config's default."""
        if config.get("add_cross_attention"):
            raise ConfigError("add_cross_attention=True: a GPT-2 that looks at an encoder is not built here.")
        return cls(**known(config, cls.__dataclass_fields__))

    def parts(self) -> Mapping[str, Part]:
        def table(rows: int) -> Part:
            return Part("Embedding", Embedding(num_embeddings=rows, embedding_dim=self.n_embd))

        parts = {
            "transformer": Part("GPT2Model"),
            self.embedding: table(self.vocab_size),
            "transformer.wpe": table(self.n_positions),
            "transformer.drop": Part("Dropout"),
            "transformer.h": Part("ModuleList"),
        }
        for name in self.block_names():
            parts |= {name + inner: part for inner, part in self._block_parts().items()}
        head = Part("Linear", Linear(in_features=self.n_embd, out_features=self.vocab_size))
        return {**parts, "transformer.ln_f": self._norm, "lm_head": head}

    def _block_parts(self) -> dict[str, Part]:
        def conv1d(n_in: int, out: int) -> Part:
            return Part("Conv1D", Linear(in_features=n_in, out_features=out, transposed=True), bias=True)

        width, inner = self.n_embd, self.n_inner or 4 * self.n_embd
        return {
            "": Part("GPT2Block"),
            ".ln_1": self._norm,
            ".attn": Part("GPT2Attention", block=self._attention_block),
            ".attn.c_attn": conv1d(width, 3 * width),
            ".attn.c_proj": conv1d(width, width),
            ".attn.attn_dropout": Part("Dropout"),
            ".attn.resid_dropout": Part("Dropout"),
            ".ln_2": self._norm,
            ".mlp": Part("GPT2MLP"),
            ".mlp.c_fc": conv1d(width, inner),
            ".mlp.c_proj": conv1d(inner, width),
            ".mlp.act": Part(activation(self.activation_function).class_name),
            ".mlp.dropout": Part("Dropout"),
        }

    @property
    def _attention_block(self) -> AttentionBlock:
        heads = self.n_head
        return AttentionBlock(
            hidden_size=self.n_embd, num_attention_heads=heads, num_key_value_heads=heads, head_dim=self.n_embd // heads, fused=True
        )

    @property
    def _norm(self) -> Part:
        return Part("LayerNorm", Norm(features=self.n_embd, eps=self.layer_norm_epsilon), bias=True)

    def ties(self) -> Mapping[str, str]:
        return {"lm_head.weight": f"{self.embedding}.weight"} if self.tie_word_embeddings else {}

    @property
    def position_count(self) -> int:
        return self.n_positions

    def block_names(self) -> tuple[str, ...]:
        return tuple(f"transformer.h.{n}" for n in range(self.n_layer))

    def enter(self, net: Net, x: Array, context: Context) -> Array:
        x = x + net.apply("transformer.wpe", context.positions)
        return x if context.token_types is None else x + net.apply(self.embedding, context.token_types)

    def enter_vjp(self, net: Net, x: Array, context: Context, dy: Array) -> tuple[Array, Gradients]:
        found = net.vjp("transformer.wpe", context.positions, sum_to(dy, (*context.positions.shape, self.n_embd)))[1]
        if context.token_types is not None:
            found = found + net.vjp(self.embedding, context.token_types, dy)[1]
        return dy, found

    def mlp(self, net: Net, name: str, x: Array) -> Array:
        return feed_forward(net, f"{name}.c_fc", f"{name}.c_proj", activation(self.activation_function), x)

    def mlp_vjp(self, net: Net, name: str, x: Array, dy: Array) -> tuple[Array, Gradients]:
        return feed_forward_vjp(net, f"{name}.c_fc", f"{name}.c_proj", activation(self.activation_function), x, dy)

    def _scale(self, name: str) -> float:
        scale = (self.n_embd // self.n_head) ** -0.5 if self.scale_attn_weights else 1.0
        return scale / (self.block_names().index(name.removesuffix(".attn")) + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def _queries_keys_values(self, net: Net, name: str, x: Array) -> tuple[Array, KeyValue]:
        fused, n = net.apply(f"{name}.c_attn", x), self.n_embd
        q, k, v = (split_heads(fused[..., i * n : (i + 1) * n], self.n_head) for i in range(3))
        return q, KeyValue(k, v)

    def attend(self, net: Net, name: str, x: Array, context: Context, past: KeyValue | None) -> tuple[Array, KeyValue]:
        q, new = self._queries_keys_values(net, name, x)
        kv = append(past, new)
        y = net.apply(f"{name}.c_proj", join_heads(attention(q, kv.k, kv.v, context.bias, self._scale(name))))
        if (a := net.attention.get(name)) is None:
            return y, kv
        k, v = self._queries_keys_values(net, name, a.method.rows(a.params))[1]
        return y + join_heads(a.method.added(a.params, q, k, v)), kv

    def attend_vjp(
        self, net: Net, name: str, x: Array, context: Context, past: KeyValue | None, dy: Array
    ) -> tuple[Array, KeyValue | None, Gradients]:
        q, new = self._queries_keys_values(net, name, x)
        kv, scale = append(past, new), self._scale(name)
        y = attention(q, kv.k, kv.v, context.bias, scale)
        d_joined, of_proj = net.vjp(f"{name}.c_proj", join_heads(y), dy)
        d = attention_vjp(q, kv.k, kv.v, context.bias, scale, split_heads(d_joined, self.n_head))
        dpast, dnew = append_vjp(past, new, KeyValue(d.k, d.v))
        dq_added, of_added = self._added_vjp(net, name, q, dy)
        dq = d.q if dq_added is None else d.q + dq_added
        dfused = namespace(x).concat([join_heads(part) for part in (dq, dnew.k, dnew.v)], axis=-1)
        dx, of_attn = net.vjp(f"{name}.c_attn", x, dfused)
        return dx, dpast, of_proj + of_attn + of_added

    def _added_vjp(self, net: Net, name: str, q: Array, dy: Array) -> tuple[Array | None, Gradients]:
        """The gradients of what a block's adapter adds: for q, and for what is trained. The rows' own queries are used by nobody."""
        if (a := net.attention.get(name)) is None:
            return None, Gradients()
        rows = a.method.rows(a.params)
        unused, kv = self._queries_keys_values(net, name, rows)
        d = a.method.added_vjp(a.params, q, kv.k, kv.v, split_heads(dy, self.n_head))
        dfused = namespace(q).concat([join_heads(part) for part in (0 * unused, d.k, d.v)], axis=-1)
        drows, of_attn = net.vjp(f"{name}.c_attn", rows, dfused)
        params = add_params(a.method.rows_vjp(a.params, drows), d.params)
        return d.q, of_attn + Gradients(adapters={name: (params,)})
