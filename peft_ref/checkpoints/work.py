"""A shard as pieces, and those as tasks that any worker may do, in any order: ranges that are copied, blocks of rows that are changed.

    Range    bytes as they are: the header of a shard that keeps it, and every run of neighbours that nothing touches. All of an
             untouched shard is one, cut only so that several workers share it. A piece and a task
    Remade   a tensor that changes, or is stored in another dtype than it gets. A piece, of which nothing has been read
    Block    some rows of it, once its adapters have been; all rows where a change needs them all. A task

A change is made in the wider of the two dtypes: the stored rows are widened before, or what became of them is narrowed after.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from peft_ref.checkpoints.copying import fill
from peft_ref.checkpoints.plan import NDArray, Planned, Rows, Shard
from peft_ref.errors import MergeError, ShapeError
from peft_ref.files.safetensors import BITS, dtypes, header

RANGE = 64 << 20  # of a copy, at multiples of itself: blocks of a file system stay whole, so it can share them
BLOCK = 3 << 18  # of rows, in bytes of the wider dtype: what becomes of them stays in the cache, and of 4 kB long ones it is two tiles


class Range(NamedTuple):
    source: Path
    begin: int
    at: int  # in the file that is written
    length: int


class Remade(NamedTuple):
    tensor: Planned
    at: int  # in the file that is written


@dataclass(frozen=True)
class Opened:
    """A tensor whose changes have read their adapters. All its blocks share it, the last one lets go of it."""

    tensor: Planned
    rows: tuple[Rows, ...]
    at: int

    @property
    def whole(self) -> bool:
        return any(rows.whole for rows in self.rows) or any(change.whole() for change in self.tensor.changes)


class Block(NamedTuple):
    opened: Opened
    first: int
    rows: int


Piece: TypeAlias = Range | Remade
Task: TypeAlias = Range | Block


def touched(tensor: Planned) -> bool:
    return bool(tensor.changes) or tensor.dtype != tensor.stored_dtype


def size(tensor: Planned) -> int:
    """Bytes of the tensor in the output."""
    if tensor.dtype == tensor.stored_dtype:
        return tensor.end - tensor.begin
    return math.prod(tensor.shape) * BITS[tensor.dtype] // 8


def start(shard: Shard) -> int | bytes:
    """What the file begins with: how many bytes of its source, or bytes of its own."""
    if shard.source is None:
        return header(((t.name, t.dtype, t.shape, size(t)) for t in shard.tensors), dict(shard.metadata))
    with shard.source.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def total(shard: Shard) -> int:
    begin = start(shard)
    return (begin if isinstance(begin, int) else len(begin)) + sum(map(size, shard.tensors))


def pieces(shard: Shard, begin: int) -> Iterator[Piece]:
    """All of the file but a header of its own, in the order in which it lies there; its tensors' bytes start at `begin`."""
    at, run = begin, None if shard.source is None else Range(shard.source, 0, 0, begin)
    for tensor in shard.tensors:
        length = size(tensor)
        if touched(tensor):
            if run is not None:
                yield from _cut(run)
            run = None
            if length:
                yield Remade(tensor, at)
        elif run is not None and (run.source, run.begin + run.length) == (tensor.path, tensor.begin):
            run = run._replace(length=run.length + length)
        else:
            if run is not None:
                yield from _cut(run)
            run = Range(tensor.path, tensor.begin, at, length)
        at += length
    if run is not None:
        yield from _cut(run)


def tasks(piece: Piece, block: int = BLOCK) -> Iterator[Task]:
    """Of a piece; the adapters of what is remade are read here."""
    return iter((piece,)) if isinstance(piece, Range) else _blocks(*piece, block)


def _cut(run: Range) -> Iterator[Range]:
    done = 0
    while done < run.length:
        length = min(RANGE - (run.begin + done) % RANGE, run.length - done)
        yield Range(run.source, run.begin + done, run.at + done, length)
        done += length


def _blocks(tensor: Planned, at: int, block: int) -> Iterator[Block]:
    opened = Opened(tensor, tuple(change.opened() for change in tensor.changes), at)
    rows, columns = tensor.matrix
    wider = max(dtypes()[dtype].itemsize for dtype in (tensor.dtype, tensor.stored_dtype))
    each = rows if opened.whole else max(1, block // (columns * wider))
    for first in range(0, rows, each):
        yield Block(opened, first, min(each, rows - first))


class Bench:
    """What one worker has to work with: a block of memory, the same one again and again."""

    def __init__(self, block: int = BLOCK) -> None:
        self._memory = np.empty(block, np.uint8)

    def made(self, block: Block, source: int) -> tuple[NDArray, int]:
        """The bytes of a block from its source, an open file; and where they go."""
        tensor = block.opened.tensor
        stored, dtype = dtypes()[tensor.stored_dtype], dtypes()[tensor.dtype]
        columns = tensor.matrix[1]
        row = columns * stored.itemsize
        rows = self._filled(source, tensor.begin + block.first * row, block.rows * row).view(stored).reshape(block.rows, columns)
        with np.errstate(all="ignore"):  # what is no number any more is looked for below
            if dtype.itemsize > stored.itemsize:
                rows = rows.astype(dtype)
            for change in block.opened.rows:
                rows = change(rows, block.first)
            rows = np.ascontiguousarray(rows.astype(dtype, copy=False))
        if rows.shape != (block.rows, columns):
            raise ShapeError(f"{tensor.name}: a change made {rows.shape} of {(block.rows, columns)}: rows and columns stay.")
        if not finite(rows):
            raise self._no_number(block, source)
        return rows.reshape(-1).view(np.uint8), block.opened.at + block.first * columns * dtype.itemsize

    def _filled(self, source: int, at: int, length: int) -> NDArray:
        if length > len(self._memory) and length <= 4 * BLOCK:  # wide rows, which come again
            self._memory = np.empty(length, np.uint8)
        buffer = self._memory[:length] if length <= len(self._memory) else np.empty(length, np.uint8)
        fill(buffer, source, at)
        return buffer

    def _no_number(self, block: Block, source: int) -> MergeError:
        tensor = block.opened.tensor
        stored = dtypes()[tensor.stored_dtype]
        row = tensor.matrix[1] * stored.itemsize
        there = self._filled(source, tensor.begin + block.first * row, block.rows * row).view(stored)
        at = f"tensor {tensor.name!r}, rows {block.first} to {block.first + block.rows - 1}"
        if not finite(there):
            return MergeError(f"{tensor.path}: {at}: the base itself holds a NaN or an infinity.\n  A damaged file? Get it again.")
        if not tensor.changes:
            return MergeError(f"{tensor.path}: {at}: a number is too large for {tensor.dtype}.\n  Choose another --dtype.")
        adapters = ", ".join(sorted({str(change.adapter()) for change in tensor.changes}))
        return MergeError(
            f"{adapters}: {at} of the base become a NaN or an infinity.\n"
            f"  The adapter holds one, or its weight is too large for {tensor.dtype}. It may have diverged while it was trained."
        )


def finite(array: NDArray) -> bool:
    """Whether all are numbers. Read off the bits, twice: a float's magnitude grows with its bits, with or without the sign bit."""
    if array.dtype.kind not in "fV" or not array.size:  # V: bfloat16 and float8
        return True
    code, infinity = f"{array.dtype.itemsize}", np.array(np.inf, array.dtype)  # float8_e4m3fn has none: its NaN stands for it
    sign = 1 << 8 * array.dtype.itemsize - 1
    top = int(infinity.view(f"u{code}")) & ~sign
    positive, any_sign = int(array.view(f"i{code}").max()), int(array.view(f"u{code}").max())
    return bool(positive < top and any_sign < sign + top)
