"""The header of a safetensors file, believed only after every claim in it was checked against the file.

    8 bytes      n, the header's length, little-endian
    n bytes      JSON: {"__metadata__": {str: str}, name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
    the rest     the tensors' bytes, little-endian and C-ordered; offsets count from here; no overlap and no hole

HF      the safetensors library reads headers of up to 100 MB and any text as a name. A checkpoint of 671 billion parameters has 91,000
        tensors; the header of all of them in one file would have 13 MB. Here 32 MiB are the most, and a name is text that can be printed.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

from peft_ref.errors import FileFormatError
from peft_ref.reading.documents import Limit, Pairs, decoded, once
from peft_ref.reading.opening import Stamp, opened, stamp

MAX_HEADER = 32 * 2**20
MAX_VALUES = 1_200_000  # eight for a tensor
AXES = 64  # NumPy's most; the product of a million sizes would take for ever
LONGEST_NAME = 1000  # letters; the longest known has about 150
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


class Header(NamedTuple):
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    stamp: Stamp  # of the file that it was read from


class _Claim(NamedTuple):
    """An object that has the keys and types of a tensor's description: an eighth of the memory of its dict and lists."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file."""
    with opened(path) as file:
        found = stamp(file)
        start = file.read(9)
        length = _checked_length(path, start[:8], found.size)
        if start[8:] != b"{" or not length:
            raise FileFormatError(
                f"{path}: the header begins with {start[8:]!r}, expected an object.\n  No safetensors file, or a damaged one."
            )
        file.seek(8)
        # the bytes are handed over, not held here: they are freed as soon as they are text
        claims = decoded(file.read(length), f"{path}: the header", Limit(MAX_HEADER, MAX_VALUES), lambda pairs: _made(pairs, path))
    if not isinstance(claims, dict):
        raise FileFormatError(f"{path}: the header describes a tensor and does not say what it is called.")
    metadata = _metadata(path, claims.pop("__metadata__", None))
    size = found.size
    # in place: the map of claims becomes the map of entries, tensor by tensor
    for name, claim in claims.items():
        claims[name] = _entry(path, name, claim, 8 + length, size)
    _check_cover(path, claims, 8 + length, size)
    return Header(metadata, claims, found)


def _checked_length(path: Path, start: bytes, size: int) -> int:
    if len(start) < 8:
        raise FileFormatError(f"{path}: {size} bytes cannot hold a safetensors header.\n  The file was cut off; get it again.")
    length = int.from_bytes(start, "little")
    if start.startswith((b"\x80", b"PK\x03\x04")) and length > size - 8:
        raise FileFormatError(f"{path} is a pickle under the name of a safetensors file.\n  Unpickling runs code: not read.")
    if length > MAX_HEADER:
        raise FileFormatError(f"{path}: claims a header of {length} bytes; at most {MAX_HEADER} are allowed.\n  No safetensors file?")
    if length > size - 8:
        raise FileFormatError(f"{path}: claims a header of {length} bytes, the file has {size}.\n  It was cut off, or is something else.")
    return length


def _made(pairs: Pairs, path: Path) -> Any:
    made = once(pairs, f"{path}: the header")
    if len(made) != 3 or made.keys() != {"dtype", "shape", "data_offsets"}:
        return made
    dtype, shape, offsets = made["dtype"], made["shape"], made["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        return made
    if len(shape) > AXES or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *offsets)):
        return made
    return _Claim(intern(dtype), tuple(shape), *offsets)


def _metadata(path: Path, metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileFormatError(f"{path}: __metadata__ is not a map from text to text.")
    return metadata


def _entry(path: Path, name: str, claim: Any, start: int, size: int) -> Entry:
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise FileFormatError(
            f"{path}: a tensor is called {reprlib.repr(name)}, {len(name)} letters.\n"
            f"  At most {LONGEST_NAME} are read, and none that cannot be printed."
        )
    where = f"{path}: tensor {name!r}"
    if not isinstance(claim, _Claim):
        raise FileFormatError(_what_is_wrong(where, claim))
    dtype, shape, begin, end = claim
    if dtype not in BITS and not (dtype.isidentifier() and dtype.isascii() and len(dtype) <= 40):
        raise FileFormatError(f"{where} has the dtype {dtype!r:.80}, expected a name.")
    if math.prod(n for n in shape if n) * BITS.get(dtype, 8) >= 2**63:  # also beside a size of 0: NumPy makes no such array
        raise FileFormatError(f"{where}: {dtype} of shape {shape!r:.80} is more than any memory holds.")
    begin, end = start + begin, start + end
    if not begin <= end <= size:
        raise FileFormatError(
            f"{where} claims the bytes {begin} to {end} of a file of {size}.\n  The file was cut off, or its header is wrong."
        )
    if dtype in BITS and 8 * (end - begin) != (needed := math.prod(shape) * BITS[dtype]):
        raise FileFormatError(f"{where}: {dtype} of shape {shape} takes {needed / 8:g} bytes, its offsets span {end - begin}.")
    return Entry(dtype, shape, begin, end)


def _what_is_wrong(where: str, claim: Any) -> str:
    if not isinstance(claim, dict) or claim.keys() != {"dtype", "shape", "data_offsets"}:
        return f"{where} is described by {reprlib.repr(claim)},\n  expected dtype, shape and data_offsets."
    if not isinstance(claim["dtype"], str):
        return f"{where} has the dtype {reprlib.repr(claim['dtype'])}, expected a name."
    shape = claim["shape"]
    if not isinstance(shape, list) or len(shape) > AXES or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        return f"{where} has the shape {reprlib.repr(shape)}, expected a list of up to {AXES} sizes."
    return f"{where} has the offsets {reprlib.repr(claim['data_offsets'])}, expected [begin, end]."


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
