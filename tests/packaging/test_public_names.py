"""`import peft_ref`: which names it has, where they come from, and what it does not load."""

from __future__ import annotations

import ast
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import peft_ref
from peft_ref.methods import METHODS

# Everything a user may have installed and did not ask for by importing peft_ref.
HEAVY = {"torch", "jax", "dask", "cupy", "mlx", "array_api_compat", "array_api_strict", "hypothesis"} | {
    "safetensors",
    "ml_dtypes",
    "regex",
    "fastjsonschema",
    "transformers",
    "peft",
    "scipy",
}
PUBLIC = [*peft_ref._HOME, *sorted(cls.__name__ for cls in METHODS.values())]


def loaded_by(statement: str, run: Any) -> set[str]:
    """The top-level modules that a fresh interpreter has after `statement`."""
    program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    return set(json.loads(run(sys.executable, "-c", program)))


def static_names(root: Path) -> dict[str, str]:
    """What the TYPE_CHECKING block of peft_ref/__init__.py imports, and from where."""
    tree = ast.parse((root / "peft_ref" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {
        alias.name: statement.module or "" for statement in block.body if isinstance(statement, ast.ImportFrom) for alias in statement.names
    }


def test_importing_the_package_loads_the_standard_library_only(run: Any) -> None:
    third_party = loaded_by("import peft_ref", run) - loaded_by("pass", run) - sys.stdlib_module_names
    assert third_party == {"peft_ref"}


def test_using_every_public_name_loads_no_library_but_numpy(run: Any) -> None:
    loaded = loaded_by("from peft_ref import *\nLoRA, forward, METHODS", run)
    assert "numpy" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_there_on_first_use(name: str) -> None:
    assert getattr(peft_ref, name) is not None
    assert name in dir(peft_ref)


def test_every_method_is_a_public_name_by_its_row_in_the_table() -> None:
    for cls in METHODS.values():
        assert getattr(peft_ref, cls.__name__) is cls


def test_a_type_checker_is_told_the_homes_that_are_used(root: Path) -> None:
    static = static_names(root)
    assert static.pop("*") == "peft_ref.methods"
    assert static == {name: home for name, home in peft_ref._HOME.items() if name != "METHODS"}


def test_the_methods_package_exports_its_table_and_every_class_in_it() -> None:
    methods = import_module("peft_ref.methods")
    assert set(methods.__all__) == {"METHODS", *(cls.__name__ for cls in METHODS.values())}


def test_a_name_that_does_not_exist_is_an_attribute_error_that_says_where_to_look() -> None:
    with pytest.raises(AttributeError, match=r"peft_ref.__all__"):
        _ = peft_ref.LoRRA  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue] - the point of the test


def test_a_star_import_brings_what_all_promises() -> None:
    scope: dict[str, object] = {}
    exec("from peft_ref import *", scope)
    assert set(PUBLIC) | {"__version__"} == set(scope) - {"__builtins__"}
