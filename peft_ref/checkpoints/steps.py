"""Changes by a method's own map of the weight, as `peft_ref.stack` takes it: what is no product of two thin factors.

    Step      what one adapter makes of a layer's weight or bias
    Fresh     what an init leaves of the frozen weight (pissa, olora, loftq, KaSA): PEFT runs it again when it loads the adapter

A step needs the whole tensor, in float32, unless its method works row by row. What it reads beside it (the weight as it was under all
adapters, for DoRA's norm; the weight, for the bias of GLoRA) it reads from the base again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import numpy as np

from peft_ref.checkpoints.changes import OfModule
from peft_ref.checkpoints.pieces import Piece, pread
from peft_ref.checkpoints.plan import Change, NDArray, Rows, Source
from peft_ref.checkpoints.remade import Home, remade
from peft_ref.checkpoints.ways import OWN, State, exact_delta
from peft_ref.conditioned import Conditioned
from peft_ref.contracts import Additive
from peft_ref.files.adapter import load_config
from peft_ref.files.safetensors import dtypes
from peft_ref.large import cut, part
from peft_ref.layers import Layer
from peft_ref.model.attaching import start_of
from peft_ref.stack import Adapter, step


class Frozen(NamedTuple):
    """A parameter of the base as it is under the adapters."""

    piece: Piece
    dtype: str  # in which it is changed
    changes: tuple[Change, ...] = ()  # of an init, a trained bias

    def rows(self, first: int, count: int) -> NDArray:
        """Some rows of it, in the dtype in which it is changed."""
        height = self.piece.shape[0]
        each = (self.piece.end - self.piece.begin) // height
        stored = pread(self.piece, self.piece.begin + first * each, count * each).view(dtypes()[self.piece.dtype])
        rows = stored.reshape(count, -1).astype(dtypes()[self.dtype])
        for change in self.changes:
            rows = change.opened()(rows, first)
        return rows


@final
@dataclass(frozen=True)
class Step(OfModule):
    part: Literal["weight", "bias"]
    first: bool  # whether the delta is rounded before it is added
    weight: Frozen
    bias: Frozen | None
    exact: bool
    alone: bool  # whether it is the first change of the tensor but those of `Frozen`
    shared: tuple[tuple[str, Piece], ...] = ()  # by field, what it shares with other modules
    absent: tuple[str, ...] = ()  # fields that no file holds
    home: Home | None = None  # where those are made again

    def by_rows(self) -> bool:
        plain = self.layer.kind == "linear" and self.part == "weight"
        return plain and self.method.by_rows and (self.alone or not self.weight.changes)

    def whole(self) -> bool:
        return not self.by_rows()

    def params(self) -> Any:
        """All of them: what is in the file, and what is shared or made again."""
        shapes = {s.field: s.shape for s in self.method.spec(self.layer)}
        given = {field: self.array(tensor).reshape(shapes[field]) for field, tensor in self.shared}
        params = super().params()._replace(**given)
        if self.absent:
            assert self.home is not None
            made = remade(self.home, self.source.folder, self.module, self.absent, params)
            params = params._replace(**{field: self._as_drawn(array) for field, array in made.items()})
        return params

    def opened(self) -> Rows:
        return (_RowSteps if self.by_rows() else _WholeStep)(self, self.params(), dtypes()[self.computed])

    def _as_drawn(self, array: NDArray) -> NDArray:
        """What is made again stays in the dtype of the weight in PEFT, and is computed with in the wider one."""
        return array.astype(dtypes()[self.weight.dtype]).astype(dtypes()[self.computed]) if array.dtype.kind == "f" else array


class _Steps(Rows):
    def __init__(self, change: Step, params: Any, computed: np.dtype[Any]) -> None:
        self._change, self._params, self._computed = change, params, computed

    def _stepped(self, layer: Layer, params: Any, at: State, dtype: np.dtype[Any]) -> tuple[NDArray, NDArray | None]:
        method, weight = self._change.method, self._change.source.weight

        def rounded(x: NDArray) -> NDArray:
            return x.astype(dtype).astype(x.dtype)

        if (own := OWN.get(type(method).__name__)) is not None and weight == 1:
            return own(method, layer, params, at, rounded)
        if isinstance(method, Additive):
            delta = method.delta(layer, params) if not self._change.exact else exact_delta(method, layer, params)
        elif isinstance(method, Conditioned):
            delta = method.change(layer, params, at.W0, at.b0)
        else:
            return step(layer, Adapter(method, params), at.W, at.b, at.W0, at.b0)
        parts = (None if part is None else part * part.dtype.type(weight) if weight != 1 else part for part in delta)
        dW, db = (part if part is None or not self._change.first else rounded(part) for part in parts)
        return at.W + dW, at.b if db is None or at.b is None else at.b + db


@final
class _WholeStep(_Steps):
    whole = True

    def __call__(self, rows: NDArray, first: int) -> NDArray:
        change, layer, dtype = self._change, self._change.layer, rows.dtype
        if change.part == "weight":
            W = self._matrix(rows)
            W0 = W if change.alone else self._matrix(change.weight.rows(0, len(rows)))
            b = None if change.bias is None else np.zeros(layer.shape[0], self._computed)
            made: NDArray | None = self._stepped(layer, self._params, State(W, b, W0, b), dtype)[0]
        else:
            assert change.bias is not None
            b = rows[:, 0].astype(self._computed)
            b0 = b if change.alone else change.bias.rows(0, len(rows))[:, 0].astype(self._computed)
            W0 = self._matrix(change.weight.rows(0, change.weight.piece.shape[0]))
            made = self._stepped(layer, self._params, State(W0, b, W0, b0), dtype)[1]
        assert made is not None
        stored = layer.unfold(made) if change.part == "weight" else made
        np.copyto(rows, stored.reshape(rows.shape), casting="unsafe")
        return rows

    def _matrix(self, rows: NDArray) -> NDArray:
        folded: NDArray = self._change.layer.fold(rows.reshape(self._change.layer.weight_shape))
        return folded.astype(self._computed)


@final
class _RowSteps(_Steps):
    """Of a linear layer, whose rows are those of its matrix; as many outputs as come, of the same inputs."""

    def __call__(self, rows: NDArray, first: int) -> NDArray:
        change, tile = self._change, slice(first, first + len(rows))
        layer, own = part(change.layer, tile), cut(change.method, self._params, tile)
        W = rows.astype(self._computed)
        W0 = W if change.alone else change.weight.rows(first, len(rows)).astype(self._computed)
        made, _ = self._stepped(layer, own, State(W, None, W0, None), rows.dtype)
        np.copyto(rows, made, casting="unsafe")
        return rows


@final
@dataclass(frozen=True)
class Fresh(Change):
    """`start` of the method on the frozen weight, of which its W is kept."""

    source: Source
    module: str
    method: Any
    layer: Layer

    def adapter(self) -> Any:
        return self.source.folder

    def whole(self) -> bool:
        return True

    def opened(self) -> Rows:
        return _Started(self)


@final
class _Started(Rows):
    whole = True

    def __init__(self, change: Fresh) -> None:
        self._change = change

    def __call__(self, rows: NDArray, first: int) -> NDArray:
        layer = self._change.layer
        W = layer.fold(rows.reshape(layer.weight_shape)).astype(np.float64 if rows.dtype == np.float64 else np.float32)
        start = start_of(load_config(self._change.source.folder), self._change.method, layer, W, np.random.default_rng(0))
        np.copyto(rows, layer.unfold(start.W).reshape(rows.shape), casting="unsafe")
        return rows
