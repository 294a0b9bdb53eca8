"""Arrows only point down: what each room of the house may import, read from the source.

A room is a module or a package directly under `peft_ref/`. FLOORS is the plan of DESIGN.md; a room imports from its own
floor or below, never a neighbour on its floor. A new room is put where it belongs, here.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

FLOORS = (
    {"errors"},
    {"arrays", "sizes", "ranges", "reading"},  # reading: files that are not believed; it knows no array
    {"dense"},
    {"layers", "attention", "activations"},
    {"norms"},
    {"parameters", "changes"},
    {"contracts"},
    {"prompts", "attending", "conditioned", "large"},
    {"registry"},  # HF's names and the type of the table of methods: it knows the contracts, and METHODS is made of it
    {"methods", "stack", "splice", "backend"},
    {"graph"},
    {"files"},
    {"model", "nn"},  # nn: transformers to put adapters in; it knows HF's names, graphs and files
    {"train"},  # train: it puts the adapters of `model` into the transformers of `nn`
    {"hf"},
    {"check"},
    {"checkpoints"},  # whole checkpoints; verify reports as the judge does
    {"report"},
    {"cli"},
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
MATHEMATICS = {
    "errors",
    "arrays",
    "sizes",
    "ranges",
    "dense",
    "large",
    "layers",
    "norms",
    "attention",
    "activations",
    "changes",
    "contracts",
    "prompts",
    "attending",
    "conditioned",
    "registry",
}
MATHEMATICS |= {"methods", "stack", "splice"}
ROOT = Path(__file__).resolve().parents[2]


class Import(NamedTuple):
    module: str  # dotted, absolute
    at_top: bool  # runs when the module is imported
    line: int


def statements(tree: ast.AST, at_top: bool = True) -> Iterator[tuple[ast.stmt, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, at_top
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from statements(node, at_top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def imports(path: Path) -> list[Import]:
    found = []
    for node, at_top in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, at_top, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides which room it enters"
            # `from peft_ref import x` enters the room x, `from peft_ref.x import y` too.
            # `__version__` and its like belong to the package itself, not to a room.
            names = [alias.name for alias in node.names if not alias.name.startswith("__")]
            inner = [f"peft_ref.{name}" for name in names] if node.module == "peft_ref" else [node.module or ""]
            found += [Import(module, at_top, node.lineno) for module in inner]
    return found


def room(path: Path) -> str:
    inside = path.relative_to(ROOT / "peft_ref").parts
    return inside[0].removesuffix(".py")


SOURCES = sorted((ROOT / "peft_ref").rglob("*.py"))
BACKENDS = sorted((ROOT / "backends" / "peft_ref_backends").rglob("*.py"))
RELATIVE = {path: str(path.relative_to(ROOT)) for path in [*SOURCES, *BACKENDS]}
ROOMS = [path for path in SOURCES if room(path) != "__init__"]


def outside(path: Path) -> list[Import]:
    """What is neither ours nor in the standard library."""
    return [i for i in imports(path) if i.module.partition(".")[0] not in sys.stdlib_module_names | {"peft_ref"}]


def declared(extra: str | None = None) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    names = [re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in requirements]
    return {name.replace("-", "_") for name in names}


@pytest.mark.parametrize("path", ROOMS, ids=RELATIVE.get)
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    here = room(path)
    assert here in FLOOR, f"peft_ref/{here} is a new room: give it a floor in {Path(__file__).name} with a reason to be there"
    wrong = []
    for i in imports(path):
        top, _, rest = i.module.partition(".")
        there = rest.partition(".")[0]
        if top == "peft_ref" and there != here and (not there or FLOOR.get(there, len(FLOORS)) >= FLOOR[here]):
            wrong.append(f"line {i.line}: {here} imports {i.module}")
    assert not wrong


@pytest.mark.parametrize("path", SOURCES, ids=RELATIVE.get)
def test_no_array_library_but_numpy_is_imported_and_nothing_undeclared(path: Path) -> None:
    late = declared("cluster") if room(path) == "checkpoints" else set()  # by `peft-ref merge --scheduler` alone, in a function
    known = [(i, declared() if i.at_top else declared() | late) for i in outside(path)]
    undeclared = [f"line {i.line}: {i.module}" for i, names in known if i.module.partition(".")[0] not in names]
    assert not undeclared, "a backend is found by its entry point, a library of a port lives in the port's own process"


@pytest.mark.parametrize("path", [p for p in ROOMS if room(p) in MATHEMATICS], ids=RELATIVE.get)
def test_the_mathematics_imports_numpy_and_lazily_array_api_compat(path: Path) -> None:
    for i in outside(path):
        assert i.module == "numpy" if i.at_top else i.module in {"numpy", "array_api_compat"}, f"line {i.line}: {i.module}"


def test_every_plain_dependency_is_imported_somewhere() -> None:
    used = {i.module.partition(".")[0] for path in SOURCES + BACKENDS for i in outside(path)}
    assert declared() <= used, f"nothing imports {', '.join(sorted(declared() - used))}: take it out of pyproject.toml"


@pytest.mark.parametrize("path", BACKENDS, ids=RELATIVE.get)
def test_a_backend_knows_its_contract_and_not_that_it_is_checked(path: Path) -> None:
    rooms = {i.module.split(".")[1] for i in imports(path) if i.module.startswith("peft_ref.")}
    assert rooms <= {"arrays", "backend", "errors"}
