"""The tutorial of backends/README.md, done to the letter: its file written, its command run, its registration found, its output printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "backends" / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with tiny_backend.py as the README prints it, installed as far as `importlib.metadata` can tell."""
    (tmp_path / "tiny_backend.py").write_text(blocks("python")[0])
    points = tomllib.loads(blocks("toml")[0])["project"]["entry-points"]
    info = tmp_path / "tiny_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-backend\nVersion: 1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in table.items()) for group, table in points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return tmp_path


def run(package: Path, *command: str) -> str:
    path = os.pathsep.join(map(str, (package, ROOT, ROOT / "backends", *filter(None, [os.environ.get("PYTHONPATH")]))))
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readmes_command_runs_the_laws_on_the_readmes_backend(package: Path) -> None:
    python, *arguments = blocks("sh")[0].split()
    assert python == "python"
    out = run(package, sys.executable, *arguments, "-p", "no:cacheprovider")
    summary = out.strip().splitlines()[-1]
    assert re.fullmatch(r"\d+ passed in .*", summary), summary
    assert int(summary.split()[0]) >= 50


def test_the_readmes_backend_is_found_under_its_registered_name(package: Path) -> None:
    found = run(package, sys.executable, "-c", "from peft_ref.backend import get_backend; print(get_backend('tiny'))")
    assert found.startswith("<backend tiny: numpy ")


def test_the_readmes_example_prints_what_the_readme_says(package: Path) -> None:
    (package / "example.py").write_text(blocks("python")[1])
    printed = run(package, sys.executable, str(package / "example.py")).strip()
    assert f"This prints `{printed}`" in README


def test_the_readme_names_every_hook_and_every_backend() -> None:
    from peft_ref.backend import Backend

    hooks = [name for name, value in vars(Backend).items() if not name.startswith("_") and not hasattr(value, "__final__")]
    optional = {
        name for name in hooks if not isinstance(value := vars(Backend)[name], property) or not getattr(value.fget, "__final__", False)
    }
    assert {"prepare", "scope", "settle", "held", "extensions", "device", "version", "hold", "fetch"} <= optional
    assert all(f"`{name}" in README or name in blocks("python")[0] for name in optional)
    for file in (ROOT / "backends" / "peft_ref_backends").glob("[a-z]*.py"):
        assert 20 <= len(file.read_text().splitlines()) <= 80, f"{file.name} is not a small file any more"
