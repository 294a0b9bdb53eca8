"""What an adapter does to one tensor: the changes that a plan is made of, each a value of names and numbers, and their opened forms.

AddLowRank    a low-rank delta onto a layer's weight
AddStack      the same onto a bare parameter, which may be a stack of matrices
AddBias       what a low-rank method adds to the bias
Scale         IA3's numbers, by which rows or columns are multiplied
Tokens        the rows of some tokens in a table, in the place of those that are there
Replace       another tensor in its place: modules_to_save, trained biases, saved embeddings

`steps.py` has those that take a method's own map of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np

from peft_ref.checkpoints.arithmetic import Ending, buffer, computed_in, tiles
from peft_ref.checkpoints.lowrank import LowRankRows, Product
from peft_ref.checkpoints.pieces import FLOATS, Piece, finite, pread
from peft_ref.checkpoints.plan import Change, NDArray, Rows, Source
from peft_ref.checkpoints.products import bias_of, product_of
from peft_ref.contracts import LowRank
from peft_ref.errors import FileFormatError
from peft_ref.files.safetensors import dtypes
from peft_ref.layers import Layer
from peft_ref.methods.ia3 import IA3
from peft_ref.methods.lora import LoRA
from peft_ref.methods.lora_parameter import Stack, split, unpack
from peft_ref.methods.trainable_tokens import TrainableTokens

TURNED = frozenset({"transposed_linear", "embedding"})  # layers that are stored as the transpose of their matrix


@dataclass(frozen=True)
class OfAdapter(Change):
    source: Source
    held: str  # the dtype in which PEFT holds the adapter's parameters
    computed: str  # the dtype that is computed in

    def adapter(self) -> Path:
        return self.source.folder

    def array(self, tensor: Piece) -> NDArray:
        """A parameter, in the dtype that is computed in."""
        array = finite(tensor)
        if array.dtype.kind not in "fV":  # places in a weight
            return array
        return array.astype(dtypes()[self.held], copy=False).astype(dtypes()[self.computed], copy=False)


@dataclass(frozen=True)
class OfModule(OfAdapter):
    """A change by what an adapter has at one module."""

    module: str
    method: Any  # a WeightMethod, as it is at this module
    layer: Layer
    tensors: tuple[tuple[str, Piece], ...]  # its parameters, by their keys below the module's name

    def params(self) -> Any:
        arrays: Mapping[str, NDArray] = {key: self.array(tensor) for key, tensor in self.tensors}
        return self.method.unpack(self.layer, arrays, where=self.module, own=True)


@final
@dataclass(frozen=True)
class AddLowRank(OfModule):
    first: str | None  # the dtype that the delta is rounded to before it is added
    exact: bool

    def opened(self) -> Rows:
        assert isinstance(self.method, LowRank)
        product = product_of(self.method, self.params(), self.source.weight)
        turned = product.turned() if self.layer.kind in TURNED else product
        return LowRankRows([turned], first=_dtype(self.first), exact=self.exact)


@final
@dataclass(frozen=True)
class AddStack(OfAdapter):
    name: str  # of the parameter
    method: LoRA
    stack: Stack
    A: Piece
    B: Piece
    first: str | None
    exact: bool

    def opened(self) -> Rows:
        tensors = {"lora_A.weight": self.array(self.A), "lora_B.weight": self.array(self.B)}
        A, B = split(self.method, self.stack, unpack(self.method, self.stack, tensors, self.name))
        products = [Product(b, a, (self.method.scale * self.source.weight,)) for a, b in zip(A, B, strict=True)]
        turned = [p.turned() for p in products] if self.stack.transposed else products
        return LowRankRows(turned, first=_dtype(self.first), exact=self.exact)


@final
@dataclass(frozen=True)
class AddBias(OfModule):
    first: str | None

    def opened(self) -> Rows:
        assert isinstance(self.method, LowRank)
        return _Added(bias_of(self.method, self.params(), self.source.weight), _dtype(self.first))


@final
class _Added(Rows):
    def __init__(self, delta: NDArray, first: np.dtype[Any] | None) -> None:
        self._delta, self._ending = delta, Ending(first=first)

    def __call__(self, rows: NDArray, first: int) -> NDArray:
        delta = self._delta[first : first + len(rows), None].astype(computed_in(rows.dtype))
        for across, along in tiles(rows):
            self._ending.onto(rows[across, along], delta[across, along])
        return rows


@final
@dataclass(frozen=True)
class Scale(OfModule):
    part: Literal["weight", "bias"]

    def opened(self) -> Rows:
        assert isinstance(self.method, IA3)
        inputs = self.part == "weight" and self.method.is_feedforward
        numbers = np.repeat(self.params().l, math.prod(self.layer.kernel_size) if inputs else 1)
        return _Scaled(numbers, columns=self.part == "weight" and inputs != (self.layer.kind in TURNED))


@final
class _Scaled(Rows):
    def __init__(self, numbers: NDArray, *, columns: bool) -> None:
        self._numbers, self._columns = numbers, columns

    def __call__(self, rows: NDArray, first: int) -> NDArray:
        for across, along in tiles(rows):
            tile = rows[across, along]
            here = slice(first + across.start, first + across.stop)
            wide = buffer("wide", tile.shape, computed_in(tile.dtype))
            np.copyto(wide, tile, casting="unsafe")
            wide *= self._numbers[None, along] if self._columns else self._numbers[here, None]
            np.copyto(tile, wide, casting="unsafe")
        return rows


@final
@dataclass(frozen=True)
class Tokens(OfModule):
    """Of a table, or a head, that is stored with a row for each token."""

    def opened(self) -> Rows:
        assert isinstance(self.method, TrainableTokens)
        return _Tokens(np.asarray(self.method.token_indices, dtype=np.int64), self.params().D)


@final
class _Tokens(Rows):
    def __init__(self, tokens: NDArray, D: NDArray) -> None:
        self._tokens, self._D = tokens, D

    def __call__(self, rows: NDArray, first: int) -> NDArray:
        here = (self._tokens >= first) & (self._tokens < first + len(rows))
        rows[self._tokens[here] - first] = self._D[here].astype(rows.dtype)
        return rows


@final
@dataclass(frozen=True)
class Replace(Change):
    source: Source
    tensor: Piece
    rows: int

    def adapter(self) -> Path:
        return self.source.folder

    def opened(self) -> Rows:
        return _Replaced(self.tensor, self.rows)


@final
class _Replaced(Rows):
    """Read again for every block, so that a whole table is never held."""

    def __init__(self, tensor: Piece, rows: int) -> None:
        self._tensor, self._columns = tensor, tensor.size // rows if rows else 0
        self._dtype = dtypes()[tensor.dtype]

    def __call__(self, rows: NDArray, first: int) -> NDArray:
        begin, each = self._tensor.begin, self._columns * self._dtype.itemsize
        new = pread(self._tensor, begin + first * each, len(rows) * each).view(self._dtype).reshape(rows.shape)
        if self._tensor.dtype in FLOATS and not np.isfinite(new).all():
            where = f"{self._tensor.path}: tensor {self._tensor.name!r}"
            raise FileFormatError(f"{where} holds a NaN or an infinity.\n  The adapter is broken.")
        np.copyto(rows, new, casting="unsafe")
        return rows


def _dtype(name: str | None) -> np.dtype[Any] | None:
    return None if name is None else dtypes()[name]
