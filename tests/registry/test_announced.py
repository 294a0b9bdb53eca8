"""`announced` gives what importlib.metadata gives, and does not load it where no package announces anything."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from peft_ref.registry.announced import announced

TEXT = "[one.group]\nname = module:thing\n"


@pytest.mark.parametrize("group", ["console_scripts", "pytest11", "peft_ref.backends", "peft_ref.nothing"])
def test_the_answer_is_importlibs(group: str) -> None:
    assert set(announced(group)) == set(entry_points(group=group))


@pytest.mark.parametrize("where", ["own-1.0.dist-info", "own.egg-info", "own.egg/EGG-INFO"])
@pytest.mark.parametrize("zipped", [False, True])
def test_every_way_to_install_a_package_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, zipped: bool) -> None:
    files = {f"{where}/entry_points.txt": TEXT, f"{where}/METADATA": "Name: own\nVersion: 1.0\n", f"{where}/PKG-INFO": "Name: own\n"}
    root = tmp_path / ("own.egg" if zipped and "egg/" in where else "folder.zip" if zipped else "folder")
    if zipped:
        with zipfile.ZipFile(root, "w") as archive:
            for name, text in files.items():
                archive.writestr(name.removeprefix("own.egg/"), text)
    else:
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
    monkeypatch.setattr(sys, "path", [*sys.path, str(root / "own.egg" if "egg/" in where and not zipped else root)])
    assert [point.value for point in announced("one.group")] == ["module:thing"]


def test_nothing_is_loaded_to_hear_of_nothing() -> None:
    program = "import sys; from peft_ref.methods import METHODS; print(METHODS.discover(), 'importlib.metadata' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["()", "False"]
