"""The ports to copy: small, right in all they answer, and the one with a planted mistake is found out by name."""

from __future__ import annotations

import shutil
import sys

import pytest

from peft_ref.check.case import ARRAY_OPERATIONS
from peft_ref.check.corpus import corpus
from peft_ref.check.judge import judge
from peft_ref.check.program import ProgramPort
from peft_ref.check.result import Report
from tests.ports.page import PORTS

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="Node is not installed")
COMMANDS = {
    "python": [sys.executable, str(PORTS / "python/port.py")],
    "javascript": [NODE or "node", str(PORTS / "javascript/lora.mjs")],
}
BOTH = pytest.mark.parametrize("language", ["python", pytest.param("javascript", marks=needs_node)])
LINEAR_LORA = [c for c in corpus("lora") if c.layer is not None and c.layer.kind == "linear" and c.operation in ARRAY_OPERATIONS]


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    return {}


def judged(language: str, reports: dict[str, Report]) -> Report:
    if language not in reports:
        reports[language] = judge(ProgramPort(COMMANDS[language], validate=True), corpus(), search=False)
    return reports[language]


@BOTH
def test_it_is_right_in_all_of_lora_on_linear_layers_but_lora_bias_which_it_skips(language: str, reports: dict[str, Report]) -> None:
    report = judged(language, reports)
    status = {v.case: v.status for v in report.verdicts}
    assert {c.id: status[c.id] for c in LINEAR_LORA} == {c.id: "skipped" if "lora-bias" in c.id else "right" for c in LINEAR_LORA}
    assert report.exit_code == 0


@BOTH
def test_it_is_asked_nothing_that_it_did_not_declare(language: str, reports: dict[str, Report]) -> None:
    declared = {c.id for c in LINEAR_LORA}
    assert {v.status for v in judged(language, reports).verdicts if v.case not in declared} == {"not asked"}


@pytest.mark.parametrize("file", ["python/port.py", "python/planted.py", "javascript/lora.mjs"])
def test_it_has_fewer_than_150_lines_and_imports_nothing_that_must_be_installed(file: str) -> None:
    lines = (PORTS / file).read_text(encoding="utf-8").splitlines()
    assert len(lines) < 150
    imported = {line for line in lines if line.startswith(("import ", "from "))}
    assert imported <= {"import json", "import math", "import sys", "import port", 'import { createInterface } from "node:readline";'}


def test_the_planted_mistake_is_found_by_name_and_shrunk() -> None:
    report = judge(ProgramPort([sys.executable, str(PORTS / "python/planted.py")], validate=True), corpus("lora"))
    [diagnosis] = report.diagnoses
    assert diagnosis.mistakes == ("scale-is-alpha",)
    assert diagnosis.counterexample is not None
    assert diagnosis.counterexample.case["layer"]["weight"] == [[0.0]]
    assert report.exit_code == 1
