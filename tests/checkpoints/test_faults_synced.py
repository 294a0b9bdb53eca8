"""A power failure: what has a name was on the disk before it got it, so that no name ever stands for bytes that are lost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from peft_ref.checkpoints import output
from peft_ref.checkpoints.engine import execute
from tests.checkpoints.engine_made import adapter, planned, small

Files = dict[int, list[str]]


def followed(monkeypatch: pytest.MonkeyPatch, out: Path) -> tuple[Files, list[str]]:
    """What is done to every inode, and what was not on the disk when it got its name."""
    done: Files = {}
    early: list[str] = []

    def follow(name: str, of: int) -> None:
        real = getattr(os, name)

        def following(*arguments: Any) -> Any:
            result = real(*arguments)
            done.setdefault(os.fstat(arguments[of]).st_ino, []).append(name)
            return result

        monkeypatch.setattr(os, name, following)

    def naming(source: Path, target: Path) -> None:
        inside = [source, *source.iterdir()] if source.is_dir() else [source]
        early.extend(path.name for path in inside if done.get(path.stat().st_ino, ["nothing"])[-1] != "fsync")
        if source.is_dir() and os.fspath(target) == os.fspath(out):
            done[-1] = done.pop(out.parent.stat().st_ino, [])  # what came before it does not count

    for name, of in (("pwrite", 0), ("copy_file_range", 1), ("fsync", 0)):
        follow(name, of)
    rename, exchange = os.rename, output.exchange
    monkeypatch.setattr(os, "rename", lambda source, target: (naming(Path(source), Path(target)), rename(source, target))[1])
    monkeypatch.setattr(output, "exchange", lambda one, other: (naming(one, other), exchange(one, other))[1])
    return done, early


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize("before", [False, True])
def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    plan, out = planned(small(tmp_path / "base"), [adapter(tmp_path / "adapter")]), tmp_path / "out"
    if before:
        small(out, shards=1)
    done, early = followed(monkeypatch, out)
    execute(plan, out, overwrite=before)
    assert early == []
    assert done[tmp_path.stat().st_ino] == ["fsync"]  # the folder in which OUT got its name, after it did


def test_without_it_nothing_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, out = planned(small(tmp_path / "base"), [adapter(tmp_path / "adapter")]), tmp_path / "out"
    done, early = followed(monkeypatch, out)
    execute(plan, out, fsync=False)
    assert "fsync" not in {call for calls in done.values() for call in calls}
    assert early
