"""The method of CONTRIBUTING.md, "Your own method", as a module that a test can import."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from peft_ref.check.mistakes import SUITES
from peft_ref.methods import METHODS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def own_source() -> str:
    section = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("## Your own method")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    return str(block)


@pytest.fixture
def own(own_source: str, tmp_path: Path) -> Iterator[ModuleType]:
    """The module, its method registered until the test ends."""
    path = tmp_path / "own_method.py"
    path.write_text(own_source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("own_method", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_method"] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for name in METHODS.registered & set(SUITES):
            SUITES.unregister(name)
        for name in METHODS.registered:
            METHODS.unregister(name)
        del sys.modules["own_method"]
