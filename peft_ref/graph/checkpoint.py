"""A checkpoint folder as a model: `config.json` and the headers of its safetensors files. No tensor is read before `weight` asks for one.

What a file does not say, and what is done about it:

    order        the tensors of a file are sorted by dtype and name. Modules come in the order of the live model where `order.py` knows it,
                 else by name, numbers as numbers: `in_order` says which
    geometry     stride, padding, dilation and groups of a convolution: `Module.exact` is False
    modules      one without parameters (dropout, activation) is not there; a tied head or embedding is added back from config.json
    prefix       some files leave out, or have, a prefix that the live model has not: GPT-2 on the hub says "h.0.attn", the live language
                 model "transformer.h.0.attn". Lists of suffixes match both; a regex or a full name is meant for the live model. `prefix` is
                 put before every module's and parameter's name here, and taken off again when a tensor is read
    layout       transformers 5 fuses the experts of some mixtures (mixtral) when it loads them; the file has the old names
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array
from peft_ref.errors import FileFormatError
from peft_ref.graph.names import stored_modules
from peft_ref.graph.order import in_live_order
from peft_ref.graph.protocol import Graph, Module, Parameter
from peft_ref.graph.ties import head_of, tied_parameters
from peft_ref.reading import documents, header
from peft_ref.reading.documents import read_object
from peft_ref.reading.opening import Stamp, span

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_BITS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "?", **{f"{s}{8 * n}": f"<{s.lower()}{n}" for s in "UI" for n in (1, 2, 4, 8)}}


class Place(NamedTuple):
    """Where a tensor lies."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int  # from the start of the file
    end: int
    stamp: Stamp | None = None  # of the file when its header was read


def read_header(path: Path) -> dict[str, Place]:
    """The tensors of a safetensors file, from its header alone."""
    found = header.read_header(path)
    return {name: Place(path, *entry, found.stamp) for name, entry in found.entries.items()}


@final
@dataclass(frozen=True)
class CheckpointGraph(Graph):
    """The model in a folder that `save_pretrained` wrote: one safetensors file, or several and their index."""

    folder: str | os.PathLike[str]
    prefix: str = field(default="", kw_only=True)

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        path = Path(self.folder) / "config.json"
        return MappingProxyType(read_object(path)) if path.is_file() else MappingProxyType({})

    @cached_property
    def _places(self) -> dict[str, Place]:
        folder = Path(self.folder)
        if (folder / SINGLE).is_file():
            found = read_header(folder / SINGLE)
        elif (folder / INDEX).is_file():
            found = _sharded(folder)
        else:
            raise FileFormatError(f"{folder}: neither {SINGLE} nor {INDEX} is there.\n  Give the folder that `save_pretrained` wrote.")
        return {self.prefix + name: found[name] for name in sorted(found, key=_natural)}

    @cached_property
    def _parameters(self) -> Mapping[str, Parameter]:
        return MappingProxyType({n: Parameter(name=n, shape=p.shape, dtype=p.dtype) for n, p in self._places.items()})

    @cached_property
    def _tied(self) -> Mapping[str, str]:
        return MappingProxyType(tied_parameters(self._parameters, self.config))

    @cached_property
    def _found(self) -> Mapping[str, Module]:
        first = dict(self._parameters)
        second = {s: Parameter(name=s, shape=first[f].shape, dtype=first[f].dtype) for s, f in self._tied.items()}
        return stored_modules(first | second, self.config)

    @cached_property
    def _order(self) -> tuple[str, ...] | None:
        return in_live_order(self._found, self.model_type)

    @cached_property
    def _modules(self) -> Mapping[str, Module]:
        return MappingProxyType({name: self._found[name] for name in self._order or self._found})

    def modules(self) -> Mapping[str, Module]:
        return self._modules

    def parameters(self) -> Mapping[str, Parameter]:
        return self._parameters

    def tied(self) -> Mapping[str, str]:
        return self._tied

    @property
    def output_head(self) -> str | None:
        return head_of(self._modules, self.model_type)

    @property
    def in_order(self) -> bool:
        return self._order is not None

    @property
    def pretrained(self) -> bool:
        return "model_type" in self.config

    def weight(self, name: str) -> Array:
        place = self._places[self.resolve(name)]
        dtype = _dtype(place, name)
        return np.frombuffer(span(place.path, name, place.begin, place.end, place.stamp), dtype=dtype).reshape(place.shape)


def under_live_names(folder: str | os.PathLike[str], modules: Iterable[str]) -> CheckpointGraph:
    """The checkpoint under the names of the live model, of which `modules` are some: a file may leave out their first part."""
    graph, heads = CheckpointGraph(folder), Counter[str]()
    for module in modules:
        ends = [0, *(at + 1 for at, letter in enumerate(module) if letter == ".")]
        heads.update(module[:end] for end in ends if module[end:] in graph.modules())
    head = heads.most_common(1)[0][0] if heads else ""
    return CheckpointGraph(folder, prefix=head) if head else graph


def _dtype(place: Place, name: str) -> np.dtype[Any]:
    if place.dtype in _BITS:
        return np.dtype(_BITS[place.dtype])
    import ml_dtypes

    own = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
    if place.dtype not in own:
        raise FileFormatError(f"{place.path}: {name} is {place.dtype}, which is no NumPy dtype here.")
    dtype: np.dtype[Any] = np.dtype(own[place.dtype])
    return dtype


def _sharded(folder: Path) -> dict[str, Place]:
    index = folder / INDEX
    shards = checked_index(index)["weight_map"]
    headers: dict[str, dict[str, Place]] = {}
    for file in sorted(set(shards.values())):
        try:
            headers[file] = read_header(folder / file)
        except OSError as error:
            raise FileFormatError(f"{index}: weight_map names {file!r}, which cannot be read: {error.strerror}.\n  Get it again.") from None
    if missing := [name for name, file in shards.items() if name not in headers[file]]:
        raise FileFormatError(f"{folder}: {missing[0]!r} is not in {shards[missing[0]]}, where the index says it is.\n  Get both again.")
    return {name: headers[file][name] for name, file in shards.items()}


def checked_index(path: Path) -> dict[str, Any]:
    """What the index of a sharded checkpoint says: its weight_map names files beside it."""
    index = read_object(path, documents.INDEX)
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(f, str) and _is_beside(f) for f in shards.values()):
        raise FileFormatError(f"{path}: weight_map is not a map from tensor names to files beside it.")
    return index


def _is_beside(name: str) -> bool:
    """Whether it can be the name of a file in a folder, wherever that is: no path, no drive, nothing that steers a terminal."""
    return 0 < len(name) <= 255 and name not in (".", "..") and name.isprintable() and not set(name) & set('/\\:*?"<>|')


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts layers.2 before layers.10."""
    parts = (re.fullmatch(r"[0-9]+", part) for part in name.split("."))
    return [(0, int(found[0]), "") if found else (1, 0, part) for found, part in zip(parts, name.split("."), strict=True)]
