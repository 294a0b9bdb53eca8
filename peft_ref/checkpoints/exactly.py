"""What a tensor has to become, in float64 and without any of a merge's rounding; and the same as a question to the judge.

A low-rank delta is formed row by row, so that a table of any size goes through in blocks; what needs the whole matrix gets it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from peft_ref.check.case import Case, CaseAdapter, config_of
from peft_ref.checkpoints.changes import AddBias, OfModule
from peft_ref.checkpoints.pieces import Piece, pread
from peft_ref.checkpoints.plan import Change, NDArray, Planned
from peft_ref.checkpoints.suspecting import Claim
from peft_ref.contracts import LowRank, Method
from peft_ref.files.safetensors import dtypes
from peft_ref.methods import METHODS
from peft_ref.stack import Adapter, step

BLOCK = 1 << 20  # elements that are compared at once


class Block(NamedTuple):
    first: int
    W: NDArray  # rows of the base
    right: NDArray
    got: NDArray


class Step(NamedTuple):
    """One change: what it makes of the rows from `first` on, given those rows of the frozen weight too."""

    apply: Callable[[NDArray, int, NDArray], NDArray]
    whole: bool


def blocks(planned: Planned, merged: Piece) -> Iterator[Block]:
    """The tensor in both checkpoints and as it has to be, in float64, block by block; rows and columns as the changes see them."""
    rows, columns = planned.matrix
    steps = [_step(change) for change in planned.changes]
    each = rows if any(s.whole for s in steps) else max(1, BLOCK // max(1, columns))
    source = Piece(planned.path, planned.name, planned.stored_dtype, planned.shape, planned.begin, planned.end)
    for first in range(0, rows, max(1, each)):
        n = min(each, rows - first)
        W = _rows(source, first, n, columns)
        right = W
        for s in steps:
            right = s.apply(right, first, W)
        yield Block(first, W, right, _rows(merged, first, n, columns))


def claimed(planned: Planned, merged: Piece) -> Claim:
    """All of the tensor, with the question that it answers."""
    parts = list(blocks(planned, merged))
    W, right, got = (np.concatenate([getattr(b, name) for b in parts]).reshape(planned.shape) for name in ("W", "right", "got"))
    biases = any(isinstance(change, AddBias) for change in planned.changes)
    return Claim(planned.name, merged.dtype, W, right, got, None if biases else _case(planned, W))


def method_of(planned: Planned) -> str:
    """Which method changes it; an empty text where none does."""
    names = {name_of(change.method) if isinstance(change, OfModule) else "modules_to_save" for change in planned.changes}
    return " and ".join(sorted(names))


def name_of(method: Method) -> str:
    """Under which name METHODS has it."""
    last = type(method).__module__.rpartition(".")[2]
    if last in METHODS and METHODS[last] is type(method):
        return last
    return next(name for name in METHODS.registered if METHODS[name] is type(method))


def _rows(piece: Piece, first: int, n: int, columns: int) -> NDArray:
    dtype = dtypes()[piece.dtype]
    each = columns * dtype.itemsize
    return pread(piece, piece.begin + first * each, n * each).view(dtype).reshape(n, columns).astype(np.float64)


def _step(change: Change) -> Step:
    if not isinstance(change, OfModule) or isinstance(change, AddBias):
        rows = change.opened()
        return Step(lambda part, first, W: rows(part.copy(), first), rows.whole)
    exact = replace(change, computed="F64")
    layer, method, share = change.layer, change.method, change.source.weight
    if isinstance(method, LowRank):
        f = method.factors(exact.params())
        left, right = (f.A.T, f.B.T) if layer.kind in ("transposed_linear", "embedding") else (f.B, f.A)
        return Step(lambda part, first, W: part + share * (left[first : first + len(part)] @ right), False)
    params = exact.params()

    def mapped(part: NDArray, first: int, W: NDArray) -> NDArray:
        below, frozen = (layer.fold(x.reshape(layer.weight_shape)) for x in (part, W))
        above, _ = step(layer, Adapter(method, params), below, np.zeros(layer.shape[0]), frozen, np.zeros(layer.shape[0]))
        became: NDArray = np.asarray(layer.unfold(below + share * (above - below))).reshape(part.shape)
        return became

    return Step(mapped, True)


def _case(planned: Planned, W: NDArray) -> Case | None:
    """The merge of this very tensor as a question to a port; None where it is none, or several methods meet."""
    changes: Sequence[Change] = planned.changes
    parts = [c for c in changes if isinstance(c, OfModule) and c.source.weight == 1]
    if not parts or len(parts) < len(changes) or len({name_of(c.method) for c in parts}) > 1 or math.prod(W.shape) == 0:
        return None
    layer = parts[0].layer
    adapters = []
    for c in parts:
        packed = c.method.pack(layer, replace(c, computed="F64").params())
        adapters.append(CaseAdapter(config=config_of(c.method), tensors={k: np.asarray(v) for k, v in packed.items()}))
    return Case(
        id=planned.name,
        method=name_of(parts[0].method),
        operation="merge",
        clause="",
        layer=layer,
        weight=W.reshape(layer.weight_shape),
        bias=np.zeros(layer.shape[0]),
        adapters=tuple(adapters),
    )
