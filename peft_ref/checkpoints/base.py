"""A checkpoint that is to be changed: its shards with the tensors in each, in the order in which they lie there, and what lies beside them.

Beside the weights come along: configuration, tokenizer, generation settings, code, notices. Left behind, and named, are weights in other
formats (a pickle would be the old weights under the new name), adapters, hidden files, folders, and what is large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft_ref.checkpoints.pieces import Piece, pieces
from peft_ref.errors import FileFormatError, NotMergeableError
from peft_ref.files.safetensors import SafetensorsFile, open_file
from peft_ref.graph.checkpoint import INDEX, SINGLE, checked_index
from peft_ref.reading.documents import read_object

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".npz", ".npy")
LARGE = 64 << 20  # a tokenizer of 250 thousand words takes half of it
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Base:
    folder: Path

    @cached_property
    def files(self) -> Mapping[str, SafetensorsFile]:
        """The shards by their names, in their order."""
        if (self.folder / SINGLE).is_file():
            names = [SINGLE]
        elif self.index:
            names = sorted(set(self.index["weight_map"].values()))
        else:
            pickles = sorted(p.name for p in self.folder.glob("*.bin")) if self.folder.is_dir() else []
            more = f" There is {pickles[0]}, a pickle, which is not read." if pickles else ""
            raise FileFormatError(
                f"{self.folder}: neither {SINGLE} nor {INDEX} is there.{more}\n  Give the folder that `save_pretrained` wrote."
            )
        if missing := [name for name in names if not (self.folder / name).is_file()]:
            raise FileFormatError(
                f"{self.folder}: {missing[0]} is not there, and {len(missing) - 1} more that the index names.\n  Get them."
            )
        files = {name: open_file(self.folder / name) for name in names}
        self._check(files)
        return files

    @cached_property
    def index(self) -> Mapping[str, Any]:
        """What the index says; empty where there is none, or where one file holds all."""
        path = self.folder / INDEX
        if (self.folder / SINGLE).is_file() or not path.is_file():
            return {}
        return checked_index(path)

    @cached_property
    def shards(self) -> Mapping[str, Mapping[str, Piece]]:
        """The tensors of every shard."""
        return {name: pieces(file) for name, file in self.files.items()}

    @cached_property
    def tensors(self) -> Mapping[str, Piece]:
        return {name: piece for own in self.shards.values() for name, piece in own.items()}

    def check(self) -> None:
        """Raise `FileFormatError` where the base is not what it should be."""
        if config := _config_of(self.folder):
            quantised = config.get("quantization_config")
            if isinstance(quantised, dict):
                raise NotMergeableError(
                    f"{self.folder}: a base quantised by {quantised.get('quant_method', 'something')}, whose stored numbers are not its"
                    " weights.\n  Merge into the base as it was before, in 16 or 32 bits."
                )
        self.files  # noqa: B018  # opens them

    def beside(self) -> tuple[list[Path], list[str]]:
        """Which files come along, and the names of what does not."""
        along, left = list[Path](), list[str]()
        for path in sorted(self.folder.iterdir()):
            if path.name in self.files or path.name == INDEX:
                continue
            weights = path.suffix in WEIGHTS or any(f"{end}.index" in path.name for end in WEIGHTS)
            if weights or not path.is_file() or path.name.startswith(".") or path.name == ADAPTER or path.stat().st_size > LARGE:
                left.append(path.name + ("/" if path.is_dir() else ""))
            else:
                along.append(path)
        return along, left

    def _check(self, files: Mapping[str, SafetensorsFile]) -> None:
        """Every tensor is in one shard, and where the index says it is."""
        found: dict[str, str] = {}
        for file, opened in files.items():
            for name in opened.entries:
                if name in found:
                    raise FileFormatError(
                        f"{self.folder}: {name!r} is in {found[name]} and in {file}.\n  A merge cannot know which counts."
                    )
                found[name] = file
        for name, file in self.index.get("weight_map", found).items():
            if found.get(name) != file:
                raise FileFormatError(f"{self.folder}: {name!r} is not in {file}, where the index says it is.\n  Get both again.")


def _config_of(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    return read_object(path)
