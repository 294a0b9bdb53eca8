"""Safetensors files: read by their header (peft_ref/reading/header.py), one tensor at a time; written as the `safetensors` library does.

A tensor of a dtype NumPy does not have can still be copied: `raw` gives its bytes, and `serialize` takes them back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from peft_ref.errors import FileFormatError, KeyMismatchError
from peft_ref.reading.header import BITS as BITS
from peft_ref.reading.header import MAX_HEADER as MAX_HEADER
from peft_ref.reading.header import Entry as Entry
from peft_ref.reading.header import read_header
from peft_ref.reading.opening import Stamp, span

NDArray: TypeAlias = np.ndarray[Any, Any]


class RawTensor(NamedTuple):
    """A tensor as the bytes it is stored in."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Tensor: TypeAlias = NDArray | RawTensor


@cache
def dtypes() -> dict[str, np.dtype[Any]]:
    """The NumPy dtype of each safetensors dtype that has one here."""
    import ml_dtypes

    standard = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "?"}
    integers = {f"{s}{8 * n}": f"<{s.lower()}{n}" for s in "UI" for n in (1, 2, 4, 8)}
    own = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
    return {name: np.dtype(code) for name, code in {**standard, **integers, **own}.items()}


@dataclass(frozen=True)
class SafetensorsFile:
    """An opened file: its header is read and checked, its tensors are read when asked for."""

    path: Path
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    stamp: Stamp | None = field(default=None, repr=False, compare=False)  # of the file when its header was read

    def read(self, name: str) -> NDArray:
        """The tensor as an array of its own."""
        entry = self._entry(name)
        if entry.dtype not in dtypes():
            raise FileFormatError(
                f"{self.path}: tensor {name!r} is {entry.dtype}, which is no NumPy dtype here.\n"
                f"  Readable: {', '.join(sorted(dtypes()))}. `raw` gives its bytes, so that it can be copied."
            )
        data = span(self.path, name, entry.begin, entry.end, self.stamp)
        return np.frombuffer(data, dtype=dtypes()[entry.dtype]).reshape(entry.shape)

    def raw(self, name: str) -> RawTensor:
        """The tensor as its bytes."""
        entry = self._entry(name)
        return RawTensor(entry.dtype, entry.shape, bytes(span(self.path, name, entry.begin, entry.end, self.stamp)))

    def tensor(self, name: str) -> Tensor:
        """`read` where NumPy has the dtype, else `raw`."""
        return self.read(name) if self._entry(name).dtype in dtypes() else self.raw(name)

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise KeyMismatchError(f"{self.path}: no tensor {name!r}.\n  There are {', '.join(sorted(self.entries)) or 'none'}.")
        return self.entries[name]


def open_file(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Read and check the header of a safetensors file."""
    path = Path(path)
    return SafetensorsFile(path, *read_header(path))


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file, the same that `safetensors.torch.save_file` writes.

    The library writes two or more metadata entries in an order that changes from run to run, and knows not every dtype: for those, the
    same layout is written here.
    """
    arrays: dict[str, NDArray] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, RawTensor):
            array = np.asarray(tensor)
            arrays[name] = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
        elif tensor.dtype in dtypes():
            arrays[name] = np.frombuffer(tensor.data, dtype=dtypes()[tensor.dtype]).reshape(tensor.shape)
    names = {dtype: name for name, dtype in dtypes().items()}
    if unknown := sorted(name for name, a in arrays.items() if a.dtype not in names):
        raise FileFormatError(
            f"tensor {unknown[0]!r} is {arrays[unknown[0]].dtype}, which safetensors has no name for.\n  Convert it first."
        )
    if len(arrays) == len(tensors) and len(metadata) <= 1:
        from safetensors.numpy import save

        return save(arrays, dict(metadata) or None)
    raws = {name: RawTensor(names[a.dtype], a.shape, a.tobytes()) for name, a in arrays.items()}
    raws |= {name: t for name, t in tensors.items() if isinstance(t, RawTensor)}
    return _layout(raws, metadata)


def in_order(dtypes_by_name: Mapping[str, str]) -> list[str]:
    """The library's layout: the widest dtypes first, then by name."""
    order = ["BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"]
    order += ["I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"]
    rank = {dtype: -place for place, dtype in enumerate(order)}
    return sorted(dtypes_by_name, key=lambda name: (rank.get(dtypes_by_name[name], 1), name))


def _layout(raws: Mapping[str, RawTensor], metadata: Mapping[str, str]) -> bytes:
    """The library's layout, the header padded with spaces to a multiple of 8."""
    names = in_order({name: raw.dtype for name, raw in raws.items()})
    start = header(((name, raws[name].dtype, raws[name].shape, len(raws[name].data)) for name in names), metadata)
    return b"".join([start, *(raws[name].data for name in names)])


def header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """What a file begins with, its length included; a tensor is name, dtype, shape and number of bytes, in the order in which they lie."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape, size in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
