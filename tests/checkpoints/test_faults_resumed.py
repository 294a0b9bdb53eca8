"""A run after one that was killed: it keeps what was finished where plan and sources are the same, and starts anew where they are not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_ref.checkpoints.engine import execute
from peft_ref.checkpoints.output import Output
from peft_ref.checkpoints.plan import Plan
from peft_ref.errors import MergeError
from tests.checkpoints.engine_made import adapter, beside, bytes_of, planned, small

Patch = pytest.MonkeyPatch
ROOT = Path(__file__).resolve().parents[2]
# Killed when two of the three shards have their names: by its own hand, at the start of the third rename.
KILLED = """
import os, signal, sys
from pathlib import Path
from peft_ref.checkpoints.engine import execute
from tests.checkpoints.killing import plan_in
renamed, real = [], os.rename
def rename(a, b):
    renamed.append(b)
    if len(renamed) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(a, b)
os.rename = rename
execute(plan_in(Path(sys.argv[1])), Path(sys.argv[1]) / "out", threads=1, fsync=sys.argv[3] == "True")
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return planned(small(tmp_path / "base"), [adapter(tmp_path / "adapter")])


def kill(folder: Path, at: int = 3, fsync: bool = True) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(at), str(fsync)], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert beside(folder / "out") == {".out.merge", ".out.merge.lock"}


@pytest.mark.parametrize("fsync", [True, False])
def test_finished_shards_are_kept_and_the_bytes_are_the_same(tmp_path: Path, plan: Plan, fsync: bool) -> None:
    kill(tmp_path, fsync=fsync)
    half = tmp_path / ".out.merge"
    assert {path.name for path in half.iterdir()} == {"model-1.safetensors", "model-2.safetensors", "model-3.safetensors.part"}
    first = (half / "model-1.safetensors").stat().st_ino
    done = execute(plan, tmp_path / "out", fsync=fsync)
    assert done.kept == ("model-1.safetensors", "model-2.safetensors")
    assert done.written == (tmp_path / "base" / "model-3.safetensors").stat().st_size
    assert (tmp_path / "out" / "model-1.safetensors").stat().st_ino == first
    assert not beside(tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(execute(plan, tmp_path / "again").out)


def touched(folder: Path) -> None:
    os.utime(folder / "base" / "model-1.safetensors", ns=(1, 1))


CHANGED: dict[str, Callable[[Path], object]] = {
    "the adapter": lambda folder: adapter(folder / "adapter", 4.0),
    "a source's time": touched,
    "the folder": lambda folder: (folder / ".out.merge").rename(folder / "moved") and None,
    "the paper": lambda folder: (folder / ".out.merge.lock").write_text('{"fingerprint": '),
    "a paper of another kind": lambda folder: (folder / ".out.merge.lock").write_text("[]"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_nothing_is_kept_when_something_changed(tmp_path: Path, plan: Plan, what: str) -> None:
    kill(tmp_path)
    time.sleep(0.02)
    CHANGED[what](tmp_path)
    done = execute(plan, tmp_path / "out")
    assert done.kept == ()
    assert bytes_of(tmp_path / "out") == bytes_of(execute(plan, tmp_path / "again").out)
    assert not beside(tmp_path / "out")


def test_nothing_is_kept_by_another_plan_or_without_the_sync_that_was_asked_for(tmp_path: Path, plan: Plan) -> None:
    kill(tmp_path, fsync=False)
    assert execute(plan, tmp_path / "out").kept == ()
    kill_again = tmp_path / "second"
    kill_again.mkdir()
    small(kill_again / "base")
    adapter(kill_again / "adapter")
    kill(kill_again)
    other = planned(kill_again / "base", [kill_again / "adapter"], whole=True)  # one flag of its changes is another
    assert execute(other, kill_again / "out").kept == ()
    assert bytes_of(kill_again / "out") == bytes_of(execute(other, kill_again / "fresh").out)


def test_what_was_not_synced_is_not_kept_once_the_machine_restarted(tmp_path: Path, plan: Plan, monkeypatch: Patch) -> None:
    kill(tmp_path, fsync=False)
    monkeypatch.setattr("peft_ref.checkpoints.output._boot", lambda: "another")
    assert execute(plan, tmp_path / "out", fsync=False).kept == ()


def test_a_finished_shard_of_another_size_is_written_again(tmp_path: Path, plan: Plan) -> None:
    kill(tmp_path)
    os.truncate(tmp_path / ".out.merge" / "model-1.safetensors", 100)
    (tmp_path / ".out.merge" / "stranger.txt").write_text("not ours")
    assert execute(plan, tmp_path / "out").kept == ("model-2.safetensors",)
    assert bytes_of(tmp_path / "out") == bytes_of(execute(plan, tmp_path / "again").out)


def test_a_run_killed_after_its_last_rename_is_found_complete(tmp_path: Path, plan: Plan) -> None:
    done = execute(plan, tmp_path / "out")
    kill_last = "from tests.checkpoints import killing; import os; real = os.unlink; os.unlink = lambda *a, **k: os._exit(9);"
    (tmp_path / "b").mkdir()
    small(tmp_path / "b" / "base")
    adapter(tmp_path / "b" / "adapter")
    program = f"{kill_last} from pathlib import Path; killing.run(Path({str(tmp_path / 'b')!r}), overwrite=False)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 9
    assert beside(tmp_path / "b" / "out") == {".out.merge.lock"}
    again = execute(planned(tmp_path / "b" / "base", [tmp_path / "b" / "adapter"]), tmp_path / "b" / "out")
    assert (again.written, len(again.kept)) == (0, 3)
    assert not beside(tmp_path / "b" / "out")
    with pytest.raises(MergeError, match="is there already"):
        execute(plan, done.out)


def test_an_old_output_that_waits_aside_is_put_back_whatever_comes_next(tmp_path: Path, plan: Plan) -> None:
    old = bytes_of(small(tmp_path / ".out.merge.old", shards=1))
    adapter(tmp_path / "adapter", float("nan"))
    with pytest.raises(MergeError, match="NaN"):
        execute(plan, tmp_path / "out", overwrite=True)
    assert bytes_of(tmp_path / "out") == old
    assert not beside(tmp_path / "out")


def test_a_lock_whose_file_was_taken_away_is_no_lock(tmp_path: Path, plan: Plan, monkeypatch: Patch) -> None:
    """Between opening it and holding it the first run may end, and take it away: a third one would then lock another file."""
    import fcntl

    lock, taken = tmp_path / ".out.merge.lock", []
    real = fcntl.flock

    def late(handle: int, how: int) -> None:
        if not taken:
            taken.append(lock.unlink())
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with Output(tmp_path / "out", fingerprint="any") as output:
        assert taken
        assert lock.exists()
        output.publish()
    assert not beside(tmp_path / "out")


def test_a_second_run_to_the_same_output_says_so(tmp_path: Path, plan: Plan) -> None:
    slow = (
        "import sys; from pathlib import Path; from peft_ref.checkpoints.work import Bench; from tests.checkpoints.killing import run;"
        "made = Bench.made; Bench.made = lambda *a: print('begun', flush=True) or sys.stdin.read() or made(*a);"
        "run(Path(sys.argv[1]), overwrite=False)"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", slow, str(tmp_path)], cwd=ROOT, stdin=pipe, stdout=pipe) as first:
        assert first.stdin is not None
        assert first.stdout is not None
        assert first.stdout.readline() == b"begun\n"
        with pytest.raises(MergeError, match=f"being written by another run, process {first.pid}"):
            execute(plan, tmp_path / "out", overwrite=True)
        first.stdin.close()
        assert first.wait() == 0
    assert bytes_of(tmp_path / "out") == bytes_of(execute(plan, tmp_path / "again").out)
    assert not beside(tmp_path / "out")
