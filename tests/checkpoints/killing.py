"""A run of the engine that is killed, for tests/checkpoints/test_faults_killed.py.

    python -m tests.checkpoints.killing FOLDER step N       SIGKILL right before the N-th call that changes the disk
    python -m tests.checkpoints.killing FOLDER processes N S   N runs with two workers, each killed after a random time (seed S)
    python -m tests.checkpoints.killing FOLDER threads N S     the same; what was found is JSON

A program of its own, which forks: a fork is cheap and begins with everything imported, so that a kill hits the work and not the imports.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_ref.checkpoints import engine, output
from peft_ref.checkpoints.plan import Plan
from tests.checkpoints.engine_made import beside, bytes_of, planned

# Every call by which the engine changes the disk; open and mkdir make names, unlink, rmdir and rename move them.
CALLS = ("open", "ftruncate", "pwrite", "copy_file_range", "fsync", "rename", "mkdir", "rmdir", "unlink", "chmod")


def plan_in(folder: Path) -> Plan:
    return planned(folder / "base", [folder / "adapter"])


def run(folder: Path, *, overwrite: bool, exchange: bool = True, threads: int = 1) -> None:
    if not exchange:
        output.exchange = lambda one, other: False
    engine.execute(plan_in(folder), folder / "out", overwrite=overwrite, threads=threads)


def child(work: Callable[[], None]) -> int:
    """A fork that does it; 0 when it came to its end."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return process


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Whether the `step`-th call came; then the run ended right before it."""

    def armed() -> None:
        left = step

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def counting(*arguments: Any, **more: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **more)

            return counting

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        exchange = output.exchange
        output.exchange = counted(exchange)
        work()

    return ended(child(armed)) == -signal.SIGKILL


def state(folder: Path, old: dict[str, bytes] | None, new: dict[str, bytes]) -> str:
    """Which of the two is there; `aside` is the moment between two renames, where the old one waits under another name."""
    out, aside = folder / "out", folder / ".out.merge.old"
    if not out.exists():
        if old is None:
            return "old"
        return "aside" if aside.exists() and bytes_of(aside) == old else "lost"
    found = bytes_of(out)
    return "old" if found == old else "new" if found == new else "mixture"


def set_back(folder: Path) -> dict[str, bytes] | None:
    """OUT as it was before: what `before` holds, or nothing."""
    for path in [folder / "out", *(folder / name for name in beside(folder / "out"))]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if not (folder / "before").exists():
        return None
    shutil.copytree(folder / "before", folder / "out")
    return bytes_of(folder / "before")


def every_step(folder: Path, new: dict[str, bytes], *, exchange: bool, stride: int = 1) -> dict[str, int]:
    """A kill before every call, each followed by a run that is not killed. How often each state was found."""
    found: dict[str, int] = {}
    step = 1
    while True:
        old = set_back(folder)

        def work(overwrite: bool = old is not None) -> None:
            run(folder, overwrite=overwrite, exchange=exchange)

        if not killed_at(step, work):
            return found
        _count(found, state(folder, old, new))
        again = ended(child(work))
        _count(found, "" if again == 0 and state(folder, old, new) == "new" and not beside(folder / "out") else "not repaired")
        step += stride


def moments(folder: Path, new: dict[str, bytes], number: int, seed: int) -> dict[str, int]:
    """Kills at random times of a run with two workers, from its start to a little after its usual end."""
    chance, found = random.Random(seed), dict[str, int]()
    overwrite = (folder / "before").exists()

    def work() -> None:
        run(folder, overwrite=overwrite, threads=2)

    times = []
    for _ in range(5):
        set_back(folder)
        began = time.perf_counter()
        assert ended(child(work)) == 0
        times.append(time.perf_counter() - began)
    for _ in range(number):
        old = set_back(folder)
        process = child(work)
        time.sleep(chance.uniform(0, 1.2 * sorted(times)[2]))
        os.kill(process, signal.SIGKILL)
        _count(found, "ended" if ended(process) == 0 else "killed")
        _count(found, state(folder, old, new))
        if old is None and state(folder, old, new) == "new" and not beside(folder / "out"):
            continue  # it was over: a run without --overwrite has nothing to do but to say so
        again = ended(child(work))
        _count(found, "" if again == 0 and state(folder, old, new) == "new" and not beside(folder / "out") else "not repaired")
    return found


def _count(found: dict[str, int], what: str) -> None:
    if what:
        found[what] = found.get(what, 0) + 1


def main(folder: Path, how: str, *numbers: str) -> None:
    set_back(folder)
    run(folder, overwrite=(folder / "before").exists())
    new = bytes_of(folder / "out")
    if how in ("threads", "processes"):
        engine.alone = lambda: how == "processes"
        print(json.dumps(moments(folder, new, int(numbers[0]), int(numbers[1]))))
    else:
        print(json.dumps(every_step(folder, new, exchange=how == "exchange")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
