"""Safetensors files: read by their header, one tensor at a time; written as the `safetensors` library writes them.

    8 bytes      n, the header's length, little-endian
    n bytes      JSON: {"__metadata__": {str: str}, name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
    the rest     the tensors' bytes, little-endian and C-ordered; offsets count from here; no overlap and no hole

A header is believed only after every claim in it was checked against the file. A tensor of a dtype NumPy does not have can still be
copied: `raw` gives its bytes, and `serialize` takes them back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from peft_ref.errors import FileFormatError, KeyMismatchError

NDArray: TypeAlias = np.ndarray[Any, Any]
MAX_HEADER = 100_000_000  # the library's own limit
# How many bits one element takes. A dtype that is not here is newer than this table; its size is not checked.
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class Entry(NamedTuple):
    """What the header says of one tensor; begin and end count from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


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

    def read(self, name: str) -> NDArray:
        """The tensor as an array of its own."""
        raw = self.raw(name)
        if raw.dtype not in dtypes():
            raise FileFormatError(
                f"{self.path}: tensor {name!r} is {raw.dtype}, which is no NumPy dtype here.\n"
                f"  Readable: {', '.join(sorted(dtypes()))}. `raw` gives its bytes, so that it can be copied."
            )
        return np.frombuffer(bytearray(raw.data), dtype=dtypes()[raw.dtype]).reshape(raw.shape)

    def raw(self, name: str) -> RawTensor:
        """The tensor as its bytes."""
        entry = self._entry(name)
        with self.path.open("rb") as file:
            file.seek(entry.begin)
            data = file.read(entry.end - entry.begin)
        if len(data) != entry.end - entry.begin:
            raise FileFormatError(f"{self.path}: tensor {name!r} was cut off since the file was opened.\n  Is it being written?")
        return RawTensor(entry.dtype, entry.shape, data)

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
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise FileFormatError(f"{path}: {size} bytes cannot hold a safetensors header.\n  The file was cut off; get it again.")
        length = int.from_bytes(start, "little")
        if start.startswith((b"\x80", b"PK\x03\x04")) and length > size - 8:
            raise FileFormatError(f"{path} is a pickle under the name of a safetensors file.\n  Unpickling runs code: not read.")
        if length > MAX_HEADER:
            raise FileFormatError(f"{path}: claims a header of {length} bytes; at most {MAX_HEADER} are allowed.\n  No safetensors file?")
        if length > size - 8:
            raise FileFormatError(
                f"{path}: claims a header of {length} bytes, the file has {size}.\n  It was cut off, or is something else."
            )
        claims = _json(path, file.read(length))
    metadata = _metadata(path, claims.pop("__metadata__", None) or {})
    entries = {name: _entry(path, name, claim, 8 + length, size) for name, claim in claims.items()}
    _check_cover(path, entries, 8 + length, size)
    return SafetensorsFile(path, metadata, entries)


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


def _json(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(keys := [key for key, _ in pairs]) != len(set(keys)):
            raise FileFormatError(f"{path}: the header names {next(k for k in keys if keys.count(k) > 1)!r} twice.")
        return dict(pairs)

    try:
        header = json.loads(text.decode(), object_pairs_hook=once)
        "".join(header).encode()  # JSON can spell text that is none: a lone surrogate
    except FileFormatError:
        raise
    except (ValueError, RecursionError, TypeError) as error:
        raise FileFormatError(f"{path}: the header is not JSON ({error}).\n  No safetensors file, or a damaged one.") from error
    if not isinstance(header, dict) or not text.startswith(b"{"):
        raise FileFormatError(f"{path}: the header is a JSON {type(header).__name__}, expected an object.")
    return header


def _metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileFormatError(f"{path}: __metadata__ is not a map from text to text.")
    return metadata


def _entry(path: Path, name: str, claim: Any, start: int, size: int) -> Entry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(claim, dict) or claim.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileFormatError(f"{where} is described by {claim!r:.80},\n  expected dtype, shape and data_offsets.")
    dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(dtype, str):
        raise FileFormatError(f"{where} has the dtype {dtype!r:.80}, expected a name.")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise FileFormatError(f"{where} has the shape {shape!r:.80}, expected a list of sizes.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise FileFormatError(f"{where} has the offsets {offsets!r:.80}, expected [begin, end].")
    begin, end = (start + n for n in offsets)
    if not begin <= end <= size:
        raise FileFormatError(
            f"{where} claims the bytes {begin} to {end} of a file of {size}.\n  The file was cut off, or its header is wrong."
        )
    if dtype in BITS and 8 * (end - begin) != (needed := math.prod(shape) * BITS[dtype]):
        raise FileFormatError(f"{where}: {dtype} of shape {tuple(shape)} takes {needed / 8:g} bytes, its offsets span {end - begin}.")
    return Entry(dtype, tuple(shape), begin, end)


def _check_cover(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    at, before = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != at:
            problem = "overlap" if entry.begin < at else "leave a hole"
            raise FileFormatError(
                f"{path}: {before} and tensor {name!r} {problem}: one ends at byte {at}, the other begins at {entry.begin}."
            )
        at, before = entry.end, f"tensor {name!r}"
    if at != size:
        raise FileFormatError(f"{path}: {size - at} bytes after {before} belong to no tensor.\n  Not the file its header describes.")
