"""What the tests of the package share: where the checkout is, and the one way they run a command."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., str]


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def run(root: Path) -> Run:
    """Run a command without stdin, in the checkout unless told; return what it printed, fail with all of it when it fails."""

    def run(*command: str | Path, cwd: Path = root, env: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            list(map(str, command)),
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.fail(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stdout}", pytrace=False)
        return done.stdout

    return run
