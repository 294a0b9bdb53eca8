"""What an adapter does to one tensor: the changes that a plan is made of, each a value of names and numbers, and their opened forms.

AddLowRank    a low-rank delta onto a layer's weight
AddBias       what a low-rank method adds to the bias
Replace       another tensor in its place: modules_to_save, trained biases, saved embeddings
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from peft_ref.checkpoints.arithmetic import Ending, computed_in, tiles
from peft_ref.checkpoints.lowrank import LowRankRows
from peft_ref.checkpoints.pieces import FLOATS, Piece, finite, pread
from peft_ref.checkpoints.plan import Change, NDArray, Rows, Source
from peft_ref.checkpoints.products import bias_of, product_of
from peft_ref.contracts import LowRank
from peft_ref.errors import FileFormatError
from peft_ref.files.safetensors import dtypes
from peft_ref.layers import Layer


@dataclass(frozen=True)
class OfModule(Change):
    """A change by what an adapter has at one module."""

    source: Source
    module: str
    method: Any  # a WeightMethod, as it is at this module
    layer: Layer
    tensors: tuple[tuple[str, Piece], ...]  # its parameters, by their keys below the module's name
    held: str  # the dtype in which PEFT holds them
    computed: str  # the dtype that is computed in

    def adapter(self) -> Path:
        return self.source.folder

    def params(self) -> Any:
        """The parameters, in the dtype that is computed in."""
        return self.method.unpack(self.layer, self._arrays(), where=self.module, own=True)

    def _arrays(self) -> Mapping[str, NDArray]:
        return {key: _as_held(finite(p), self.held, self.computed) for key, p in self.tensors}


def _as_held(array: NDArray, held: str, computed: str) -> NDArray:
    if array.dtype.kind not in "fV":  # places in a weight
        return array
    return array.astype(dtypes()[held], copy=False).astype(dtypes()[computed], copy=False)


@final
@dataclass(frozen=True)
class AddLowRank(OfModule):
    first: str | None  # the dtype that the delta is rounded to before it is added
    exact: bool

    def opened(self) -> Rows:
        assert isinstance(self.method, LowRank)
        product = product_of(self.method, self.params(), self.source.weight)
        turned = self.layer.kind in ("transposed_linear", "embedding")
        first = None if self.first is None else dtypes()[self.first]
        return LowRankRows([product.turned() if turned else product], first=first, exact=self.exact)


@final
@dataclass(frozen=True)
class AddBias(OfModule):
    first: str | None

    def opened(self) -> Rows:
        assert isinstance(self.method, LowRank)
        return _Added(bias_of(self.method, self.params(), self.source.weight), None if self.first is None else dtypes()[self.first])


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
            raise FileFormatError(
                f"{self._tensor.path}: tensor {self._tensor.name!r} holds a NaN or an infinity.\n  The adapter is broken."
            )
        np.copyto(rows, new, casting="unsafe")
        return rows
