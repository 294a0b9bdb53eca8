"""BERT: an encoder of post-normalised blocks. Every token sees every other.

    x = layer_norm(word(ids) + type(token types) + position(positions))
    h = layer_norm(x + dense(attention(query(x), key(x), value(x))))
    y = layer_norm(h + dense(f(dense(h))))                                     f is gelu
    pooled = tanh(dense(y of the first token))

Token types are 0 where none are given. The heads on y or on pooled are in peft_ref/nn/bert_heads.py.

Paper   Devlin et al. 2018, arXiv:1810.04805
HF      transformers.BertModel. torch withholds the gradient of the padding token's row (padding_idx = pad_token_id) from the word table and
        from an adapter on it; here it has the derivative. Under a mask, and a loss that does not count padding, both are zero.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

from peft_ref.arrays import Array, namespace, pad
from peft_ref.errors import ConfigError
from peft_ref.layers import Embedding, Linear
from peft_ref.nn.attention import KeyValue, append, append_vjp, attention, attention_vjp, join_heads, split_heads
from peft_ref.nn.blocks import Blocks, Context
from peft_ref.nn.functions import activation, sum_to, tanh, tanh_vjp
from peft_ref.nn.model import Output, OutputGradient, Part, known
from peft_ref.nn.modules import feed_forward, feed_forward_vjp
from peft_ref.nn.net import Gradients, Net
from peft_ref.norms import Norm


@dataclass(frozen=True, kw_only=True)
class Bert(Blocks):
    """What BERT's classes share: all but the head."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    tie_word_embeddings: bool = True

    causal = False
    takes_past = False
    root: ClassVar[str] = "bert."  # before the names of the encoder's modules
    embedding: ClassVar[str] = "bert.embeddings.word_embeddings"
    base_model_prefix: ClassVar[str] = "bert"
    pools: ClassVar[bool]  # whether there is a pooler, and the head is on it

    @abstractmethod
    def head_parts(self) -> Mapping[str, Part]: ...

    @abstractmethod
    def head(self, net: Net, x: Array) -> Array | None:
        """The logits of `pooled`, or of every token's y where nothing is pooled."""

    @abstractmethod
    def head_vjp(self, net: Net, x: Array, dy: Array) -> tuple[Array, Gradients]: ...

    def __post_init__(self) -> None:
        activation(self.hidden_act)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From HF's config.json; what it leaves out has BertConfig's default. The number of classes is the length of id2label, or 2."""
        if config.get("is_decoder"):
            raise ConfigError("is_decoder=True: a BERT that is a decoder is not built here.")
        if (kind := config.get("position_embedding_type", "absolute")) != "absolute":
            raise ConfigError(f"position_embedding_type={kind!r} is not built here (transformers 5 dropped it).\n  There is 'absolute'.")
        given = known(config, cls.__dataclass_fields__)
        if "num_labels" in cls.__dataclass_fields__ and config.get("id2label"):
            given["num_labels"] = len(config["id2label"])
        return cls(**given)

    @final
    def parts(self) -> Mapping[str, Part]:
        top = {} if not self.root else {self.root.removesuffix("."): Part("BertModel")}
        inner = {
            "embeddings": Part("BertEmbeddings"),
            "embeddings.word_embeddings": self._table(self.vocab_size),
            "embeddings.position_embeddings": self._table(self.max_position_embeddings),
            "embeddings.token_type_embeddings": self._table(self.type_vocab_size),
            "embeddings.LayerNorm": self.norm_part,
            "embeddings.dropout": Part("Dropout"),
            "encoder": Part("BertEncoder"),
            "encoder.layer": Part("ModuleList"),
        }
        for n in range(self.num_hidden_layers):
            inner |= {f"encoder.layer.{n}{name}": part for name, part in self._block_parts().items()}
        if self.pools:
            width = self.hidden_size
            inner |= {"pooler": Part("BertPooler"), "pooler.dense": self.linear(width, width), "pooler.activation": Part("Tanh")}
        return {**top, **{self.root + name: part for name, part in inner.items()}, **self.head_parts()}

    @final
    def _block_parts(self) -> dict[str, Part]:
        width, inner = self.hidden_size, self.intermediate_size
        return {
            "": Part("BertLayer"),
            ".attention": Part("BertAttention"),
            ".attention.self": Part("BertSelfAttention"),
            ".attention.self.query": self.linear(width, width),
            ".attention.self.key": self.linear(width, width),
            ".attention.self.value": self.linear(width, width),
            ".attention.self.dropout": Part("Dropout"),
            ".attention.output": Part("BertSelfOutput"),
            ".attention.output.dense": self.linear(width, width),
            ".attention.output.LayerNorm": self.norm_part,
            ".attention.output.dropout": Part("Dropout"),
            ".intermediate": Part("BertIntermediate"),
            ".intermediate.dense": self.linear(width, inner),
            ".intermediate.intermediate_act_fn": Part(activation(self.hidden_act).class_name),
            ".output": Part("BertOutput"),
            ".output.dense": self.linear(inner, width),
            ".output.LayerNorm": self.norm_part,
            ".output.dropout": Part("Dropout"),
        }

    @final
    def linear(self, n_in: int, out: int) -> Part:
        return Part("Linear", Linear(in_features=n_in, out_features=out), bias=True)

    @final
    def _table(self, rows: int) -> Part:
        return Part("Embedding", Embedding(num_embeddings=rows, embedding_dim=self.hidden_size))

    @final
    @property
    def norm_part(self) -> Part:
        return Part("LayerNorm", Norm(features=self.hidden_size, eps=self.layer_norm_eps), bias=True)

    @final
    @property
    def position_count(self) -> int:
        return self.max_position_embeddings

    @final
    def block_names(self) -> tuple[str, ...]:
        return tuple(f"{self.root}encoder.layer.{n}" for n in range(self.num_hidden_layers))

    @final
    def enter(self, net: Net, x: Array, context: Context) -> Array:
        return net.apply(f"{self.root}embeddings.LayerNorm", self._embedded(net, x, context))

    @final
    def enter_vjp(self, net: Net, x: Array, context: Context, dy: Array) -> tuple[Array, Gradients]:
        at = f"{self.root}embeddings"
        dx, found = net.vjp(f"{at}.LayerNorm", self._embedded(net, x, context), dy)
        for name, places in (("token_type", self._types(context)), ("position", context.positions)):
            found = found + net.vjp(f"{at}.{name}_embeddings", places, sum_to(dx, (*places.shape, self.hidden_size)))[1]
        return dx, found

    @final
    def _embedded(self, net: Net, x: Array, context: Context) -> Array:
        at = f"{self.root}embeddings"
        x = x + net.apply(f"{at}.token_type_embeddings", self._types(context))
        return x + net.apply(f"{at}.position_embeddings", context.positions)

    @final
    def _types(self, context: Context) -> Array:
        return namespace(context.positions).zeros_like(context.positions) if context.token_types is None else context.token_types

    @final
    def block(self, net: Net, name: str, x: Array, context: Context, past: KeyValue | None) -> tuple[Array, KeyValue]:
        y, kept = self._attend(net, f"{name}.attention", x, context, past)
        h = net.apply(f"{name}.attention.output.LayerNorm", x + y)
        return net.apply(f"{name}.output.LayerNorm", h + self._mlp(net, name, h)), kept

    @final
    def block_vjp(
        self, net: Net, name: str, x: Array, context: Context, past: KeyValue | None, dy: Array
    ) -> tuple[Array, KeyValue | None, Gradients]:
        f = activation(self.hidden_act)
        m = x + self._attend(net, f"{name}.attention", x, context, past)[0]
        h = net.apply(f"{name}.attention.output.LayerNorm", m)
        dn, of_last = net.vjp(f"{name}.output.LayerNorm", h + self._mlp(net, name, h), dy)
        dh, of_mlp = feed_forward_vjp(net, f"{name}.intermediate.dense", f"{name}.output.dense", f, h, dn)
        dm, of_first = net.vjp(f"{name}.attention.output.LayerNorm", m, dn + dh)
        dx, dpast, of_attention = self._attend_vjp(net, f"{name}.attention", x, context, past, dm)
        return dm + dx, dpast, of_last + of_mlp + of_first + of_attention

    @final
    def leave(self, net: Net, x: Array) -> Output:
        pooled = tanh(self._before_tanh(net, x)) if self.pools else None
        return Output(hidden=x, pooled=pooled, logits=self.head(net, x if pooled is None else pooled))

    @final
    def leave_vjp(self, net: Net, x: Array, d: OutputGradient) -> tuple[Array, Gradients]:
        xp, found = namespace(x), Gradients()
        dx = xp.zeros_like(x) if d.hidden is None else d.hidden
        if not self.pools:
            dhead, found = self.head_vjp(net, x, d.logits)
            return dx + dhead, found
        z = self._before_tanh(net, x)
        dpooled = xp.zeros_like(z) if d.pooled is None else d.pooled
        if d.logits is not None:
            dhead, found = self.head_vjp(net, tanh(z), d.logits)
            dpooled = dpooled + dhead
        dfirst, of_pooler = net.vjp(f"{self.root}pooler.dense", x[:, 0, :], tanh_vjp(z, dpooled))
        return dx + pad(xp.expand_dims(dfirst, axis=1), 1, 0, x.shape[1] - 1), found + of_pooler

    @final
    def _before_tanh(self, net: Net, x: Array) -> Array:
        return net.apply(f"{self.root}pooler.dense", x[:, 0, :])

    @final
    def _mlp(self, net: Net, name: str, x: Array) -> Array:
        return feed_forward(net, f"{name}.intermediate.dense", f"{name}.output.dense", activation(self.hidden_act), x)

    @final
    def _projected(self, net: Net, name: str, x: Array) -> tuple[Array, KeyValue]:
        q, k, v = (split_heads(net.apply(f"{name}.self.{p}", x), self.num_attention_heads) for p in ("query", "key", "value"))
        return q, KeyValue(k, v)

    @final
    @property
    def _scale(self) -> float:
        return float((self.hidden_size // self.num_attention_heads) ** -0.5)

    @final
    def _attend(self, net: Net, name: str, x: Array, context: Context, past: KeyValue | None) -> tuple[Array, KeyValue]:
        q, new = self._projected(net, name, x)
        kv = append(past, new)
        return net.apply(f"{name}.output.dense", join_heads(attention(q, kv.k, kv.v, context.bias, self._scale))), kv

    @final
    def _attend_vjp(
        self, net: Net, name: str, x: Array, context: Context, past: KeyValue | None, dy: Array
    ) -> tuple[Array, KeyValue | None, Gradients]:
        q, new = self._projected(net, name, x)
        kv = append(past, new)
        y = attention(q, kv.k, kv.v, context.bias, self._scale)
        d_joined, of_dense = net.vjp(f"{name}.output.dense", join_heads(y), dy)
        d = attention_vjp(q, kv.k, kv.v, context.bias, self._scale, split_heads(d_joined, self.num_attention_heads))
        dpast, dnew = append_vjp(past, new, KeyValue(d.k, d.v))
        dx_q, of_q = net.vjp(f"{name}.self.query", x, join_heads(d.q))
        dx_k, of_k = net.vjp(f"{name}.self.key", x, join_heads(dnew.k))
        dx_v, of_v = net.vjp(f"{name}.self.value", x, join_heads(dnew.v))
        return dx_q + dx_k + dx_v, dpast, of_dense + of_q + of_k + of_v
