"""A tensor that lies in a file, as a value that can be sent to another machine: which bytes of which file, and how to read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from peft_ref.checkpoints.plan import NDArray, Planned
from peft_ref.errors import FileFormatError
from peft_ref.files.safetensors import SafetensorsFile, dtypes

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


class Piece(NamedTuple):
    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int  # from the start of the file
    end: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def piece(file: SafetensorsFile, name: str) -> Piece:
    entry = file.entries[name]
    return Piece(file.path, name, entry.dtype, entry.shape, entry.begin, entry.end)


def source(planned: Planned) -> Piece:
    """Where a planned tensor lies in the base."""
    return Piece(planned.path, planned.name, planned.stored_dtype, planned.shape, planned.begin, planned.end)


def pieces(file: SafetensorsFile) -> Mapping[str, Piece]:
    """All tensors of a file, in the order in which they lie in it."""
    return {name: piece(file, name) for name in sorted(file.entries, key=lambda name: (file.entries[name].begin, file.entries[name].end))}


def pread(p: Piece, begin: int, length: int) -> NDArray:
    """Some bytes of a tensor."""
    data = np.empty(length, np.uint8)
    with p.path.open("rb") as file:
        file.seek(begin)
        filled = file.readinto(data.data)
    if filled != length:
        raise FileFormatError(f"{p.path}: tensor {p.name!r} was cut off since the plan was made.\n  Is it being written?")
    return data


def read(p: Piece) -> NDArray:
    """The tensor, as an array of its own."""
    if p.dtype not in dtypes():
        raise FileFormatError(f"{p.path}: tensor {p.name!r} is {p.dtype}, which is no NumPy dtype here.\n  Convert it to F32.")
    return pread(p, p.begin, p.end - p.begin).view(dtypes()[p.dtype]).reshape(p.shape)


def same(a: Piece, b: Piece) -> bool:
    """Whether two tensors are the same, to the bit; read in parts."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    part, length = 1 << 22, a.end - a.begin
    cuts = [(at, min(part, length - at)) for at in range(0, length, part)]
    return all(bool((pread(a, a.begin + at, n) == pread(b, b.begin + at, n)).all()) for at, n in cuts)


def finite(p: Piece) -> NDArray:
    """The tensor of an adapter, which has to be made of numbers."""
    array = read(p)
    if p.dtype in FLOATS and not np.isfinite(array).all():
        raise FileFormatError(
            f"{p.path}: tensor {p.name!r} holds a NaN or an infinity.\n  The adapter is broken; nothing that it touches would be of use."
        )
    return array
