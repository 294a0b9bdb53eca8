"""What is to be written, decided before a byte is: every file of the output, every tensor in it, and where its bytes come from.

    Plan      the whole output: its shards, and the files that come along
    Shard     one safetensors file, the unit of work: nothing in it depends on another shard
    Planned   one tensor of it: where its bytes lie in the base, and the changes, in order. Without any, and in its own dtype: a copy
    Change    what one adapter does to one tensor, by names and numbers alone, so that a plan can be pickled and sent to another machine
    Rows      a change whose adapter was read: it maps rows of the stored tensor. What needs all of them at once says so

A plan is cheap: it reads headers and configurations, no weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np

NDArray: TypeAlias = np.ndarray[Any, Any]
# How PEFT rounds; what each does is in spec/merging.md.
Rounding: TypeAlias = Literal["default", "safe", "kept"]


class Source(NamedTuple):
    """An adapter that is merged, and how much of it."""

    folder: Path  # where adapter_config.json lies
    weight: float = 1.0


class Change(ABC):
    """What one adapter does to one tensor. A frozen dataclass of names and numbers."""

    @abstractmethod
    def opened(self) -> Rows:
        """The same with what it needs of the adapter's file read."""

    @abstractmethod
    def adapter(self) -> Path:
        """The folder of the adapter that it is made of, as in `Plan.sources`: for the printed plan, and to see whether its files stay."""

    def whole(self) -> bool:
        """Whether its rows are going to need all rows at once, told before anything is read: for the memory in the printed plan."""
        return False


class Rows(ABC):
    """A map of the rows of a stored tensor, which is a matrix here: `Planned.matrix` says how many rows and columns it has."""

    whole: ClassVar[bool] = False  # whether it needs all rows at once (DoRA on a transposed weight, FourierFT)

    @abstractmethod
    def __call__(self, rows: NDArray, first: int) -> NDArray:
        """What the rows `first`, `first + 1` ... become, in the dtype that they come in and rounded as the plan says.

        `rows` (n, columns) may be written into, and may be what is returned. Several threads call it at once, each with rows of its own.
        """


class Planned(NamedTuple):
    """One tensor of the output. Where it gets another dtype than it has, it is changed in the wider of the two."""

    name: str
    dtype: str  # as safetensors spells it, in the output
    shape: tuple[int, ...]
    path: Path  # the file of the base that it lies in
    stored_dtype: str  # and how it lies there
    begin: int  # from the start of that file
    end: int
    changes: tuple[Change, ...] = ()
    rows: int | None = None  # of the matrix that the changes see, where it is not the first axis: of a stack of matrices all their rows

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns as the changes see them; a vector is one column."""
        rows = self.rows if self.rows is not None else (self.shape[0] if self.shape else 1)
        return rows, math.prod(self.shape) // rows if rows else 0


class Shard(NamedTuple):
    """One safetensors file of the output; its tensors in the order in which they lie in it."""

    name: str
    tensors: tuple[Planned, ...]
    source: Path | None  # the file of the base whose header it has, byte for byte; None where a header of its own is written
    metadata: tuple[tuple[str, str], ...] = (("format", "pt"),)

    @property
    def sources(self) -> set[Path]:
        """The files of the base that it is made of."""
        return {t.path for t in self.tensors} | ({self.source} if self.source is not None else set())


@dataclass(frozen=True)
class Plan:
    base: Path
    sources: tuple[Source, ...]
    shards: tuple[Shard, ...]
    along: tuple[Path, ...] = ()  # configuration, tokenizer: files of the base that are copied under their names
    written: tuple[tuple[str, bytes], ...] = ()  # an index, a changed configuration: name and what it holds
    left: tuple[str, ...] = ()  # files of the base that do not come along: weights in other formats, what is large
