"""Progress on a stream: a bar that is written over on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import shutil
import time
from typing import TextIO, final

from peft_ref.checkpoints.todo import Progress

CELLS = 16


@final
class Bar:
    def __init__(self, stream: TextIO, every: float = 5.0) -> None:
        self._stream, self._every = stream, every
        self._live, self._last, self._shown = stream.isatty(), time.monotonic(), False

    def tell(self, progress: Progress) -> None:
        now = time.monotonic()
        if not self._live and now - self._last < self._every:
            return
        self._last = now
        if self._live:
            done = CELLS * progress.written // max(1, progress.total)
            line = f"[{'#' * done}{'.' * (CELLS - done)}] {line_of(progress)}"
            self._stream.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
            self._shown = True
        else:
            self._stream.write(line_of(progress) + "\n")
        self._stream.flush()

    def done(self) -> None:
        """The bar goes, what comes next has the line for itself."""
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def line_of(progress: Progress) -> str:
    scale, unit = (1e9, "GB") if progress.total >= 1e9 else (1e6, "MB")
    share = progress.written / progress.total if progress.total else 1.0
    rate = progress.written / progress.seconds if progress.seconds else 0.0
    left = f"{_clock((progress.total - progress.written) / rate)} left" if rate else "starting"
    done = f"{progress.written / scale:.2f} of {progress.total / scale:.2f} {unit}"
    return f"{share:4.0%}  {done}  {rate / scale:.2f} {unit}/s  {left}  {progress.shards}/{progress.of} shards"


def _clock(seconds: float) -> str:
    whole = int(seconds + 0.5)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
