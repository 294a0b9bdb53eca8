"""What a checkpoint holds, from its configuration and the headers of its files: tensors, dtypes, shards, sizes."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from peft_ref.checkpoints.inspecting import ODD, WRONG, Finding, listed
from peft_ref.files.safetensors import Entry, dtypes, open_file
from peft_ref.graph import CheckpointGraph
from peft_ref.graph.checkpoint import INDEX, SINGLE, checked_index


class Shard(NamedTuple):
    name: str
    size: int  # bytes, header and all
    entries: Mapping[str, Entry]


@dataclass(frozen=True, eq=False, kw_only=True)
class Base:
    folder: Path
    config: Mapping[str, Any]  # config.json; empty where there is none
    shards: tuple[Shard, ...]
    tied: Mapping[str, str]
    findings: tuple[Finding, ...] = ()

    @property
    def entries(self) -> dict[str, Entry]:
        return {name: entry for shard in self.shards for name, entry in shard.entries.items()}

    @property
    def dtypes(self) -> dict[str, int]:
        """How many parameters there are of each dtype."""
        count: Counter[str] = Counter()
        for entry in self.entries.values():
            count[entry.dtype] += math.prod(entry.shape)
        return dict(count.most_common())

    @property
    def parameters(self) -> int:
        return sum(self.dtypes.values())

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)


def is_base(folder: Path) -> bool:
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def inspect_base(folder: str | os.PathLike[str]) -> Base:
    """The checkpoint in `folder`. Raises where a header, or the index, is not what it promises."""
    folder = Path(folder)
    graph = CheckpointGraph(folder)
    promised = tuple(graph.parameters())  # every file of the index is there, with the tensors that it should have
    index = {} if (folder / SINGLE).is_file() else checked_index(folder / INDEX)
    names = sorted(set(index["weight_map"].values())) if index else [SINGLE]
    files = {name: open_file(folder / name) for name in names}
    shards = tuple(Shard(name, (folder / name).stat().st_size, file.entries) for name, file in files.items())
    findings = []
    if strangers := sorted({name for shard in shards for name in shard.entries} - set(promised)):
        findings.append(Finding(ODD, f"The index leaves out {listed(strangers)}, which the files hold."))
    held = sum(entry.end - entry.begin for shard in shards for entry in shard.entries.values())
    total = (index.get("metadata") or {}).get("total_size")
    if total is not None and total != held:
        findings.append(Finding(ODD, f"The index says total_size={total}, and the tensors take {held} bytes."))
    if unknown := sorted({e.dtype for shard in shards for e in shard.entries.values()} - dtypes().keys()):
        findings.append(Finding(WRONG, f"{', '.join(unknown)} is no NumPy dtype here: tensors of it can be copied, and not changed."))
    return Base(folder=folder, config=graph.config, shards=shards, tied=graph.tied(), findings=tuple(findings))
