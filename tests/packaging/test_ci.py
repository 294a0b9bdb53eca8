"""What CI runs is what the README tells people to run."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest


def commands(root: Path) -> list[str]:
    lines = (root / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_last_command_of_ci_is_the_readme_s_test_command(root: Path) -> None:
    last = commands(root)[-1]
    assert "-m pytest" in last
    assert last in (root / "README.md").read_text(encoding="utf-8"), f"README.md does not tell people to run:\n{last}"


def test_ci_stops_at_the_first_failure_and_can_be_run(root: Path) -> None:
    assert commands(root)[0] == "set -euo pipefail"
    assert os.access(root / ".ci" / "run", os.X_OK)


def test_the_readme_and_ci_install_extras_that_exist(root: Path) -> None:
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    texts = [root / "README.md", root / "CONTRIBUTING.md", root / ".ci" / "run", root / ".github" / "workflows" / "ci.yml"]
    named = {
        name for path in texts for group in re.findall(r"\.\[([\w,-]+)\]", path.read_text(encoding="utf-8")) for name in group.split(",")
    }
    assert {"test", "hf"} <= named <= set(extras)


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_the_papers_are_there(root: Path, name: str) -> None:
    assert (root / name).stat().st_size > 500


def test_the_tested_versions_of_python_are_the_promised_ones(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    promised = [c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)]
    matrix = re.search(r"python: \[(.*)\]", (root / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert matrix is not None
    assert re.findall(r"[\d.]+", matrix[1]) == promised
    assert project["requires-python"] == f">={promised[0]}"
