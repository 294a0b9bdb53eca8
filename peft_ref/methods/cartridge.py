"""Cartridge: learn the cache of keys and values that a long text would leave, its first tokens held still.

    table = [F; T]        F (frozen, layers 2 dim)    T (tokens - frozen, layers 2 dim)

A row of the table holds keys and values as prefix tuning's does: `peft_ref.splice.key_values` cuts it.
For a gradient G of the table:   dT = G's rows from `frozen` on.   F is constant: its gradient is zero, whatever G says.

Paper   Eyuboglu et al. 2025, arXiv:2506.06266
HF      peft.CartridgeConfig. All rows start standard normal; the start that the paper recommends, the cache of a text's first tokens, is
        a step of its own: `rows_of_cache`. A file holds the one table, and which rows are frozen is said by num_frozen_tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from peft_ref.arrays import Array, namespace, to, zeros_like
from peft_ref.errors import ConfigError, ShapeError
from peft_ref.prompts import EMBEDDING, NO_SOURCES, Context, Sources, TablePrompt, Tensors

FROZEN, TRAINED = "frozen_embedding", "trainable_embedding"


@final
@dataclass(frozen=True, kw_only=True)
class Cartridge(TablePrompt):
    num_frozen_tokens: int = 1

    peft_type: ClassVar[str] = "CARTRIDGE"
    tuner_prefix: ClassVar[str] = "cartridge_"
    place: ClassVar[str] = "cache"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_frozen_tokens < 0:
            raise ConfigError(f"num_frozen_tokens={self.num_frozen_tokens}: 0 or more is needed (HF PEFT refuses it too).")
        if self.num_virtual_tokens is not None and self.num_frozen_tokens > self.num_virtual_tokens:
            raise ConfigError(
                f"num_frozen_tokens={self.num_frozen_tokens} with num_virtual_tokens={self.num_virtual_tokens}:"
                " no more can be frozen than there are (HF PEFT refuses it too)."
            )

    @property
    def held(self) -> frozenset[str]:
        return frozenset({EMBEDDING if self.inference_mode else FROZEN})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        tokens, columns = self.table_shape
        if self.inference_mode:
            return {EMBEDDING: (tokens, columns)}
        frozen = {FROZEN: (self.num_frozen_tokens, columns)} if self.num_frozen_tokens else {}
        return {**frozen, TRAINED: (tokens - self.num_frozen_tokens, columns)}

    def init(self, like: Array, rng: np.random.Generator, sources: Sources = NO_SOURCES) -> Tensors:
        return {name: to(rng.normal(size=shape), like) for name, shape in self.shapes().items()}

    def table(self, p: Tensors, ctx: Context) -> Array:
        parts = [p[name] for name in self.shapes()]
        return namespace(*parts).concat(parts)

    def table_vjp(self, p: Tensors, ctx: Context, d: Array) -> Tensors:
        if self.inference_mode:
            return {EMBEDDING: d}
        frozen = {FROZEN: zeros_like(tuple(p[FROZEN].shape), d)} if self.num_frozen_tokens else {}
        return {**frozen, TRAINED: d[self.num_frozen_tokens :, :]}

    def differentiated(self, p: Tensors, ctx: Context) -> Callable[[Tensors], Array]:
        """`prompt` with the frozen rows of `p`."""
        return lambda q: self.prompt({**q, **{name: p[name] for name in (FROZEN,) if name in p}}, ctx)

    def split(self, table: Array) -> Tensors:
        """The tensors of training from a table (rows, columns): a saved one, or `rows_of_cache`."""
        if self.inference_mode or tuple(table.shape) != self.table_shape:
            raise ShapeError(
                f"Cartridge: the table is {tuple(table.shape)}, expected {self.table_shape} and a method that trains.\n"
                "  In inference mode the table is all there is: replace(method, inference_mode=False)."
            )
        frozen = {FROZEN: table[: self.num_frozen_tokens, :]} if self.num_frozen_tokens else {}
        return {**frozen, TRAINED: table[self.num_frozen_tokens :, :]}


def rows_of_cache(cache: Array, tokens: int) -> Array:
    """The table whose keys and values are the first `tokens` of one sequence's cache (layers, 2, 1, heads, n, head_dim)."""
    layers, _, batch, heads, n, head_dim = cache.shape
    if batch != 1 or n < tokens:
        raise ShapeError(f"the cache is of {batch} sequences of {n} tokens, expected one sequence of at least {tokens}.")
    xp = namespace(cache)
    first = xp.permute_dims(cache[:, :, 0, :, :tokens, :], (3, 0, 1, 2, 4))
    return xp.reshape(first, (tokens, layers * 2 * heads * head_dim))


def composed(method: Cartridge, tables: Sequence[Array]) -> tuple[Cartridge, Array]:
    """Several saved cartridges one behind the other: one longer table, with the first one's frozen rows.  `method` is the first's."""
    table = namespace(*tables).concat(list(tables))
    return replace(method, num_virtual_tokens=int(table.shape[0])), table
