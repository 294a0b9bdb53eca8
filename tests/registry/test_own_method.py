"""The method of CONTRIBUTING.md is a method like the others: laws, configurations, files, the judge."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import peft_ref
from peft_ref.backend import get_backend
from peft_ref.check.case import Answer, Case
from peft_ref.check.corpus import corpus
from peft_ref.check.judge import judge
from peft_ref.check.mistake import with_config
from peft_ref.check.mistakes import SUITES
from peft_ref.check.oracle import answer
from peft_ref.check.port import BackendPort
from peft_ref.errors import ConfigError
from peft_ref.files.adapter import AdapterFile, AdapterModule, load_adapter, save_adapter
from peft_ref.files.config import flatten, from_dict
from peft_ref.layers import Linear
from peft_ref.methods import METHODS
from tests.check.function_port import FunctionPort

ROOT = Path(__file__).parents[2]
ANNOUNCED = """\
[peft_ref.methods]
outer = own_method:Outer
broken = own_method:Nothing
[peft_ref.suites]
outer = own_method:SUITE
"""


def python(folder: Path, *arguments: str) -> str:
    """What a fresh interpreter prints that finds `folder`."""
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "backends")))
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_it_obeys_the_laws(own_source: str, tmp_path: Path) -> None:
    (tmp_path / "own_method.py").write_text(own_source, encoding="utf-8")
    shown = python(tmp_path, "-m", "pytest", "tests/laws", "-k", "outer", "-q", "-pown_method", "-pno:cacheprovider", "--backend", "numpy")
    passed = int(shown.rpartition(" passed")[0].split()[-1])
    assert passed > 40
    assert "failed" not in shown
    assert "error" not in shown


def test_it_is_in_the_table_and_a_public_name(own: ModuleType) -> None:
    assert METHODS["outer"] is own.Outer
    assert list(METHODS) == sorted(METHODS)
    assert peft_ref.method_class("OUTER") is own.Outer
    assert peft_ref.Outer is own.Outer  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue] - it is there at run time
    assert "Outer" in peft_ref.__all__  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue] - lazy


def test_its_configuration_is_read_and_written(own: ModuleType) -> None:
    data = {"peft_type": "OUTER", "alpha": 2.5, "target_modules": ["q"], "later": 1}
    config = from_dict(data)
    assert config.method == own.Outer(alpha=2.5)
    assert flatten(config) == data
    with pytest.raises(ConfigError, match="alpha='2' is of type str"):
        from_dict({**data, "alpha": "2"})


def test_its_adapter_folder_survives(own: ModuleType, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    params = own.Params(u=rng.normal(size=4), v=rng.normal(size=3))
    config = from_dict({"peft_type": "OUTER", "alpha": 2.0, "target_modules": ["q"]})
    module = AdapterModule(config.method, Linear(in_features=3, out_features=4), params)
    save_adapter(tmp_path / "adapter", AdapterFile(config=config, modules={"h.0.q": module}))
    back = load_adapter(tmp_path / "adapter").modules["h.0.q"]
    assert back.method == own.Outer(alpha=2.0)
    np.testing.assert_array_equal(back.params.u, params.u)
    np.testing.assert_array_equal(back.params.v, params.v)


def test_a_port_of_it_is_judged_right(own: ModuleType) -> None:
    cases = corpus("outer")
    assert {c.operation for c in cases} == {"forward", "backward", "delta", "merge", "unmerge"}
    for dtype in ("float64", "float32", "bfloat16"):
        report = judge(BackendPort(get_backend("peft_ref_backends.numpy:NumpyBackend"), dtype), cases)
        assert {v.status for v in report.verdicts} == {"right"}
        assert len(report.verdicts) == len(cases) == 10
        assert not report.diagnoses


def test_a_port_that_makes_its_known_mistake_is_told_so(own: ModuleType) -> None:
    def wrong(case: Case) -> Answer | None:
        changed = with_config(case, lambda config: {**config, "alpha": 1.0})
        return None if changed is None else answer(changed)

    report = judge(FunctionPort(wrong, "float32"), corpus("outer"))
    assert [d.mistakes for d in report.diagnoses] == [("alpha-ignored",)]
    assert report.diagnoses[0].counterexample is not None


def test_a_suite_that_is_replaced_asks_anew(own: ModuleType) -> None:
    before, suite = corpus("outer"), SUITES["outer"]
    SUITES.unregister("outer")
    assert corpus("outer") == ()
    assert not judge(BackendPort(get_backend("peft_ref_backends.numpy:NumpyBackend"), "float32"), before[:1]).diagnoses
    SUITES.register("outer", replace(suite, variants=(replace(suite.variants[0], layers=("linear",)),)))
    assert len(corpus("outer")) == len(before) / 2
    assert corpus("outer") is not before


def test_it_is_gone_afterwards() -> None:
    assert "outer" not in METHODS
    assert "outer" not in SUITES
    with pytest.raises(ConfigError, match="'OUTER' is not built here"):
        from_dict({"peft_type": "OUTER"})
    assert not [c for c in corpus() if c.method == "outer"]


def test_an_installed_package_is_found_and_a_broken_one_costs_nothing_but_itself(own_source: str, tmp_path: Path) -> None:
    declared, _, _ = own_source.partition("register_method(")
    suite = own_source[own_source.index("    Suite(") : own_source.rindex(")")].strip().rstrip(",")
    (tmp_path / "own_method.py").write_text(f"{declared}\nSUITE = {suite}\n", encoding="utf-8")
    info = tmp_path / "own_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-method\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(ANNOUNCED, encoding="utf-8")
    quiet = "import sys, peft_ref; from peft_ref import LoRA; import peft_ref.files.config; assert 'own_method' not in sys.modules"
    assert python(tmp_path, "-c", quiet) == ""
    read = "from peft_ref.files.config import from_dict; print(from_dict({'peft_type': 'OUTER'}).method)"
    assert python(tmp_path, "-c", read) == "Outer(alpha=1.0)\n"
    judged = python(tmp_path, "-m", "peft_ref.cli", "check", "--method", "outer", "--backend", "peft_ref_backends.numpy:NumpyBackend")
    assert "method 'broken' of own_method:Nothing: AttributeError" in judged
    assert "outer" in judged
