"""What workers that are processes do when something goes wrong. Run by `test_forked`, in a program that may be forked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_ref.checkpoints.engine import execute
from peft_ref.checkpoints.forked import Forked, alone
from peft_ref.checkpoints.job import Job
from peft_ref.checkpoints.plan import Plan
from peft_ref.checkpoints.todo import Progress
from peft_ref.checkpoints.work import Bench
from peft_ref.errors import FileFormatError, MergeError
from tests.checkpoints.engine_made import adapter, beside, bytes_of, planned, small
from tests.checkpoints.test_faults_once import ROOT, one_error

Patch = pytest.MonkeyPatch


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return planned(small(tmp_path / "base", shards=5), [adapter(tmp_path / "adapter")])


def forked_does(patch: Patch, act: Callable[[], object]) -> None:
    """A worker that was forked does this at its first block of rows, and this process works."""
    here, real = os.getpid(), Bench.made
    patch.setattr(Bench, "made", lambda *what: real(*what) if os.getpid() == here else act())
    patch.setattr(Job, "do", _late(Job.do, here))


def _late(do: Any, here: int) -> Any:
    """This process begins when the others have."""

    def late(*what: Any) -> Any:
        if os.getpid() == here:
            time.sleep(0.2)
        return do(*what)

    return late


def test_the_program_may_be_forked_until_it_has_a_thread() -> None:
    assert alone()
    go = threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    assert not alone()
    go.set()
    thread.join()


def test_workers_are_processes_and_write_what_threads_write(tmp_path: Path, plan: Plan, monkeypatch: Patch) -> None:
    runs: list[int] = []
    run = Forked.run
    monkeypatch.setattr(Forked, "run", lambda self: runs.append(run(self)) or runs[-1])
    done = execute(plan, tmp_path / "out", threads=3)
    assert runs == [done.written]
    monkeypatch.setattr("peft_ref.checkpoints.engine.alone", lambda: False)
    again = execute(plan, tmp_path / "again", threads=3)
    assert again.written == done.written
    assert len(runs) == 1
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "again")


@pytest.mark.parametrize("error", [MergeError("it is so\n  and so"), FileFormatError("a file"), OSError(28, "No space left on device")])
def test_an_error_of_a_worker_is_the_runs(tmp_path: Path, plan: Plan, monkeypatch: Patch, error: Exception) -> None:
    def fail() -> None:
        raise error

    forked_does(monkeypatch, fail)
    kind, match = (MergeError, "disk is full") if isinstance(error, OSError) else (type(error), f"^{error}$")
    with one_error(tmp_path, match, kind):
        execute(plan, tmp_path / "out", threads=2)


def test_a_mistake_of_ours_says_where_it_was_made(tmp_path: Path, plan: Plan, monkeypatch: Patch) -> None:
    forked_does(monkeypatch, lambda: 1 // 0)
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*forked_cases.*ZeroDivisionError"):
        execute(plan, tmp_path / "out", threads=2)
    assert not (tmp_path / "out").exists()
    assert not beside(tmp_path / "out")


def test_a_worker_that_the_system_ends_is_one_error(tmp_path: Path, plan: Plan, monkeypatch: Patch) -> None:
    forked_does(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with one_error(tmp_path, r"by signal 9 \(out of memory\?\)"):
        execute(plan, tmp_path / "out", threads=2)


def test_an_interrupt_ends_all_workers(tmp_path: Path, plan: Plan, monkeypatch: Patch) -> None:
    forked_does(monkeypatch, lambda: time.sleep(600))

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with one_error(tmp_path, "^$", KeyboardInterrupt):
        execute(plan, tmp_path / "out", threads=2, tell=interrupt)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_what_is_told_adds_up(tmp_path: Path, plan: Plan) -> None:
    told: list[Progress] = []
    done = execute(plan, tmp_path / "out", threads=2, tell=told.append)
    assert told[-1].written == told[-1].total == done.written == sum(p.stat().st_size for p in (tmp_path / "base").glob("*.safetensors"))
    assert (told[-1].shards, told[-1].of) == (5, 5)


def test_when_the_program_is_killed_its_workers_end_and_the_next_run_succeeds(tmp_path: Path, plan: Plan) -> None:
    slow = (
        "import os, sys, time; from pathlib import Path;"
        "from peft_ref.checkpoints.work import Bench; from tests.checkpoints.killing import run;"
        "Bench.made = lambda *a: os.write(1, b'%d\\n' % os.getpid()) and time.sleep(600);"
        "run(Path(sys.argv[1]), overwrite=False, threads=2)"
    )
    with subprocess.Popen([sys.executable, "-c", slow, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        workers = {int(process.stdout.readline()) for _ in range(2)}
        assert process.pid in workers
        process.kill()
        process.wait()
        execute(plan, tmp_path / "out")
        assert process.stdout.read() == b""  # which the workers held open
    assert not beside(tmp_path / "out")
