"""The same plan on many machines: a shard is the unit of work, and Dask's scheduler deals them out.

A worker writes its shard under a name that nobody else uses, and renames it when it is whole. So a shard that two workers were given, or
that one died over, is there once and complete; Dask gives the shard of a worker that died to another. Shared folders are read and written
where they are; addresses (s3://, hf://) are fetched and stored shard by shard, on the worker's own disk in between.

    OUT a path       appears whole, by the rename that `engine.execute` ends with; a killed run is continued
    OUT an address   has the index, or the only shard, as its last file: without it the checkpoint is none
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from peft_ref.checkpoints.blas import one_thread
from peft_ref.checkpoints.copying import Stamps
from peft_ref.checkpoints.engine import Merged, execute
from peft_ref.checkpoints.job import Job
from peft_ref.checkpoints.moving import fetch, fetch_folder, filesystem, hollow, is_address, moved
from peft_ref.checkpoints.plan import Plan, Shard, Source
from peft_ref.checkpoints.todo import Progress, Todo
from peft_ref.checkpoints.work import Bench, total
from peft_ref.errors import ConfigError, MergeError, PeftRefError
from peft_ref.graph.checkpoint import INDEX

Tell: TypeAlias = Callable[[Progress], None]
PATIENCE = 20  # seconds until a scheduler that does not answer is none
RETRIES = 3  # of a shard whose worker died or failed: a disk may be full on one machine and not on the next


class Elsewhere(NamedTuple):
    """A folder of the planning machine that stands for an address."""

    here: Path
    address: str
    of_base: bool


@contextlib.contextmanager
def planned_at(
    base: str, adapters: Sequence[tuple[str, float]], planned: Callable[[Path, Sequence[Source]], Plan]
) -> Iterator[tuple[Plan, list[Elsewhere]]]:
    """`planned` of what lies at addresses, or at paths; and the folders that stand for addresses, as long as the plan is used."""
    with tempfile.TemporaryDirectory(prefix="peft-ref-") as temporary:
        here = Path(temporary)
        places = [Elsewhere(here / "base", base, True)]
        places += [Elsewhere(here / f"adapter{n}", address, False) for n, (address, _) in enumerate(adapters)]
        folder, *folders = (_brought(place) for place in places)
        sources = [Source(f, weight) for f, (_, weight) in zip(folders, adapters, strict=True)]
        yield planned(folder, sources), [place for place in places if is_address(place.address)]


def merge_on(
    scheduler: str,
    base: str,
    adapters: Sequence[tuple[str, float]],
    out: str,
    planned: Callable[[Path, Sequence[Source]], Plan],
    *,
    fsync: bool = True,
    overwrite: bool = False,
    tell: Tell = lambda progress: None,
) -> Merged:
    """Write `planned` of these to `out`, with the workers of the Dask scheduler at `scheduler`. Raises what `execute` raises."""
    with planned_at(base, adapters, planned) as (plan, places):
        client = _client(scheduler)
        try:
            crew = _Crew(client, places, fsync)
            if is_address(out):
                return _to_address(plan, out, overwrite, crew, tell)
            return execute(plan, Path(out), fsync=fsync, overwrite=overwrite, tell=tell, run=crew.run)
        finally:
            client.close()


def _brought(place: Elsewhere) -> Path:
    if not is_address(place.address):
        return Path(place.address).resolve()  # the workers see it under this name too: a shared folder
    return (hollow if place.of_base else fetch_folder)(place.address, place.here)


def _client(scheduler: str) -> Any:
    try:
        from distributed import Client
    except ImportError:
        raise ConfigError("--scheduler wants Dask: pip install 'peft-ref[cluster]'.") from None
    try:
        return Client(scheduler, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise ConfigError(f"no Dask scheduler answers at {scheduler} ({error!s:.80}).\n  Start one: dask scheduler, dask worker.") from None


class _Crew:
    """The workers of a cluster, as `execute` sees them."""

    def __init__(self, client: Any, places: Sequence[Elsewhere], fsync: bool) -> None:
        self._client, self._places, self._fsync = client, tuple(places), fsync
        self._name = f"peft-ref-{uuid.uuid4().hex}"  # of this run: its folder on the workers' disks

    def run(self, todo: Todo) -> int:
        """Shards into a folder that all workers see."""
        desk = todo.folder.with_name(f"{todo.folder.name}.work")
        shutil.rmtree(desk, ignore_errors=True)
        desk.mkdir()
        try:
            return self.deal(todo, str(desk), str(todo.folder))
        finally:
            shutil.rmtree(desk, ignore_errors=True)

    def deal(self, todo: Todo, desk: str | None, target: str) -> int:
        """Deals the shards out, and waits for all of them."""
        from distributed import as_completed

        began, written, finished = time.monotonic(), 0, todo.kept
        everything = sum(todo.sizes[shard.name] for shard in todo.shards)
        largest_first = sorted(todo.shards, key=lambda shard: -todo.sizes[shard.name])
        futures = [
            self._client.submit(
                write_shard, shard, todo.sizes[shard.name], target, desk, self._places, self._name, self._fsync, retries=RETRIES, pure=False
            )
            for shard in largest_first
        ]
        try:
            with self._client.as_current():
                done = as_completed(futures)
            for future in done:
                written += future.result()
                finished += 1
                todo.tell(Progress(written, everything, finished, todo.kept + len(todo.shards), time.monotonic() - began))
        except (OSError, PeftRefError):
            raise
        except Exception as error:
            raise MergeError(f"the cluster gave up: {type(error).__name__}: {error!s:.200}\n  Its workers' logs say more.") from error
        finally:
            self._client.cancel(futures)
            if self._places:
                self._client.run(shutil.rmtree, str(Path(tempfile.gettempdir()) / self._name), ignore_errors=True, on_error="ignore")
        return written


def write_shard(shard: Shard, size: int, target: str, desk: str | None, places: Sequence[Elsewhere], run: str, fsync: bool) -> int:
    """On a worker: the shard under a name of its own, then, complete, under its name in `target`. Returns how many bytes that were."""
    fetched = list[Path]()
    if places:
        shard, fetched = _fetched(shard, places, Path(tempfile.gettempdir()) / run)
    own = Path(tempfile.mkdtemp(dir=desk))
    try:
        _written(shard, size, own, fsync)
        if desk is not None:
            (own / shard.name).replace(Path(target) / shard.name)
        else:
            system, path = filesystem(target)
            system.put_file(str(own / shard.name), f"{path}/{shard.name}")
    finally:
        shutil.rmtree(own, ignore_errors=True)
        for file in fetched:  # of the base; the adapters are used again
            file.unlink(missing_ok=True)
    return size


def _written(shard: Shard, size: int, folder: Path, fsync: bool) -> None:
    """The work of `engine` by one thread: a worker of Dask's has as many tasks as it has threads."""
    with one_thread():
        stamps, job, bench = Stamps(shard.sources), Job(shard, size, folder, fsync), Bench()
        try:
            while (task := job.take()) is not None:
                job.do(task, bench)
                job.settled(done=1)
            job.finish()
            stamps.check(stamps.files)
        finally:
            job.close()


def _fetched(shard: Shard, places: Sequence[Elsewhere], scratch: Path) -> tuple[Shard, list[Path]]:
    """The shard with its files on this machine, and those of the base, which nobody else needs."""
    folders, fetched = dict[Path, Path](), list[Path]()
    for n, (here, address, of_base) in enumerate(places):
        folders[here] = there = scratch / (uuid.uuid4().hex if of_base else str(n))
        if of_base:
            fetched += [fetch(address, path.name, there) for path in sorted(shard.sources)]
        else:
            fetch_folder(address, there)
    return moved(shard, folders), fetched


def _to_address(plan: Plan, out: str, overwrite: bool, crew: _Crew, tell: Tell) -> Merged:
    """Shards, then the small files, then the one that makes a checkpoint of them."""
    began = time.monotonic()
    system, path = filesystem(out)
    if system.exists(path) and system.ls(path) and not overwrite:
        raise MergeError(f"{out} is there and not empty.\n  Name another place, or give --overwrite.")
    system.makedirs(path, exist_ok=True)
    sizes = {shard.name: total(shard) for shard in plan.shards}
    if system.exists(f"{path}/{INDEX}"):  # an older one would make it look whole
        system.rm_file(f"{path}/{INDEX}")
    written = crew.deal(Todo(plan.shards, sizes, Path(), 0, tell, lock=-1), None, out)
    last = [p for p in plan.along if p.name == INDEX]
    for along in (*(p for p in plan.along if p.name != INDEX), *last):
        system.put_file(str(along), f"{path}/{along.name}")
    for name, data in sorted(plan.written, key=lambda item: item[0] == INDEX):
        system.pipe_file(f"{path}/{name}", data)
    return Merged(Path(out), written, (), time.monotonic() - began)
