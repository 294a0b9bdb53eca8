"""A method has its five files, and every file is short enough to read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_ref.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 400
CODE = {".py", ".toml", ".yml", ".sh", ".js", ".mjs", ".ts", ".c", ".h", ".cpp", ".rs", ".go", ".jl", ".ex", ".exs", ".css", ".html"}
FOLDERS = ("peft_ref", "backends", "spec", "tests", ".github")


def files() -> Iterator[Path]:
    yield from (p for p in ROOT.iterdir() if p.is_file())
    for folder in FOLDERS:
        yield from (p for p in (ROOT / folder).rglob("*") if p.is_file() and not {"__pycache__", "node_modules"} & set(p.parts))


def home(name: str) -> Path:
    """The file of the method that has this row in METHODS."""
    return ROOT.joinpath(*METHODS[name].__module__.split(".")).with_suffix(".py")


def test_no_file_has_more_than_four_hundred_lines() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in files() if p.suffix in CODE}
    assert len(lengths) > 20
    too_long = {name: n for name, n in lengths.items() if n > LIMIT}
    assert not too_long


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_five_files(name: str) -> None:
    assert home(name).name == f"{name}.py", f"METHODS[{name!r}] is in {home(name).name}, expected peft_ref/methods/{name}.py"
    five = [home(name), ROOT / f"spec/methods/{name}.md", ROOT / f"peft_ref/check/mistakes/{name}.py"]
    if name in METHODS.weights:
        five.append(ROOT / f"tests/methods/{name}.py")
    missing = [str(p.relative_to(ROOT)) for p in five if not p.is_file()]
    assert not missing, f"{name}: write {', '.join(missing)}"


def test_every_method_file_has_its_row() -> None:
    defining = {p.stem for p in (ROOT / "peft_ref" / "methods").glob("*.py") if "peft_type:" in p.read_text("utf-8")}
    assert defining == set(METHODS), "give each file a row in peft_ref/methods/__init__.py"


def test_the_table_of_methods_is_sorted() -> None:
    assert list(METHODS) == sorted(METHODS)


@pytest.mark.parametrize("folder", ["spec/methods", "peft_ref/check/mistakes"])
def test_no_page_or_mistake_without_its_method(folder: str) -> None:
    names = {p.stem for p in (ROOT / folder).glob("*.*") if p.suffix in {".md", ".py"}} - {"__init__", "README"}
    assert names <= set(METHODS), f"{', '.join(sorted(names - set(METHODS)))}: no such row in METHODS"
