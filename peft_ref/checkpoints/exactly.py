"""What a tensor has to become, in float64 and without any of a merge's rounding; and the same as a question to the judge.

A low-rank delta is formed row by row, so that a table of any size goes through in blocks; what needs the whole matrix gets it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from peft_ref.check.case import Case, CaseAdapter, config_of
from peft_ref.checkpoints.changes import AddBias, AddLowRank, AddStack, OfAdapter, OfModule
from peft_ref.checkpoints.pieces import Piece, pread, source
from peft_ref.checkpoints.plan import Change, NDArray, Planned, Rows
from peft_ref.checkpoints.suspecting import Claim, tolerance
from peft_ref.contracts import Method
from peft_ref.files.safetensors import dtypes
from peft_ref.methods import METHODS

BLOCK = 1 << 20  # elements that are compared at once


class Block(NamedTuple):
    first: int
    W: NDArray  # rows of the base
    right: NDArray
    got: NDArray
    slack: NDArray  # what the roundings before the last one may have moved: each adapter's result is stored before the next one comes


def blocks(planned: Planned, merged: Piece) -> Iterator[Block]:
    """The tensor in both checkpoints and as it has to be, in float64, block by block; rows and columns as the changes see them."""
    rows, columns = planned.matrix
    changes = [_in_float64(change) for change in planned.changes]
    each = rows if any(change.whole for change in changes) else max(1, BLOCK // max(1, columns))
    base = source(planned)
    for first in range(0, rows, max(1, each)):
        n = min(each, rows - first)
        W = _rows(base, first, n, columns)
        right, slack = W, np.zeros_like(W)
        for n_th, change in enumerate(changes):
            before, right = right, change(right.copy(), first)
            if n_th < len(changes) - 1:
                slack += tolerance(before, right, merged.dtype)
        yield Block(first, W, right, _rows(merged, first, n, columns), slack)


def claimed(planned: Planned, merged: Piece) -> Claim:
    """All of the tensor, with the question that it answers."""
    parts = list(blocks(planned, merged))
    W, right, got, slack = (np.concatenate(arrays).reshape(planned.shape) for arrays in list(zip(*parts, strict=True))[1:])
    return Claim(planned.name, merged.dtype, W, right, got, slack, _case(planned, W))


def method_of(planned: Planned) -> str:
    """Which method changes it; an empty text where none does."""
    methods = [getattr(change, "method", None) for change in planned.changes]
    names = {"modules_to_save" if method is None else name_of(method) for method in methods}
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


def _in_float64(change: Change) -> Rows:
    """The change without a rounding on its way: given rows in float64 it returns what they become in float64."""
    if not isinstance(change, OfAdapter):
        return change.opened()
    wide: dict[str, Any] = {"computed": "F64", "held": "F64" if change.held == "F32" else change.held}
    if isinstance(change, AddLowRank | AddStack | AddBias):
        wide["first"] = None
    return replace(change, **wide).opened()


def _case(planned: Planned, W: NDArray) -> Case | None:
    """The merge of this very tensor as a question to a port; None where it is none, or several methods meet."""
    changes: Sequence[Change] = planned.changes
    parts = [c for c in changes if isinstance(c, OfModule) and c.source.weight == 1 and getattr(c, "part", "weight") == "weight"]
    if (
        not parts
        or len(parts) < len(changes)
        or any(isinstance(c, AddBias) for c in parts)
        or len({name_of(c.method) for c in parts}) > 1
        or math.prod(W.shape) == 0
    ):
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
