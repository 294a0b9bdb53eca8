"""Checkpoints that lie elsewhere: planned by their headers, fetched shard by shard where they are worked on.

    hollow    a local folder with the small files of a checkpoint and, for every shard, a file of the shard's size that holds its header
              alone: the rest is a hole, which takes no room. A plan is made of it as of the real one
    moved     a plan's shard with other folders in it: where its files lie on the machine that does the work
    fetch     a file of an fsspec address into a local folder

An address is what fsspec knows: s3://bucket/model, hf://org/model, file:///mnt/model, a plain path.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from peft_ref.checkpoints.base import LARGE, WEIGHTS
from peft_ref.errors import FileFormatError
from peft_ref.files.safetensors import MAX_HEADER

T = TypeVar("T")


def is_address(place: str) -> bool:
    """Whether it goes through fsspec: a plain path does not."""
    return "://" in place


def filesystem(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    import fsspec.core

    try:
        system, path = fsspec.core.url_to_fs(address)
    except (ValueError, ImportError) as error:
        raise FileFormatError(f"{address}: {error}.\n  Install what fsspec asks for, or give a plain path.") from error
    return system, str(path).rstrip("/")


def listed(address: str) -> tuple[Any, list[dict[str, Any]]]:
    """The file system of an address, and what lies there."""
    system, path = filesystem(address)
    try:
        return system, system.ls(path, detail=True)
    except Exception as error:  # every store has its own: not there, not allowed, nobody who could be asked
        said = f"{type(error).__name__}: {error!s:.200}"
        raise FileFormatError(f"{address} cannot be read: {said}.\n  Is it there, and may it be read from here?") from error


def hollow(address: str, folder: Path) -> Path:
    """The checkpoint at `address` without its numbers, in `folder`."""
    system, entries = listed(address)
    folder.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        name = str(entry["name"]).rstrip("/").rpartition("/")[2]
        if entry["type"] != "file" or name.startswith("."):
            continue
        if name.endswith(".safetensors"):
            _hollow_file(system, entry["name"], int(entry["size"]), folder / name)
        elif not name.endswith(WEIGHTS) and int(entry["size"]) <= LARGE:
            system.get_file(entry["name"], str(folder / name))
    return folder


def _hollow_file(system: Any, source: str, size: int, target: Path) -> None:
    with system.open(source, "rb", block_size=1 << 20) as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(MAX_HEADER, size):
            raise FileFormatError(f"{source}: claims a header of {length} bytes, the file has {size}.\n  No safetensors file, or cut off.")
        header = file.read(length)
    with target.open("wb") as hole:
        hole.write(start + header)
        hole.truncate(size)


def fetch(address: str, name: str, folder: Path) -> Path:
    """The file `name` of `address`, in `folder`; one that is there already is not fetched again."""
    target = folder / name
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        system, path = filesystem(address)
        part = target.with_name(f"{name}.{os.getpid()}.part")
        system.get_file(f"{path}/{name}", str(part))
        part.replace(target)
    return target


def fetch_folder(address: str, folder: Path) -> Path:
    """All files of an adapter's folder."""
    for entry in listed(address)[1]:
        if entry["type"] == "file":
            fetch(address, str(entry["name"]).rpartition("/")[2], folder)
    return folder


def moved(value: T, places: Mapping[Path, Path]) -> T:
    """`value` with every path below a folder of `places` below the folder that it stands for."""
    if isinstance(value, Path):
        for here, there in places.items():
            if value == here or here in value.parents:
                return there / value.relative_to(here)
        return value
    if isinstance(value, tuple):
        parts = [moved(part, places) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)  # type: ignore[return-value]  # as it was
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name), places) for f in fields(value) if f.init})
    return value
