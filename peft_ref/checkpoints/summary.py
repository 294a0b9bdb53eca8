"""A plan in words and in JSON: what is copied, what is changed and by which adapter, what comes along, and how much memory it takes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_ref.checkpoints.plan import Plan, Planned, Shard
from peft_ref.checkpoints.work import BLOCK, size, total, touched
from peft_ref.files.safetensors import dtypes

PROGRAM = 34 << 20  # Python, NumPy, ml_dtypes and this package, as they were measured
FORKED = 4 << 20  # what another worker, which is a process, has of its own beside that: Python writes to what it reads
ADAPTER = 4  # what is held of a block while it is changed: as it is stored, and in float32, as it was and as it will be


def as_json(plan: Plan, out: str, threads: int, addresses: Mapping[Path, str]) -> dict[str, Any]:
    """What `in_words` says, and more of it. A folder that stands for an address is called by that."""
    return {
        "base": addresses.get(plan.base, str(plan.base)),
        "out": out,
        "bytes": sum(map(total, plan.shards)),
        "shards": [_shard(shard) for shard in plan.shards],
        "adapters": [
            {
                "folder": addresses.get(source.folder, str(source.folder)),
                "weight": source.weight,
                "tensors": _touches(plan, source.folder),
            }
            for source in plan.sources
        ],
        "along": [path.name for path in plan.along],
        "written": [name for name, _ in plan.written],
        "left": list(plan.left),
        "memory": memory(plan, threads),
    }


def in_words(plan: Plan, out: str, threads: int, addresses: Mapping[Path, str]) -> str:
    told = as_json(plan, out, threads, addresses)
    width = max(len(shard["name"]) for shard in told["shards"])
    lines = [f"{told['base']} -> {told['out']}: {amount(told['bytes'])} in {_many(len(told['shards']), 'shard')}"]
    for shard in told["shards"]:
        changed = f"{amount(shard['changed'])} changed in {_many(shard['touched'], 'tensor')}" if shard["touched"] else "nothing changed"
        lines.append(f"  {shard['name']:{width}}  {amount(shard['copied'])} copied, {changed}")
    for adapter in told["adapters"]:
        lines.append(f"{adapter['folder']} (weight {adapter['weight']:g}): {_many(sum(adapter['tensors'].values()), 'tensor')}")
        lines += [f"  {number:5} x {name}" for name, number in adapter["tensors"].items()]
    for title, names in (("comes along", told["along"]), ("is written", told["written"]), ("is left behind", told["left"])):
        if names:
            lines.append(f"{title}: {', '.join(names)}")
    lines.append(f"memory: about {told['memory'] / 1e6:.0f} MB with {_many(threads, 'worker')}")
    return "\n".join(lines)


def memory(plan: Plan, threads: int) -> int:
    """About how many bytes a run holds at most. A tensor that has one long row, or needs all of them at once, is held as a whole."""
    held = max((_held(tensor) for shard in plan.shards for tensor in shard.tensors if touched(tensor)), default=0)
    return PROGRAM + threads * held + (threads - 1) * FORKED


def _held(tensor: Planned) -> int:
    wider = max(dtypes()[dtype].itemsize for dtype in (tensor.dtype, tensor.stored_dtype))
    rows, columns = tensor.matrix
    block = max(BLOCK, columns * wider)
    if any(change.whole() for change in tensor.changes):
        block = rows * columns * max(wider, 4)
    return ADAPTER * block


def _shard(shard: Shard) -> dict[str, Any]:
    changed = [tensor for tensor in shard.tensors if touched(tensor)]
    whole, part = total(shard), sum(map(size, changed))
    return {
        "name": shard.name,
        "bytes": whole,
        "copied": whole - part,
        "changed": part,
        "tensors": len(shard.tensors),
        "touched": len(changed),
    }


def _touches(plan: Plan, folder: Path) -> dict[str, int]:
    """Names of tensors with `*` for every number in them, and how many such tensors the adapter changes."""
    names = [t.name for s in plan.shards for t in s.tensors if any(change.adapter() == folder for change in t.changes)]
    return dict(Counter(re.sub(r"\d+", "*", name) for name in names))


def amount(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} bytes"


def _many(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
