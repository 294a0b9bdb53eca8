"""Which backends the laws run on: `--backend NAME` (or "module:Class", as often as you like), or else every one that is known.

Known are the installed ones and, so that a checkout needs no installation, those of this repository's pyproject.toml.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.backend import GROUP, Backend, BackendMissing, get_backend, installed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", action="append", default=[], help="a backend to run the laws on: its name, or module:Class")


def known() -> dict[str, str]:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    ours: dict[str, str] = project["entry-points"][GROUP]
    return ours | {name: point.value for name, point in installed().items()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--backend", default=[]) or list(known())
        metafunc.parametrize("backend", chosen, indirect=True, scope="session")


COMPILED = {"dask", "jax"}  # which take a second for every shape they see


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On what compiles, a method is tried on one kind of layer; on all of them in the sweep, or where the backend is named."""
    if config.getoption("--backend", default=[]):
        return
    tried: set[tuple[str, str, str]] = set()
    for item in items:
        given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if given.get("backend") in COMPILED and "kind" in given:
            law = (item.originalname, given["backend"], given.get("name", ""))  # type: ignore[attr-defined]  # a function, as seen
            if law in tried:
                item.add_marker(pytest.mark.sweep)
            tried.add(law)


@cache
def _construct(name: str) -> Backend | BackendMissing:
    try:
        return get_backend(known().get(name, name))
    except BackendMissing as missing:
        return missing


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    found = _construct(request.param)
    if isinstance(found, BackendMissing):
        if request.config.getoption("--backend", default=[]):
            pytest.fail(str(found))  # asked for by name
        pytest.skip(found.reason)
    return found


@pytest.fixture(autouse=True)
def one_unknown_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard writes an unknown size of a shape as -1. NumPy takes any negative number for it, and other libraries do not."""
    reshape = np.reshape

    def strict(a: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
        sizes = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
        assert min(sizes, default=0) >= -1, f"np.reshape to {sizes}"
        return reshape(a, shape, *args, **kwargs)

    monkeypatch.setattr(np, "reshape", strict)
