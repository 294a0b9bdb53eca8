"""A save that stops anywhere, by an error or a kill, leaves the old adapter or the new one."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.errors import FileFormatError
from peft_ref.files import adapter as adapters
from peft_ref.files.adapter import CONFIG, FILES, WEIGHTS, AdapterFile, AdapterModule, load_adapter, save_adapter
from peft_ref.files.atomic import finish
from peft_ref.files.config import from_dict
from peft_ref.layers import Linear
from peft_ref.methods.lora import LoRA, Params

CALLS = ("open", "write", "fsync", "close", "replace", "unlink", "chmod", "mkdir")


def numbered(n: int) -> AdapterFile:
    """An adapter whose configuration and tensors both carry the number n."""
    config = from_dict({"peft_type": "LORA", "r": 2, "lora_alpha": n, "target_modules": ["q"]})
    params = Params(A=np.full((2, 50), n, np.float32), B=np.full((7, 2), n, np.float32))
    layer = Linear(in_features=50, out_features=7)
    return AdapterFile(config=config, modules={"q": AdapterModule(config.method, layer, params)})


def number(folder: Path) -> int:
    """The number of the adapter in a folder; its two files must agree."""
    adapter = load_adapter(folder)
    method, _, params = adapter.modules["q"]
    assert isinstance(method, LoRA)
    values = {method.lora_alpha, *params.A.ravel().tolist(), *params.B.ravel().tolist()}
    assert len(values) == 1, f"a mixture of two saves: {values}"
    return int(values.pop())


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Let the k-th of the calls that change files do something else; lists the calls that were made."""

    def arm(k: int, act: Callable[[], Any], and_all_later: bool = False) -> list[str]:
        made: list[str] = []
        for name in CALLS:
            original = getattr(os, name)

            def call(*args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Any:
                made.append(_name)
                if len(made) == k or (and_all_later and len(made) > k):
                    if _name == "write":  # a part of it arrives
                        _original(args[0], args[1][: len(args[1]) // 2])
                    if _name == "close":
                        _original(*args)
                    act()
                return _original(*args, **kwargs)

            monkeypatch.setattr(os, name, call)
        return made

    return arm


def fail() -> None:
    raise OSError(28, "No space left on device")


def steps(folder: Path, stop: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> int:
    made = stop(0, fail)
    save_adapter(folder, numbered(2))
    monkeypatch.undo()
    return len(made)


def test_a_save_makes_the_calls_that_are_injected_into(tmp_path: Path, stop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(tmp_path / "a", numbered(1))
    made = stop(0, fail)
    save_adapter(tmp_path / "a", numbered(2))
    assert {"open", "write", "fsync", "close", "replace"} <= set(made)
    assert made.count("replace") == 4
    assert made.count("fsync") >= 6  # two files, and the folder after each rename


@pytest.mark.parametrize("gone", [False, True], ids=["one call fails", "every later call fails too"])
def test_a_save_that_fails_at_any_call_leaves_the_old_or_the_new(tmp_path: Path, stop: Any, monkeypatch: Any, gone: bool) -> None:
    save_adapter(tmp_path / "count", numbered(1))
    seen = set()
    for k in range(1, steps(tmp_path / "count", stop, monkeypatch) + 1):
        folder = tmp_path / f"{k}"
        save_adapter(folder, numbered(1))
        stop(k, fail, gone)
        with pytest.raises(OSError, match="No space left"):
            save_adapter(folder, numbered(2))
        monkeypatch.undo()
        seen.add(number(folder))
        save_adapter(folder, numbered(3))  # and the folder can be saved into again
        assert number(folder) == 3
    assert seen == {1, 2}


def test_a_failed_save_leaves_no_litter(tmp_path: Path, stop: Any, monkeypatch: Any) -> None:
    save_adapter(tmp_path / "count", numbered(1))
    made = stop(0, fail)
    save_adapter(tmp_path / "count", numbered(2))
    decided = [i for i, name in enumerate(made, 1) if name == "replace"][1]
    monkeypatch.undo()
    for k in range(1, decided + 1):
        folder = tmp_path / f"{k}"
        save_adapter(folder, numbered(1))
        stop(k, fail)
        with pytest.raises(OSError, match="No space left"):
            save_adapter(folder, numbered(2))
        monkeypatch.undo()
        assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
        assert number(folder) == 1


def test_a_first_save_that_fails_at_any_call_leaves_no_folder_or_a_whole_one(tmp_path: Path, stop: Any, monkeypatch: Any) -> None:
    count = steps(tmp_path / "count", stop, monkeypatch)
    for k in range(1, count + 1):
        folder = tmp_path / f"{k}" / "a"
        folder.parent.mkdir()
        stop(k, fail)
        with contextlib.suppress(OSError):  # the first call asks for the parent, which is there: its error is none
            save_adapter(folder, numbered(2))
        monkeypatch.undo()
        assert sorted(p.name for p in folder.parent.iterdir()) in ([], ["a"])
        assert not folder.exists() or number(folder) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("first", [True, False], ids=["a new folder", "over an old one"])
def test_a_save_killed_at_any_call_leaves_the_old_or_the_new(tmp_path: Path, stop: Any, monkeypatch: Any, first: bool) -> None:
    if not first:
        save_adapter(tmp_path / "count", numbered(1))
    count = steps(tmp_path / "count", stop, monkeypatch)
    seen: set[int | None] = set()
    for k in range(1, count + 1):
        folder = tmp_path / f"{k}"
        if not first:
            save_adapter(folder, numbered(1))
        if (child := os.fork()) == 0:
            try:
                stop(k, lambda: os.kill(os.getpid(), signal.SIGKILL))
                save_adapter(folder, numbered(2))
            finally:
                os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        seen.add(number(folder) if folder.exists() else None)
        save_adapter(folder, numbered(3))
        assert number(folder) == 3
    assert seen == ({None, 2} if first else {1, 2})


def test_a_save_killed_between_the_renames_is_finished_by_finish(tmp_path: Path, stop: Any, monkeypatch: Any) -> None:
    folder = tmp_path / "a"
    save_adapter(folder, numbered(1))
    made = stop(0, fail)
    save_adapter(folder, numbered(1))
    last = [i for i, name in enumerate(made, 1) if name == "replace"][-1]
    monkeypatch.undo()
    stop(last, fail, True)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(folder, numbered(2))
    monkeypatch.undo()
    assert b'"lora_alpha": 1' in (folder / CONFIG).read_bytes()  # PEFT would still see the old configuration
    assert number(folder) == 2
    finish(folder, FILES)
    assert b'"lora_alpha": 2' in (folder / CONFIG).read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)


def test_a_save_that_was_not_decided_is_thrown_away_by_finish(tmp_path: Path, stop: Any, monkeypatch: Any) -> None:
    folder = tmp_path / "a"
    save_adapter(folder, numbered(1))
    made = stop(0, fail)
    save_adapter(folder, numbered(1))
    decision = [i for i, name in enumerate(made, 1) if name == "replace"][1]
    monkeypatch.undo()
    stop(decision, fail, True)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(folder, numbered(2))
    monkeypatch.undo()
    assert number(folder) == 1
    finish(folder, FILES)
    assert number(folder) == 1


def test_nothing_is_written_when_the_adapter_cannot_be_serialised(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", numbered(1))
    bad = numbered(2)
    params = Params(A=np.zeros((2, 50), np.complex128), B=np.zeros((7, 2)))
    bad = AdapterFile(config=bad.config, modules={"q": bad.modules["q"]._replace(params=params)})
    for folder in (tmp_path / "a", tmp_path / "new"):
        with pytest.raises(FileFormatError):
            save_adapter(folder, bad)
    assert number(tmp_path / "a") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_other_files_of_the_folder_and_its_permissions_stay(tmp_path: Path) -> None:
    save_adapter(tmp_path, numbered(1))
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / WEIGHTS).chmod(0o640)
    save_adapter(tmp_path, numbered(2))
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / WEIGHTS).stat().st_mode & 0o777 == 0o640
    assert adapters.adapter_names(tmp_path) == ("default",)
