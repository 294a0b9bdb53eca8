"""Executes a plan: workers that share the shards' tasks, and an output that appears when all of them are done.

The workers are processes where that may be (`forked`), else the threads here. One takes a shard of its own as long as there is one, since
writes into one file wait for one another, and then helps with others'. Nothing is held but a block of rows for every worker and the
adapters' tensors of what is being changed; a change that needs all rows at once holds its tensor. A finished shard is synced and gets its
name. What a killed run has finished is kept.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from peft_ref.checkpoints.blas import one_thread
from peft_ref.checkpoints.copying import Stamps, copy, write
from peft_ref.checkpoints.forked import Forked, alone
from peft_ref.checkpoints.job import Job
from peft_ref.checkpoints.output import Output
from peft_ref.checkpoints.plan import Plan
from peft_ref.checkpoints.todo import TELL_EVERY, Progress, Todo
from peft_ref.checkpoints.work import Bench, Task, total
from peft_ref.errors import MergeError


@dataclass(frozen=True)
class Merged:
    """What a run did."""

    out: Path
    written: int  # bytes
    kept: tuple[str, ...]  # shards that an earlier run, which was killed, had finished
    seconds: float


def execute(
    plan: Plan,
    out: Path,
    *,
    run: Callable[[Todo], int] | None = None,
    threads: int | None = None,
    fsync: bool = True,
    overwrite: bool = False,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Merged:
    """Write what was planned to the folder `out`: all of it, or a MergeError and nothing. `tell` is called now and then, from here.

    `run` writes the shards and returns how many bytes those are; by default as many workers do as `threads` says, or as there are cores.
    """
    began = time.monotonic()
    try:
        stamps = Stamps(read_by(plan))
        mark = fingerprint(plan, stamps)
        with Output(out, fingerprint=mark, overwrite=overwrite, fsync=fsync, reads=[plan.base, *stamps.files]) as output:
            if output.done:
                return Merged(out, 0, tuple(shard.name for shard in plan.shards), time.monotonic() - began)
            sizes = {shard.name: total(shard) for shard in plan.shards}
            kept = output.finished(sizes)
            _check_space(plan, output, sum(sizes.values()) - sum(sizes[name] for name in kept))
            left = [shard for shard in plan.shards if shard.name not in kept]
            todo = Todo(left, sizes, output.folder, len(kept), tell, output.handle)
            written = run(todo) if run is not None else _workers(todo, threads or cores(), fsync).run()
            _write_small(plan, output)
            stamps.check(stamps.files)
            output.publish()
    except OSError as error:
        raise _as_merge_error(error, out) from error
    return Merged(out, written, tuple(sorted(kept)), time.monotonic() - began)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_by(plan: Plan) -> set[Path]:
    """Every file that the output is made of."""
    base = {path for shard in plan.shards for path in shard.sources}
    folders = {source.folder for source in plan.sources} | {c.adapter() for s in plan.shards for t in s.tensors for c in t.changes}
    theirs = {path for folder in folders for path in folder.iterdir() if path.name == "adapter_config.json" or _weights(path)}
    return base | theirs | set(plan.along)


def fingerprint(plan: Plan, stamps: Stamps) -> str:
    """The same text for the same plan over the same files, in another process too; a file that was touched is another file."""
    from _blake2 import blake2b  # hashlib's own; hashlib itself loads OpenSSL, 4 MB

    from peft_ref import __version__

    mark = blake2b(f"{__version__} {plan.sources}".encode())
    for shard in plan.shards:
        mark.update(repr(shard).encode())
    mark.update(repr((plan.along, plan.written, sorted(stamps.files.items()))).encode())
    return mark.hexdigest()


def _workers(todo: Todo, count: int, fsync: bool) -> Forked | _Threads:
    return Forked(todo, count, fsync) if count > 1 and alone() else _Threads(todo, count, fsync)


class _Threads:
    def __init__(self, todo: Todo, threads: int, fsync: bool) -> None:
        jobs = [Job(shard, todo.sizes[shard.name], todo.folder, fsync) for shard in todo.shards]
        self._waiting, self._begun = list(reversed(jobs)), list[Job]()
        self._tell = todo.tell
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._error: BaseException | None = None
        self._stop = False
        self._written, self._finished = 0, todo.kept
        self._total, self._of = sum(job.size for job in jobs), todo.kept + len(jobs)
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        self._at_work = threads
        self._began = time.monotonic()

    def run(self) -> int:
        """Until all is done, or something is wrong; returns how many bytes were written."""
        with one_thread():
            try:
                for thread in self._threads:
                    thread.start()
                while not self._ended.wait(TELL_EVERY):
                    self._tell(self._progress())
            finally:
                self._stop = True
                for thread in self._threads:
                    if thread.ident is not None:
                        thread.join()
                for job in self._begun:
                    job.close()
        if self._error is not None:
            raise self._error
        self._tell(self._progress())
        return self._written

    def _work(self) -> None:
        try:
            bench = Bench()
            own: Job | None = None
            while not self._stop:
                own, task = self._next(own)
                if own is None or task is None:
                    break
                written = own.do(task, bench)
                with self._lock:
                    self._written += written
                if own.settled(done=1):
                    self._finish(own)
        except BaseException as error:
            self._error, self._stop = self._error or error, True
        finally:
            with self._lock:
                self._at_work -= 1
                if not self._at_work:
                    self._ended.set()

    def _next(self, own: Job | None) -> tuple[Job | None, Task | None]:
        """A task of one's own shard, of one that nobody has begun, or of another's."""
        while not self._stop:
            if own is not None:
                if (task := own.take()) is not None:
                    return own, task
                if own.settled():
                    self._finish(own)
            with self._lock:
                if self._waiting:
                    own = self._waiting.pop()
                    self._begun.append(own)
                else:
                    own = next((job for job in self._begun if not job.dealt_out), None)
            if own is None:
                break
        return None, None

    def _finish(self, job: Job) -> None:
        job.finish()
        with self._lock:
            self._begun.remove(job)
            self._finished += 1

    def _progress(self) -> Progress:
        return Progress(self._written, self._total, self._finished, self._of, time.monotonic() - self._began)


def _check_space(plan: Plan, output: Output, shards: int) -> None:
    needed = shards + sum(path.stat().st_size for path in plan.along) + sum(len(data) for _, data in plan.written)
    if needed > (free := output.free()):
        raise MergeError(
            f"{output.out} takes {needed / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are free beside it.\n"
            "  Make room, or name a folder on another disk. Nothing was written."
        )


def _write_small(plan: Plan, output: Output) -> None:
    """What is no shard."""
    for path in plan.along:
        with path.open("rb") as source, _written(output, path.name) as target:
            copy(source.fileno(), 0, target, 0, os.fstat(source.fileno()).st_size)
    for name, data in plan.written:
        with _written(output, name) as target:
            write(data, target, 0)


@contextlib.contextmanager
def _written(output: Output, name: str) -> Iterator[int]:
    target = os.open(output.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        yield target
        if output.fsync:
            os.fsync(target)
    finally:
        os.close(target)


def _as_merge_error(error: OSError, out: Path) -> MergeError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        what = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up"}.get(error.errno, "no file may be that large")
        return MergeError(f"{out}: {what}.\n  Make room, or name a folder on another disk. Nothing was left behind.")
    where = error.filename2 or error.filename or out
    return MergeError(f"{os.fsdecode(where)}: {error.strerror or error}.\n  {out} was not written; nothing was left behind.")


def _weights(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name == "adapter_model.bin"
