"""Checkpoints, plans and changes for the tests of the engine. A change here adds small whole numbers: it cannot round."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from peft_ref.checkpoints.plan import Change, Plan, Planned, Rows, Shard, Source
from peft_ref.files.safetensors import dtypes, open_file

NDArray = np.ndarray[Any, Any]
BF16 = dtypes()["BF16"]


@dataclass(frozen=True)
class Plus(Change):
    """Row i gets i + what the adapter says. So a block that is told a wrong first row shows."""

    folder: Path
    at_once: bool = False

    def adapter(self) -> Path:
        return self.folder

    def whole(self) -> bool:
        return self.at_once

    def opened(self) -> Rows:
        amount = open_file(self.folder / "adapter_model.safetensors").read("amount")
        return (PlusWhole if self.at_once else PlusRows)(float(amount[0]))


class PlusRows(Rows):
    def __init__(self, amount: float) -> None:
        self.amount = amount

    def __call__(self, rows: NDArray, first: int) -> NDArray:
        index = np.arange(first, first + len(rows), dtype=np.float32)[:, None]
        return np.asarray((rows.astype(np.float32) + (index + self.amount)).astype(rows.dtype))


class PlusWhole(PlusRows):
    whole = True

    def __call__(self, rows: NDArray, first: int) -> NDArray:
        assert first == 0
        return super().__call__(rows, first)


def adapter(folder: Path, amount: float = 3.0) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "NONE"}))
    save_file({"amount": np.array([amount], np.float32)}, folder / "adapter_model.safetensors")
    return folder


def checkpoint(folder: Path, shards: Sequence[Mapping[str, NDArray]]) -> Path:
    folder.mkdir(exist_ok=True)
    for n, tensors in enumerate(shards, 1):
        save_file(dict(tensors), folder / f"model-{n}.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"hidden_size": 4}\n')
    return folder


def numbers(*shape: int, dtype: Any = BF16, seed: int = 0) -> NDArray:
    """Integers from 0 to 63: with a row's number below 128 added they are exact in bfloat16."""
    return np.random.default_rng(seed).integers(0, 64, shape).astype(dtype)


def small(folder: Path, shards: int = 3, rows: int = 60, columns: int = 64) -> Path:
    """Each shard has a tensor that changes between two that do not; the last shard has none that changes."""
    made = []
    for n in range(shards):
        tensors = {f"{n}.before": numbers(7, seed=3 * n), f"{n}.touched": numbers(rows, columns, seed=3 * n + 1)}
        tensors |= {f"{n}.z": numbers(33, 5, seed=3 * n + 2)}
        made.append(tensors if n + 1 < shards else {name.replace("touched", "plain"): t for name, t in tensors.items()})
    return checkpoint(folder, made)


def planned(base: Path, adapters: Sequence[Path] = (), *, dtype: str | None = None, own: bool = False, whole: bool = False) -> Plan:
    """Every tensor with "touched" in its name gets the change of every adapter. `own`: headers of our own."""
    shards = []
    for path in sorted(base.glob("*.safetensors")):
        entries = sorted(open_file(path).entries.items(), key=lambda item: item[1].begin)
        changes = tuple(Plus(folder, whole) for folder in adapters)
        tensors = tuple(
            Planned(name, dtype or e.dtype, e.shape, path, e.dtype, e.begin, e.end, changes if "touched" in name else ())
            for name, e in entries
        )
        shards.append(Shard(path.name, tensors, None if own or dtype else path))
    written = (("model.safetensors.index.json", b'{"weight_map": {}}\n'),)
    return Plan(base, tuple(Source(folder) for folder in adapters), tuple(shards), (base / "config.json",), written)


def expected(base: Path, amounts: Sequence[float] = ()) -> dict[str, NDArray]:
    """The tensors of the output, by their definition."""
    found = {}
    for path in sorted(base.glob("*.safetensors")):
        for name, tensor in tensors(path).items():
            wide = tensor.astype(np.float64)
            if "touched" in name:
                for amount in amounts:
                    wide = wide + amount + np.arange(len(wide))[:, None]
            found[name] = wide
    return found


def tensors(path: Path) -> dict[str, NDArray]:
    file = open_file(path)
    return {name: file.read(name) for name in file.entries}


def merged(folder: Path) -> dict[str, NDArray]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in tensors(path).items()}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def beside(out: Path) -> set[str]:
    """What lies beside OUT under names of the engine."""
    return {path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.")}
