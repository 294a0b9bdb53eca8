"""How the output is laid out: as the base is, header bytes and all, or with headers of its own where a dtype, a name or a size changes.

as it is        every shard keeps its header; the index comes along
dtype           the same shards, each with a header of its own; config.json says the new dtype, the index the new size
untied names    they join the shard of the tensor that they were a name of; config.json says that nothing is tied
max_shard_size  shards anew, filled in the order of the base's as transformers fills them: a tensor that is too large alone is alone
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from peft_ref.checkpoints.base import Base
from peft_ref.checkpoints.pieces import FLOATS, Piece
from peft_ref.checkpoints.plan import Change, Plan, Planned, Shard, Source
from peft_ref.errors import ConfigError
from peft_ref.files.safetensors import BITS, in_order
from peft_ref.graph.checkpoint import INDEX, SINGLE
from peft_ref.reading.documents import read_object

CONFIG = "config.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # and as config.json spells them
SPELLED = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "half": "F16", "float": "F32", **{long: short for short, long in DTYPES.items()}}


class Changed(NamedTuple):
    """What becomes of a stored tensor."""

    changes: tuple[Change, ...] = ()
    rows: int | None = None


@dataclass(frozen=True)
class Wanted:
    """What is to become of the base's tensors, by their names in its files."""

    changed: Mapping[str, Changed]
    apart: Mapping[str, str] = field(default_factory=dict)  # new names, each with the stored name that it was tied to
    dtype: str | None = None
    max_shard_size: int | None = None
    prefix: str = ""  # what every stored name is called by in full, where names of its own are written


def dtype_of(name: str | None) -> str | None:
    """As safetensors spells it."""
    found = None if name is None else SPELLED.get(name.lower(), name.upper())
    if found is not None and found not in DTYPES:
        raise ConfigError(f"dtype={name!r}: a merged model is stored in one of {', '.join(DTYPES.values())}.")
    return found


def becomes(piece: Piece, dtype: str | None) -> str:
    """The dtype it gets: integers and what is no number stay what they are."""
    return piece.dtype if dtype is None or piece.dtype not in FLOATS else dtype


def laid_out(base: Base, sources: Sequence[Source], wanted: Wanted) -> Plan:
    along, left = base.beside()
    if wanted.max_shard_size is not None and wanted.max_shard_size <= 0:
        raise ConfigError(f"max_shard_size={wanted.max_shard_size}: a number of bytes is expected.")
    own_names = bool(wanted.apart) or wanted.max_shard_size is not None
    shards = _split(base, wanted) if wanted.max_shard_size is not None else _as_base(base, wanted)
    written: list[tuple[str, bytes]] = []
    if len(shards) > 1 or (base.index and not own_names):
        if not own_names and wanted.dtype is None:
            along.append(base.folder / INDEX)
        else:
            written.append((INDEX, _index(base, shards)))
    if (wanted.dtype is not None or wanted.apart) and (config := base.folder / CONFIG) in along:
        along.remove(config)
        written.append((CONFIG, _config(config, wanted)))
    return Plan(base.folder, tuple(sources), tuple(shards), tuple(sorted(along)), tuple(written), tuple(left))


def _as_base(base: Base, wanted: Wanted) -> list[Shard]:
    shards = []
    for name, pieces in base.shards.items():
        tensors = _planned(pieces, wanted)
        keeps = not wanted.apart and all(t.dtype == t.stored_dtype for t in tensors)
        metadata = tuple(base.files[name].metadata.items()) or (("format", "pt"),)
        ordered = tensors if keeps else _ordered(tensors)
        shards.append(Shard(name, tuple(ordered), base.folder / name if keeps else None, metadata))
    return shards


def _split(base: Base, wanted: Wanted) -> list[Shard]:
    every = [t for pieces in base.shards.values() for t in _planned(pieces, wanted)]
    groups = greedy([(t.name, size_of(t)) for t in every], wanted.max_shard_size or 0)
    named = {t.name: t for t in every}
    names = [SINGLE] if len(groups) == 1 else [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    return [Shard(name, tuple(_ordered([named[t] for t in own])), None) for name, own in zip(names, groups, strict=True)]


def greedy(sizes: Iterable[tuple[str, int]], most: int) -> list[list[str]]:
    """Names in groups of at most `most` bytes, in their order."""
    groups: list[list[str]] = []
    open_group: list[str] = []
    filled = 0
    for name, size in sizes:
        if size > most:
            groups.append([name])
            continue
        if filled + size > most:
            groups.append(open_group)
            open_group, filled = [], 0
        open_group.append(name)
        filled += size
    return [*groups, open_group] if open_group else groups


def size_of(tensor: Planned) -> int:
    if tensor.dtype == tensor.stored_dtype:
        return tensor.end - tensor.begin
    return math.prod(tensor.shape) * BITS[tensor.dtype] // 8


def _planned(pieces: Mapping[str, Piece], wanted: Wanted) -> list[Planned]:
    found = []
    prefix = wanted.prefix if wanted.apart else ""
    for name, piece in pieces.items():
        second = [new for new, first in wanted.apart.items() if first == name]
        for new, key in [(prefix + name, name), *((new, new) for new in second)]:
            changes, rows = wanted.changed.get(key, Changed())
            dtype = becomes(piece, wanted.dtype)
            found.append(Planned(new, dtype, piece.shape, piece.path, piece.dtype, piece.begin, piece.end, changes, rows))
    return found


def _ordered(tensors: Sequence[Planned]) -> list[Planned]:
    """As the library lays them out."""
    named = {t.name: t for t in tensors}
    return [named[name] for name in in_order({t.name: t.dtype for t in tensors})]


def _index(base: Base, shards: Sequence[Shard]) -> bytes:
    every = [t for shard in shards for t in shard.tensors]
    metadata: dict[str, Any] = {**base.index.get("metadata", {}), "total_size": sum(map(size_of, every))}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(t.shape) for t in every)
    where = {t.name: shard.name for shard in shards for t in shard.tensors}
    return (json.dumps({"metadata": metadata, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n").encode()


def _config(path: Path, wanted: Wanted) -> bytes:
    config = read_object(path)
    if wanted.apart:
        config["tie_word_embeddings"] = False
    if wanted.dtype is not None:
        _say_dtype(config, DTYPES[wanted.dtype])
    return (json.dumps(config, indent=2) + "\n").encode()


def _say_dtype(config: dict[str, Any], dtype: str) -> None:
    """In a configuration and in those that it is made of, under the name that it has there."""
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for name in ("dtype", "torch_dtype"):
            if name in part:
                part[name] = dtype
    if not {"dtype", "torch_dtype"} & config.keys():
        config["torch_dtype"] = dtype
