"""Faults: each is one error that says what is wrong, OUT is as it was, and nothing lies beside it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.checkpoints import output
from peft_ref.checkpoints.engine import execute
from peft_ref.checkpoints.plan import Plan
from peft_ref.checkpoints.work import Bench
from peft_ref.errors import FileFormatError, MergeError, PeftRefError
from tests.checkpoints.engine_made import adapter, beside, bytes_of, checkpoint, numbers, planned, small

ROOT = Path(__file__).resolve().parents[2]
Patch = pytest.MonkeyPatch


@pytest.fixture(params=["no output before", "an output before"])
def before(request: pytest.FixtureRequest, tmp_path: Path) -> bool:
    if there := request.param == "an output before":
        small(tmp_path / "out", shards=2, rows=9)
    return there


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return planned(small(tmp_path / "base"), [adapter(tmp_path / "adapter")])


@contextmanager
def one_error(folder: Path, match: str, kind: type[BaseException] = MergeError) -> Iterator[None]:
    """The block raises it and leaves `folder / "out"` and what is beside it as they were."""
    out = folder / "out"
    was = bytes_of(out) if out.exists() else None
    with pytest.raises(kind, match=match) as caught:
        yield
    assert (bytes_of(out) if out.exists() else None) == was
    assert not beside(out)
    assert len(str(caught.value).splitlines()) <= 4


def on_call(patch: Patch, name: str, at: int, act: Callable[[], None]) -> None:
    """Acts before the `at`-th call of os.`name`."""
    call, left = getattr(os, name), at

    def counting(*arguments: Any, **more: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            act()
        return call(*arguments, **more)

    patch.setattr(os, name, counting)


def failing(code: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(("code", "match"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota"), (errno.EIO, "Input/output error")])
@pytest.mark.parametrize(
    ("call", "at"), [("pwrite", 1), ("pwrite", 3), ("copy_file_range", 2), ("fsync", 2), ("ftruncate", 3), ("rename", 1)]
)
@pytest.mark.usefixtures("in_threads")
def test_a_disk_that_fails(tmp_path: Path, monkeypatch: Patch, before: bool, plan: Plan, code: int, match: str, call: str, at: int) -> None:
    on_call(monkeypatch, call, at, failing(code))
    with one_error(tmp_path, match):
        execute(plan, tmp_path / "out", overwrite=before, threads=2)


def test_a_real_limit_of_file_size_is_a_full_disk(tmp_path: Path, plan: Plan) -> None:
    program = (
        "import resource, signal, sys; from pathlib import Path; from tests.checkpoints.killing import run;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000));"
        "run(Path(sys.argv[1]), overwrite=False)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "MergeError" in done.stderr
    assert "no file may be that large" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not beside(tmp_path / "out")


def test_too_little_room_is_seen_before_a_byte_is_written(tmp_path: Path, monkeypatch: Patch, before: bool, plan: Plan) -> None:
    needed = sum(path.stat().st_size for path in (tmp_path / "base").iterdir()) + len(plan.written[0][1])

    class Disk:
        f_frsize, f_bavail = 1, needed - 1

    monkeypatch.setattr(os, "statvfs", lambda path: Disk())
    with one_error(tmp_path, "are free beside it"):
        execute(plan, tmp_path / "out", overwrite=before)
    Disk.f_bavail = needed
    execute(plan, tmp_path / "out", overwrite=before)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with one_error(tmp_path, "Permission denied"):
        execute(plan, tmp_path / "locked" / "out")


@pytest.mark.parametrize("call", ["open", "mkdir"])
def test_a_folder_that_the_system_refuses(tmp_path: Path, monkeypatch: Patch, plan: Plan, call: str) -> None:
    real = getattr(os, call)

    def refuses(path: Any, *arguments: Any, **more: Any) -> Any:
        if ".out.merge" in os.fspath(path):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, call, refuses)
    with one_error(tmp_path, r"\.out\.merge.*Permission denied"):
        execute(plan, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_a_shard_that_was_cut_off(tmp_path: Path, before: bool, plan: Plan) -> None:
    path = plan.shards[1].tensors[1].path
    os.truncate(path, path.stat().st_size - 400)
    with one_error(tmp_path, "model-2.safetensors was cut off"):
        execute(plan, tmp_path / "out", overwrite=before)


def test_a_touched_tensor_that_was_cut_off(tmp_path: Path, plan: Plan) -> None:
    touched = plan.shards[0].tensors[1]
    assert touched.changes
    os.truncate(touched.path, touched.end - 10)
    with one_error(tmp_path, "model-1.safetensors was cut off"):
        execute(plan, tmp_path / "out")


@pytest.mark.parametrize("which", ["base/model-3.safetensors", "base/config.json", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("same_size", [True, False])
def test_a_source_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: Patch, before: bool, plan: Plan, which: str, same_size: bool
) -> None:
    path = tmp_path / which

    def change() -> None:
        data = bytearray(path.read_bytes())
        time.sleep(0.02)  # the clock of some file systems is coarse
        path.write_bytes(data if same_size else data + b" ")

    on_call(monkeypatch, "copy_file_range", 5, change)
    with one_error(tmp_path, f"{path.name} changed while it was read"):
        execute(plan, tmp_path / "out", overwrite=before, threads=1)


def test_a_source_that_goes_away(tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "base" / "model-2.safetensors").unlink()
    with one_error(tmp_path, "model-2.safetensors: No such file"):
        execute(plan, tmp_path / "out")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_adapter_that_makes_no_numbers_is_named(tmp_path: Path, before: bool, plan: Plan, value: float) -> None:
    adapter(tmp_path / "adapter", value)
    with one_error(tmp_path, r"adapter: tensor '.\.touched', rows 0 to .* NaN"):
        execute(plan, tmp_path / "out", overwrite=before)


def test_a_base_that_holds_no_numbers_is_named(tmp_path: Path) -> None:
    values = numbers(5, 5)
    values[2, 3] = np.nan
    base = checkpoint(tmp_path / "base", [{"touched": values}])
    with one_error(tmp_path, "the base itself holds"):
        execute(planned(base, [adapter(tmp_path / "adapter")]), tmp_path / "out")


def test_a_number_too_large_for_another_dtype(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", [{"w": np.full((3, 3), 1e6, np.float32)}])
    with one_error(tmp_path, "too large for F16"):
        execute(planned(base, dtype="F16"), tmp_path / "out")


def test_an_untouched_nan_is_copied(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", [{"w": np.full((3, 3), np.nan, np.float32)}])
    execute(planned(base), tmp_path / "out")
    assert (tmp_path / "out" / "model-1.safetensors").read_bytes() == (base / "model-1.safetensors").read_bytes()


def test_an_adapter_that_cannot_be_read(tmp_path: Path, before: bool, plan: Plan) -> None:
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"none")
    with one_error(tmp_path, "adapter_model.safetensors", FileFormatError):
        execute(plan, tmp_path / "out", overwrite=before)


def test_an_interrupt_cleans_up(tmp_path: Path, monkeypatch: Patch, before: bool, plan: Plan) -> None:
    def interrupt(progress: Any) -> None:
        raise KeyboardInterrupt

    slow = Bench.made
    monkeypatch.setattr(Bench, "made", lambda *arguments: time.sleep(0.3) or slow(*arguments))
    with one_error(tmp_path, "^$", KeyboardInterrupt):
        execute(plan, tmp_path / "out", overwrite=before, tell=interrupt)
    assert not [thread for thread in threading.enumerate() if "_work" in thread.name]


def test_an_output_that_is_there_is_left_alone(tmp_path: Path, plan: Plan) -> None:
    small(tmp_path / "out", shards=1)
    with one_error(tmp_path, "is there already"):
        execute(plan, tmp_path / "out")
    (tmp_path / "file").write_text("text")
    with pytest.raises(MergeError, match="is there already"):
        execute(plan, tmp_path / "file")
    with pytest.raises(MergeError, match="no checkpoint"):
        execute(plan, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "text"


def test_an_empty_folder_may_be_the_output(tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "out").mkdir()
    execute(plan, tmp_path / "out")
    assert len(bytes_of(tmp_path / "out")) == 5


def test_only_a_checkpoint_is_replaced(tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with one_error(tmp_path, "no checkpoint"):
        execute(plan, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("out", ["base", "adapter", ".", "link"])
def test_what_is_read_is_not_replaced(tmp_path: Path, plan: Plan, out: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "base")
    (tmp_path / "any.safetensors").touch()
    was = bytes_of(tmp_path / "base"), bytes_of(tmp_path / "adapter")
    with pytest.raises(MergeError, match="which it is made of"):
        execute(plan, tmp_path / out, overwrite=True)
    assert was == (bytes_of(tmp_path / "base"), bytes_of(tmp_path / "adapter"))


@pytest.mark.parametrize("exchanges", [True, False])
def test_overwriting_leaves_nothing_of_the_old(tmp_path: Path, monkeypatch: Patch, plan: Plan, exchanges: bool) -> None:
    if not exchanges:
        monkeypatch.setattr(output, "exchange", lambda one, other: False)
    small(tmp_path / "old", shards=5)
    (tmp_path / "old").chmod(0o750)
    (tmp_path / "out").symlink_to("old")
    execute(plan, tmp_path / "out", overwrite=True)
    execute(plan, tmp_path / "new")
    assert bytes_of(tmp_path / "old") == bytes_of(tmp_path / "new")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o750
    assert not beside(tmp_path / "old")


@pytest.mark.usefixtures("in_threads")
def test_a_second_rename_that_fails_puts_the_old_output_back(tmp_path: Path, monkeypatch: Patch, plan: Plan) -> None:
    monkeypatch.setattr(output, "exchange", lambda one, other: False)
    small(tmp_path / "out", shards=1)
    on_call(monkeypatch, "rename", len(plan.shards) + 2, failing(errno.EIO))
    with one_error(tmp_path, "Input/output error"):
        execute(plan, tmp_path / "out", overwrite=True)


def test_every_message_is_an_error_of_the_package() -> None:
    assert issubclass(MergeError, PeftRefError)
