"""What a method promises that adds to an attention block's output. No weight of the model changes, and there is nothing to merge.

    y' = attention(x) + o_proj(added(p, q, k_proj(rows), v_proj(rows)))           rows = rows(p)

    q (batch, heads, T, d)       the block's own queries, after rotary positions
    rows (1, n, hidden)          learned vectors that the block's own projections turn into keys and values (1, groups, n, d)
    added (batch, heads, T, d)   what the method makes of them; through the block's own o_proj, with its bias once more

    block                        rows' keys and values           what is added
    Llama: k_proj, v_proj, o_proj      k_proj, v_proj                  o_proj(added)
    GPT-2: c_attn, c_proj (fused)      the last two thirds of c_attn   added itself, behind c_proj

One adapter is active on a block: naming another swaps it, they do not add up. It goes to the top `adapter_layers` blocks.

HF      peft.AdaptionPromptModel, which wraps the attention module. o_proj is called a second time, so a bias it has counts twice.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, NoReturn, TypeVar, cast, final

import numpy as np

from peft_ref.arrays import Array, namespace
from peft_ref.attention import join_heads, split_heads
from peft_ref.contracts import Method, ParamSpec, declared, shape_of
from peft_ref.errors import ConfigError, KeyMismatchError, NotMergeableError, ShapeError
from peft_ref.layers import Linear

P = TypeVar("P", bound=tuple[Any, ...])


@final
@dataclass(frozen=True, kw_only=True)
class AttentionBlock:
    """An attention block without its numbers."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    fused: bool = False  # one projection makes queries, keys and values: GPT-2's

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.num_attention_heads} heads do not share {self.num_key_value_heads} keys and values evenly.\n"
                "  num_attention_heads must be a multiple of num_key_value_heads."
            )


class Affine(NamedTuple):
    W: Array  # (out, in)
    b: Array | None = None


class Projections(NamedTuple):
    """A block's own, which stay frozen."""

    k: Affine
    v: Affine
    o: Affine | None = None  # None where what is added is not projected


class AddedGradients(NamedTuple, Generic[P]):
    params: P
    q: Array
    k: Array
    v: Array


class BlockGradients(NamedTuple, Generic[P]):
    params: P
    q: Array


@dataclass(frozen=True, kw_only=True)
class AttentionMethod(Method, Generic[P]):
    """A method that adds to an attention block's output."""

    adapter_layers: int | None = None  # how many blocks, from the top

    params_type: ClassVar[type[tuple[Any, ...]]]

    def __post_init__(self) -> None:
        if self.adapter_layers is not None and self.adapter_layers <= 0:
            raise ConfigError(f"adapter_layers={self.adapter_layers}: a positive number is needed.\n  It counts blocks from the top.")

    @abstractmethod
    def dims(self) -> Mapping[str, int]:
        """The letters its shapes are written in, beside hidden."""

    @abstractmethod
    def init(self, hidden_size: int, like: Array, rng: np.random.Generator) -> P:
        """Fresh parameters as HF PEFT makes them, in `like`'s library and dtype."""

    @abstractmethod
    def rows(self, p: P) -> Array:
        """(1, n, hidden), what the block's projections turn into keys and values."""

    @abstractmethod
    def rows_vjp(self, p: P, d: Array) -> P: ...

    @abstractmethod
    def added(self, p: P, q: Array, k: Array, v: Array) -> Array:
        """(batch, heads, T, d), given q of that shape and the rows' keys and values (1, groups, n, d)."""

    @abstractmethod
    def added_vjp(self, p: P, q: Array, k: Array, v: Array, dy: Array) -> AddedGradients[P]:
        """The gradients of `added`; in `params` what does not come through the rows."""

    @final
    def output(self, block: AttentionBlock, p: P, w: Projections, q: Array) -> Array:
        """What is added to the block's output: (batch, T, hidden)."""
        k, v = self._keys_values(block, p, w)
        y = +join_heads(self.added(p, q, k, v))
        return y if w.o is None else _apply(w.o, y)

    @final
    def output_vjp(self, block: AttentionBlock, p: P, w: Projections, q: Array, dy: Array) -> BlockGradients[P]:
        k, v = self._keys_values(block, p, w)
        dy = dy if w.o is None else +(dy @ w.o.W)
        d = self.added_vjp(p, q, k, v, split_heads(dy, block.num_attention_heads))
        of_rows = self.rows_vjp(p, +join_heads(d.k) @ w.k.W + +join_heads(d.v) @ w.v.W)
        return BlockGradients(add_params(of_rows, d.params), d.q)

    def _keys_values(self, block: AttentionBlock, p: P, w: Projections) -> tuple[Array, Array]:
        """Those of the rows. A plus sign: a number that everybody computes as it stands, which bounds its error."""
        k, v = (+split_heads(_apply(part, self.rows(p)), block.num_key_value_heads) for part in (w.k, w.v))
        return k, v

    @final
    def merge(self) -> NoReturn:
        """There is no weight that does the same."""
        raise NotMergeableError(
            f"{type(self).__name__} adds to the output of an attention block, which no weight of the block can do (HF PEFT has no merge"
            " for it either).\n  Keep it beside the model."
        )

    @final
    def spec(self, hidden_size: int) -> tuple[ParamSpec, ...]:
        """Every parameter of one block's adapter: field, checkpoint key, shape."""
        letters = {"hidden": hidden_size, **self.dims()}
        shapes = {name: (shape_of(letter, letters, ()), keys[0].key) for name, (letter, keys) in declared(self.params_type).items()}
        return tuple(ParamSpec(name, key, shape, shape) for name, (shape, key) in shapes.items())

    @final
    def hidden_size_of(self, tensors: Mapping[str, Array]) -> int:
        """The width of the block that `tensors`, by their keys, were made for, as far as they tell."""
        probe = 1_000_003
        for s in self.spec(probe):
            if s.key in tensors and len(tensors[s.key].shape) == len(s.shape) and probe in s.shape:
                return int(tensors[s.key].shape[s.shape.index(probe)])
        return 1

    @final
    def pack(self, params: P) -> dict[str, Array]:
        """Parameters, or their gradients, under their checkpoint keys."""
        return {keys[0].key: getattr(params, name) for name, (_, keys) in declared(self.params_type).items()}

    @final
    def unpack(self, hidden_size: int, tensors: Mapping[str, Array], where: str = "") -> P:
        """Undoes `pack`. Every key must be there, and no other."""
        at, specs = f"{type(self).__name__}{where and f' at {where!r}'}", self.spec(hidden_size)
        expected = {s.key for s in specs}
        if missing := sorted(expected - tensors.keys()):
            raise KeyMismatchError(f"{at}: {', '.join(missing)} missing.\n  Came: {', '.join(sorted(tensors)) or 'nothing'}.")
        if extra := sorted(tensors.keys() - expected):
            raise KeyMismatchError(f"{at}: unexpected {', '.join(extra)}.\n  Expected: {', '.join(sorted(expected))}.")
        for s in specs:
            if tuple(tensors[s.key].shape) != s.shape:
                raise ShapeError(
                    f"{at}: {s.key} is {tuple(tensors[s.key].shape)}, expected {s.shape} ({declared(self.params_type)[s.field][0]}).\n"
                    f"  {self} on a block of hidden_size={hidden_size}."
                )
        return cast(P, self.params_type(**{s.field: tensors[s.key] for s in specs}))


class AttentionAdapter(NamedTuple):
    """One active adapter on one block."""

    method: AttentionMethod[Any]
    params: Any


def add_params(p: P, q: P) -> P:
    """Two Params of one type added, field by field; None stays None."""
    return type(p)(*(a if b is None else b if a is None else a + b for a, b in zip(p, q, strict=True)))


def _apply(part: Affine, x: Array) -> Array:
    out, n_in = part.W.shape
    return Linear(in_features=n_in, out_features=out).apply(x, part.W, part.b)


def shared_by_all(x: Array, batch: int) -> Array:
    """(1, ...) for every example: (batch, ...). Its transpose is the sum over the batch, kept."""
    return namespace(x).broadcast_to(x, (batch, *x.shape[1:]))
