"""One shard that is being written, by as many workers as want to."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

from peft_ref.checkpoints.copying import copy, write
from peft_ref.checkpoints.output import PART
from peft_ref.checkpoints.plan import Shard
from peft_ref.checkpoints.work import Bench, Range, Task, pieces, start, tasks
from peft_ref.errors import MergeError


class Job:
    """`take` a task and `do` it, again and again; whom `settled` answers with True makes it `finish`."""

    def __init__(self, shard: Shard, size: int, folder: Path, fsync: bool) -> None:
        self.shard, self.size, self.fsync = shard, size, fsync
        self.path = folder / shard.name
        self.dealt_out = False  # whether no tasks are left to take
        self._part = folder / (shard.name + PART)
        self._lock = threading.Lock()
        self._left: Iterator[Task] | None = None
        self._taken, self._over = 0, False
        self._target = -1
        self._opened: dict[Path, int] = {}

    def take(self) -> Task | None:
        """The next task; None when there are no more."""
        with self._lock:
            if self._left is None:
                self._left = (task for piece in pieces(self.shard, self.begin()) for task in tasks(piece))
            task = None if self.dealt_out else next(self._left, None)
            if task is None:
                self.dealt_out = True
            else:
                self._taken += 1
            return task

    def do(self, task: Task, bench: Bench) -> int:
        """Writes it; returns how many bytes that were."""
        path = task.source if isinstance(task, Range) else task.opened.tensor.path
        source = self._opened[path]
        try:
            if isinstance(task, Range):
                at, length = task.at, task.length
                copy(source, task.begin, self._target, at, length)
            else:
                data, at = bench.made(task, source)
                length = len(data)
                write(data.data, self._target, at)
            if self.fsync and hasattr(os, "posix_fadvise"):  # the disk begins now, and not when all is waited for
                os.posix_fadvise(self._target, at, length, os.POSIX_FADV_DONTNEED)
        except EOFError as error:
            raise MergeError(f"{path} was cut off since its header was read: {error}.\n  Get it again.") from error
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path), None, str(self.path)) from error
        return length

    def settled(self, done: int = 0) -> bool:
        """Counts tasks as done. True once: when all are."""
        with self._lock:
            self._taken -= done
            now = self.dealt_out and self._taken == 0 and not self._over
            self._over = self._over or now
            return now

    def finish(self) -> None:
        """All tasks are done: the shard gets its name."""
        if self.fsync:
            os.fsync(self._target)
        self.close()
        os.rename(self._part, self.path)

    def close(self) -> None:
        for handle in (self._target, *self._opened.values()):
            if handle >= 0:
                os.close(handle)
        self._target, self._opened = -1, {}

    def begin(self) -> int:
        """Opens the files; returns where the tensors' bytes start. The same bytes are written whoever else begins it, and when."""
        for path in sorted(self.shard.sources):
            self._opened[path] = os.open(path, os.O_RDONLY)
        # Not emptied first: the blocks that a killed run wrote are taken over, and every byte is written again.
        self._target = os.open(self._part, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(self._target, self.size)
        begin = start(self.shard)
        if isinstance(begin, bytes):
            write(begin, self._target, 0)
            begin = len(begin)
        return begin
