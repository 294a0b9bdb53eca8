"""Workers that are processes, where this one may be forked: threads wait for one another, as only one of them at a time may be in Python.

Between two calls of NumPy a thread needs the interpreter, which the other one has: two threads make a tile in 1.3 ns a number, exactly in
4.4, two processes in 0.9 and 2.4. What was planned and imported is shared memory after a fork; a worker's own are its buffers and what
Python counts references in.

    board    a few numbers that all of them see: of every shard how many pieces are taken and how many done, and what each has written
    pipe     an error, as JSON. It ends when the last worker does

A worker takes a shard of its own as long as there is one, then it helps. This process is one of them, and now and then looks at the
others. When it dies, the kernel ends them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import mmap
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from peft_ref import errors
from peft_ref.checkpoints.blas import one_thread
from peft_ref.checkpoints.job import Job
from peft_ref.checkpoints.todo import TELL_EVERY, Progress, Todo
from peft_ref.checkpoints.work import Bench, pieces, start, tasks
from peft_ref.errors import MergeError, PeftRefError

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def alone() -> bool:
    """Whether this process may be forked: what another thread holds at that moment, a library's too, would be held for ever."""
    if sys.platform != "linux":
        return False
    try:
        os.close(os.memfd_create("peft-ref"))  # not everywhere in a sandbox, nor is /proc
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


class Board:
    """Numbers in memory that is shared with the forked processes."""

    def __init__(self, pieces: Sequence[int], workers: int) -> None:
        """`pieces` says of how many each shard is made."""
        self._of, n = pieces, len(pieces)
        numbers = memoryview(mmap.mmap(-1, 8 * (1 + 2 * n + workers))).cast("q")
        self._finished, self._taken, self._done, self._written = (
            numbers[:1],
            numbers[1 : 1 + n],
            numbers[1 + n : 1 + 2 * n],
            numbers[1 + 2 * n :],
        )
        self._lock = os.memfd_create("peft-ref")

    def close(self) -> None:
        os.close(self._lock)

    @property
    def finished(self) -> int:
        """How many shards."""
        return self._finished[0]

    @property
    def written(self) -> int:
        return sum(self._written)

    def take(self, own: int | None) -> tuple[int, int] | None:
        """A piece of one's own shard, of one that nobody has begun, or of another's: the shard's place and the piece's."""
        with self._held():
            left = [n for n, taken in enumerate(self._taken) if taken < self._of[n]]
            if not left:
                return None
            shard = own if own in left else next((n for n in left if not self._taken[n]), left[0])
            assert shard is not None
            self._taken[shard] += 1
            return shard, self._taken[shard] - 1

    def count(self, worker: int, written: int) -> None:
        self._written[worker] += written

    def done(self, shard: int) -> bool:
        """Counts a piece as done; whether it was the shard's last."""
        with self._held():
            self._done[shard] += 1
            return self._done[shard] == self._of[shard]

    def finish(self) -> None:
        """Counts a shard as finished."""
        with self._held():
            self._finished[0] += 1

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        import fcntl  # Windows, where nothing is merged, has none

        fcntl.lockf(self._lock, fcntl.LOCK_EX)  # a process that dies lets go of it
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)


class Forked:
    """Writes shards by processes; what the engine's threads do otherwise."""

    def __init__(self, todo: Todo, workers: int, fsync: bool) -> None:
        self._todo, self._workers, self._fsync = todo, workers, fsync
        self._begins = [_begin(start(shard)) for shard in todo.shards]
        counts = [max(1, sum(1 for _ in pieces(shard, begin))) for shard, begin in zip(todo.shards, self._begins, strict=True)]
        self._board = Board(counts, workers)
        self._total = sum(todo.sizes[shard.name] for shard in todo.shards)
        self._began = self._looked = time.monotonic()

    def run(self) -> int:
        """Until all is done, or something is wrong; returns how many bytes were written."""
        read, write = os.pipe()
        children: list[int] = []
        try:
            with one_thread():
                try:
                    for worker in range(1, self._workers):
                        children.append(self._fork(worker, read, write))
                finally:
                    os.close(write)  # so that the pipe ends with the last of them
                self._work(0, lambda: self._look(read, children, 0))
            while not self._look(read, children, TELL_EVERY):
                pass
            while children:
                ended = os.waitid(os.P_PID, children.pop(), os.WEXITED)
                _refuse_killed(ended)
                assert ended is None or ended.si_status == 0, "a worker failed and could not say so"
        finally:
            for child in children:  # an error, here or there, or Ctrl-C
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            os.close(read)
            self._board.close()
        assert self._board.finished == len(self._todo.shards), "the workers left a shard"
        self._todo.tell(self._progress())
        return self._board.written

    def _look(self, read: int, children: Sequence[int], wait: float) -> bool:
        """Now and then: whether the others have ended. Raises what one of them says, and tells how far all are."""
        if wait or time.monotonic() - self._looked >= TELL_EVERY:
            self._looked = time.monotonic()
            if select.select([read], [], [], wait)[0]:
                said = b""
                while b"\n" not in said and (part := os.read(read, 1 << 16)):
                    said += part
                if said:
                    raise _as_error(json.loads(said.partition(b"\n")[0]))
                return True
            for child in children:
                _refuse_killed(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))
            self._todo.tell(self._progress())
        return False

    def _progress(self) -> Progress:
        of = self._todo.kept + len(self._todo.shards)
        return Progress(self._board.written, self._total, self._todo.kept + self._board.finished, of, time.monotonic() - self._began)

    def _fork(self, worker: int, read: int, write: int) -> int:
        parent = os.getpid()
        return os.fork() or self._child(worker, parent, read, write)

    def _child(self, worker: int, parent: int, read: int, write: int) -> NoReturn:
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                gc.freeze()  # what is there stays: no collection touches its memory, which would be copied
                os.close(read)
                if self._todo.lock >= 0:
                    os.close(self._todo.lock)  # it is the parent's: free when that is dead
                self._work(worker, lambda: None)
                status = 0
        except BaseException as error:
            os.write(write, json.dumps(_as_json(error)).encode() + b"\n")
        finally:
            os._exit(status)

    def _work(self, worker: int, between: Callable[[], object]) -> None:
        bench, taken = Bench(), self._board.take(None)
        while taken is not None:
            shard = self._todo.shards[own := taken[0]]
            job, mine = Job(shard, self._todo.sizes[shard.name], self._todo.folder, self._fsync), list(pieces(shard, self._begins[own]))
            try:
                job.begin()
                while taken is not None and taken[0] == own:
                    for task in (task for piece in mine[taken[1] :][:1] for task in tasks(piece)):  # of an empty shard there is none
                        self._board.count(worker, job.do(task, bench))
                        between()
                    if self._board.done(own):
                        job.finish()
                        self._board.finish()
                    taken = self._board.take(own)
            finally:
                job.close()


def _refuse_killed(ended: Any) -> None:
    """`ended` is waitid's: what became of a worker, or None while it works."""
    if ended is not None and ended.si_code != os.CLD_EXITED:
        by = f"{ended.si_status}{' (out of memory?)' if ended.si_status == signal.SIGKILL else ''}"
        raise MergeError(f"a worker was ended from outside, by signal {by}.\n  Try fewer --threads. Nothing was left behind.")


def _begin(begin: int | bytes) -> int:
    return begin if isinstance(begin, int) else len(begin)


def _as_json(error: BaseException) -> list[Any]:
    """What a pipe takes in one piece: its name, its arguments; where it was raised, if that is no message of ours."""
    if isinstance(error, PeftRefError):
        return [type(error).__name__, str(error)[:2000]]
    if isinstance(error, OSError):
        names = (None if name is None else os.fsdecode(name)[-900:] for name in (error.filename, error.filename2))
        return ["OSError", error.errno, error.strerror, *names]
    return ["RuntimeError", "".join(traceback.format_exception(error))[-2000:]]


def _as_error(said: list[Any]) -> BaseException:
    name, *arguments = said
    if name == "OSError":
        number, text, first, second = arguments
        return OSError(number, text, first, None, second)
    kind = getattr(errors, name, RuntimeError)
    return kind(*arguments)
