"""SIGKILL before every call that changes the disk, and at random moments: the old state or the new one, and the next run succeeds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.checkpoints.engine_made import adapter, small

ROOT = Path(__file__).resolve().parents[2]


def killed(folder: Path, *how: str, before: bool, shards: int = 2, rows: int = 8, columns: int = 16) -> Counter[str]:
    """What `killing` found. `before`: OUT is there, a checkpoint with the same names and sizes and other numbers."""
    small(folder / "base", shards, rows, columns)
    adapter(folder / "adapter")
    if before:
        old = small(folder / "before", shards, rows, columns)
        for path in old.glob("*.safetensors"):
            data = path.read_bytes()
            path.write_bytes(data[:-2] + b"\x01\x01")
    program = [sys.executable, "-m", "tests.checkpoints.killing", str(folder), *how]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Counter(json.loads(done.stdout))  # of few kills all may find the same state


def test_a_kill_before_any_call_leaves_nothing_or_all_of_a_new_output(tmp_path: Path) -> None:
    found = killed(tmp_path, "exchange", before=False)
    assert found.keys() == {"old", "new"}
    assert found["old"] > 20


def test_a_kill_before_any_call_leaves_the_old_or_all_of_the_new_output(tmp_path: Path) -> None:
    found = killed(tmp_path, "exchange", before=True)
    assert found.keys() == {"old", "new"}
    assert found["old"] > 20
    assert found["new"] > 2


def test_without_exchange_the_old_output_waits_aside_for_one_moment(tmp_path: Path) -> None:
    found = killed(tmp_path, "two-step", before=True)
    assert found.keys() == {"old", "new", "aside"}
    assert found["aside"] == 1


@pytest.mark.parametrize("workers", ["threads", "processes"])
@pytest.mark.parametrize("before", [False, True])
def test_a_kill_at_a_random_moment_leaves_the_old_or_the_new_state(tmp_path: Path, before: bool, workers: str) -> None:
    found = killed(tmp_path, workers, "12", "1", before=before, shards=4, rows=60, columns=3000)
    assert found.keys() <= {"old", "new", "killed", "ended"}
    assert found["old"] + found["new"] == 12


@pytest.mark.sweep
@pytest.mark.parametrize("workers", ["threads", "processes"])
@pytest.mark.parametrize("before", [False, True])
def test_two_hundred_kills(tmp_path: Path, before: bool, workers: str) -> None:
    found = killed(tmp_path, workers, "200", "2", before=before, shards=6, rows=60, columns=20000)
    print(found)
    assert found.keys() <= {"old", "new", "killed", "ended"}
    assert found["old"] + found["new"] == 200
    assert found["killed"] > 100
