"""What is to be written, and how far it is: what an engine's workers are given, and what they tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_ref.checkpoints.plan import Shard

TELL_EVERY = 0.1  # seconds


@dataclass(frozen=True)
class Progress:
    written: int  # bytes, in this run
    total: int  # bytes that are to be written in this run
    shards: int  # that are finished, those that an earlier run finished among them
    of: int
    seconds: float


@dataclass(frozen=True)
class Todo:
    """The shards that are to be written into a folder."""

    shards: Sequence[Shard]
    sizes: Mapping[str, int]
    folder: Path
    kept: int  # shards that need not be
    tell: Callable[[Progress], None]
    lock: int  # the open file that keeps others from the folder for as long as this process lives
