"""What a method of prompts promises: learned vectors that go before a model's own. No weight of the model changes.

    tensors  --encode-->  table  --for every example-->  prompt  --splice (peft_ref/splice.py)-->  what the model receives

    tensors   what is trained, by its name inside PEFT's encoder: "embedding.weight", "mlp_head.0.weight"
    table     (rows, columns), what a file holds as `prompt_embeddings`. What only training needed, an encoder's weights, is not saved
    prompt    (batch, rows, columns)

    place          rows                                               columns                       the prompt becomes
    "embeddings"   num_virtual_tokens num_transformer_submodules      token_dim                     the first tokens of the input
    "cache"        num_virtual_tokens                                 num_layers 2 token_dim        past keys and values of every layer

An encoder-decoder has two submodules: the first half of the rows is the encoder's, the second the decoder's.

HF      peft.PromptLearningConfig. Sizes that a configuration leaves out come from the model's config: `sized`. A saved adapter is in
        inference mode: its encoder is gone, and the table is all there is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias, final

import numpy as np

from peft_ref.arrays import Array, namespace
from peft_ref.contracts import Method
from peft_ref.errors import ConfigError, KeyMismatchError, ShapeError
from peft_ref.sizes import attention_sizes, layers

Tensors: TypeAlias = Mapping[str, Array]

PLACES = ("embeddings", "cache")
SAVED = "prompt_embeddings"
EMBEDDING = "embedding.weight"
IGNORED = -100  # the label that no loss counts


class Context(NamedTuple):
    """What a prompt depends on beside its tensors."""

    batch: int
    task_ids: Array | None = None  # (batch,) integers, for a prompt of the example's own task
    dropout: tuple[Array, ...] = ()  # an encoder's masks, 1 keeps: one for every layer of an LSTM but the last, (rows, 2 hidden)


class Sources(NamedTuple):
    """What a start can be made of."""

    words: Array | None = None  # the model's word embeddings (vocabulary, token_dim)
    tokenize: Callable[[str], Sequence[int]] | None = None  # the token ids of a text, as the model's tokenizer gives them
    tensors: Tensors | None = None  # another adapter's file, by its keys


NO_SOURCES = Sources()


@dataclass(frozen=True, kw_only=True)
class Prompt(Method):
    """A method that puts vectors before a model's own."""

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    inference_mode: bool = False  # the table is given, and no encoder makes it

    place: ClassVar[str] = "embeddings"
    file_keys: ClassVar[frozenset[str]] = frozenset({SAVED})
    only_task: ClassVar[str | None] = None  # where PEFT has the method for one task alone
    as_wide: ClassVar[tuple[str, ...]] = ()  # its own sizes that are token_dim where they are left out
    own_sizes: ClassVar[bool] = True  # whether sizes that a configuration gives count, or always the model's

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value}: a positive number is needed.")

    @property
    def held(self) -> frozenset[str]:
        """The tensors that no training moves."""
        return frozenset()

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every trained tensor, by its name."""

    @abstractmethod
    def init(self, like: Array, rng: np.random.Generator, sources: Sources = NO_SOURCES) -> Tensors:
        """Fresh tensors as HF PEFT makes them, in `like`'s library and dtype."""

    @abstractmethod
    def prompt(self, p: Tensors, ctx: Context) -> Array:
        """(batch, rows, columns)"""

    @abstractmethod
    def prompt_vjp(self, p: Tensors, ctx: Context, d: Array) -> Tensors:
        """The gradient of every tensor, given that of the prompt."""

    def projected(self, p: Tensors) -> Tensors:
        """What is in the tensors once a prompt was made of them, where HF PEFT writes into them: what a training steps from."""
        return p

    def differentiated(self, p: Tensors, ctx: Context) -> Callable[[Tensors], Array]:
        """The map of tensors whose derivative at `p` `prompt_vjp` is: `prompt`, unless something is held constant on purpose."""
        return lambda q: self.prompt(q, ctx)

    @abstractmethod
    def saved(self, p: Tensors) -> Tensors:
        """What a file holds, by its keys there."""

    @abstractmethod
    def loaded(self, file: Tensors) -> Tensors:
        """The tensors that a file holds, for this method in inference mode."""

    @final
    def size(self, name: str) -> int:
        """A size that has to be known by now."""
        value = getattr(self, name)
        if value is None:
            raise ConfigError(f"{name} is not given.\n  Give it, or take it from the model: `method.sized(model_config, task_type)`.")
        return int(value)

    @final
    @property
    def table_shape(self) -> tuple[int, int]:
        """(rows, columns)"""
        tokens, width = self.size("num_virtual_tokens"), self.size("token_dim")
        if self.place == "cache":
            return tokens, 2 * self.size("num_layers") * width
        return tokens * self.size("num_transformer_submodules"), width

    @final
    def sized(self, model: Mapping[str, Any], task_type: str | None = None) -> Self:
        """With the sizes that are left out taken from a model's config.json. `task_type` tells how many submodules it has."""
        given = (self.token_dim, self.num_attention_heads) if self.own_sizes else (None, None)
        width, heads = attention_sizes(model, *given, of_cache=self.place == "cache")
        known: dict[str, Any] = {
            "num_layers": (self.num_layers if self.own_sizes else None) or layers(model),
            "token_dim": width,
            "num_attention_heads": heads,
            "num_transformer_submodules": self.num_transformer_submodules or (2 if task_type == "SEQ_2_SEQ_LM" else 1),
        }
        known |= {name: width for name in self.as_wide if getattr(self, name) is None}
        return replace(self, **known)

    @final
    def in_inference(self) -> Self:
        """The method of a saved adapter: the table is given."""
        return replace(self, inference_mode=True)

    @final
    def fitted(self, table: tuple[int, ...]) -> Self:
        """With the sizes that are left out taken from a saved table (rows, columns), as far as it tells them."""
        known: dict[str, Any] = {}
        tokens, depth, width = self.num_virtual_tokens, self.num_layers, self.token_dim
        if len(table) == 2 and self.place == "cache":
            known = {"token_dim": depth and table[1] // (2 * depth), "num_layers": width and table[1] // (2 * width)}
        elif len(table) == 2:
            known = {"token_dim": table[1], "num_transformer_submodules": tokens and table[0] // tokens}
        return replace(self, **{name: value for name, value in known.items() if value and getattr(self, name) is None})

    @final
    def check(self, p: Tensors, where: str = "", called: Mapping[str, str] = MappingProxyType({})) -> Tensors:
        """`p`, if it has every tensor in its shape and no other. Raises `KeyMismatchError` or `ShapeError`.

        An error says `called[name]` of a tensor that is known by another name where it comes from.
        """
        at, expected = f"{type(self).__name__}{where and f' at {where!r}'}", self.shapes()

        def words(names: Collection[str]) -> str:
            return ", ".join(sorted(called.get(name, name) for name in names)) or "nothing"

        if missing := expected.keys() - p.keys():
            raise KeyMismatchError(f"{at}: {words(missing)} missing.\n  Came: {words(p.keys())}.")
        if extra := p.keys() - expected.keys():
            raise KeyMismatchError(f"{at}: unexpected {words(extra)}.\n  Expected: {words(expected.keys())}.")
        for name, shape in expected.items():
            if tuple(p[name].shape) != shape:
                raise ShapeError(
                    f"{at}: {words([name])} is {tuple(p[name].shape)}, expected {shape}.\n"
                    f"  {self}: take the configuration that belongs to these tensors."
                )
        return p

    @final
    def renamed(self, file: Tensors) -> Tensors:
        """The tensors of a file under their names here, checked."""
        return self.check({EMBEDDING if name == SAVED else name: value for name, value in file.items()}, called={EMBEDDING: SAVED})


class TablePrompt(Prompt):
    """A prompt that is one table for every example."""

    @abstractmethod
    def table(self, p: Tensors, ctx: Context) -> Array:
        """(rows, columns)"""

    @abstractmethod
    def table_vjp(self, p: Tensors, ctx: Context, d: Array) -> Tensors: ...

    @final
    def prompt(self, p: Tensors, ctx: Context) -> Array:
        table = self.table(p, ctx)
        xp = namespace(table)
        return xp.broadcast_to(xp.expand_dims(table, axis=0), (ctx.batch, *table.shape))

    @final
    def prompt_vjp(self, p: Tensors, ctx: Context, d: Array) -> Tensors:
        return self.table_vjp(p, ctx, namespace(d).sum(d, axis=0))

    @final
    def saved(self, p: Tensors) -> Tensors:
        return {SAVED: self.table(p, Context(batch=1))}

    @final
    def loaded(self, file: Tensors) -> Tensors:
        return self.in_inference().renamed(file)


class Counted(NamedTuple):
    """What the loss counts: the mean of cross-entropies is  sum_t weights_t * cross_entropy(logits_(t-1), labels_t)."""

    labels: Array  # (batch, rows + tokens), `IGNORED` where none counts
    weights: Array  # (batch, rows + tokens)


class TypedPrompt(TablePrompt):
    """A table of real words, each of a type, so that they can have labels of their own."""

    @abstractmethod
    def counted(self, labels: Array, types: Array | None, like: Array) -> Counted:
        """For labels (batch, tokens) of the input and their types, or none; weights in `like`'s dtype."""
