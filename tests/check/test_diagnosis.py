"""The judge names what went wrong in ports it has never seen: `planted/` was written from the mistakes' sentences alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.check.case import ARRAY_OPERATIONS, Answer, Case, to_json
from peft_ref.check.corpus import corpus
from peft_ref.check.judge import judge
from peft_ref.check.mistakes import SUITES
from peft_ref.check.program import ProgramPort
from peft_ref.check.protocol import flatten
from peft_ref.check.result import PortInfo, Report
from tests.check.function_port import FunctionPort
from tests.check.planted import adalora, dora, lora

PLANTED: dict[str, dict[str, Any]] = {"lora": lora.PLANTED, "dora": dora.PLANTED, "adalora": adalora.PLANTED}
RIGHT: dict[str, Any] = {"lora": lora.LoRA, "dora": dora.DoRA, "adalora": adalora.AdaLoRA}
PAIRS = [(method, name) for method, mistakes in PLANTED.items() for name in mistakes]
ROOT = Path(__file__).parents[2]


def array_cases(method: str) -> tuple[Case, ...]:
    return tuple(c for c in corpus(method) if c.operation in ARRAY_OPERATIONS)


def judged(method: str, made: Any, dtype: str) -> Report:
    port = made(np.dtype(dtype).type)

    def answer(case: Case) -> Answer | None:
        out = port.answer(to_json(case))
        return None if out is None else flatten(out)

    operations = made.operations if method == "adalora" else ()  # what it does in training, and nothing else
    about = PortInfo(name="planted", dtype=dtype, layers=lora.LoRA.kinds, operations=operations)
    return judge(FunctionPort(answer, dtype, about), array_cases(method), search=False)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("method", PLANTED)
def test_the_port_without_a_mistake_is_right(method: str, dtype: str) -> None:
    report = judged(method, RIGHT[method], dtype)
    assert not report.broken
    assert not [v for v in report.verdicts if v.status not in ("right", "not asked")]
    assert report.counts["right"] > (10 if method == "adalora" else 25)
    assert report.exit_code == 0


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_a_planted_mistake_is_diagnosed_by_its_name_and_no_other(method: str, name: str, dtype: str) -> None:
    report = judged(method, PLANTED[method][name], dtype)
    assert not report.broken
    assert not report.counts["error"]
    assert [(d.mistakes, d.together) for d in report.diagnoses] == [((name,), False)], [
        (d.mistakes, d.operations, d.layers, d.text) for d in report.diagnoses
    ]
    sentence = next(m.sentence for m in SUITES[method].mistakes if m.name == name)
    assert sentence in report.diagnoses[0].text
    assert report.exit_code == 1


@pytest.mark.parametrize("method", PLANTED)
def test_the_planted_names_are_the_judges(method: str) -> None:
    assert PLANTED[method].keys() <= {m.name for m in SUITES[method].mistakes}


def test_enough_is_planted() -> None:
    assert len(lora.PLANTED) >= 16
    assert len(dora.PLANTED) >= 11
    assert len(adalora.PLANTED) >= 20


PROGRAMS = [("lora", "scale-is-alpha"), ("lora", "fan-in-fan-out-ignored"), ("dora", "norm-of-base-only"), ("adalora", "score-summed")]


@pytest.mark.parametrize(("method", "name"), PROGRAMS)
def test_a_planted_program_is_diagnosed_through_its_pipes(method: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    port = ProgramPort([sys.executable, "-m", "tests.check.planted", method, name, "float32"])
    report = judge(port, array_cases(method), search=False)
    assert not report.broken
    assert [d.mistakes for d in report.diagnoses] == [(name,)]
    assert not report.counts["error"]


def test_a_mistake_that_nobody_knows_is_called_unknown() -> None:
    class Odd(lora.LoRA):
        def scale(self, config: dict[str, Any], case: dict[str, Any]) -> float:
            return 0.7 * super().scale(config, case)

    report = judged("lora", Odd, "float64")
    assert {d.mistakes for d in report.diagnoses} == {()}
    assert any("0.7 times what the adapter should add" in d.text for d in report.diagnoses)


def test_two_mistakes_at_once_are_both_named() -> None:
    class Both(lora.ScaleIsAlpha, lora.ATransposed):
        pass

    report = judged("lora", Both, "float64")
    assert [(set(d.mistakes), d.together) for d in report.diagnoses] == [({"scale-is-alpha", "A-transposed"}, True)]


def test_two_mistakes_in_two_operations_are_each_named_where_they_are() -> None:
    class Both(lora.DoubleMerge, lora.BiasLost):
        pass

    report = judged("lora", Both, "float64")
    assert {(d.mistakes, d.operations) for d in report.diagnoses} == {(("double-merge",), ("merge",)), (("bias-lost",), ("forward",))}


def test_ambiguity_is_reported() -> None:
    """Where only rsLoRA's forward is answered, two mistakes give the same numbers: alpha / r there is what ignoring use_rslora gives."""
    cases = [c for c in array_cases("lora") if c.id == "lora.linear.plain.forward"]
    made = lora.RsloraAlways(np.float64)
    report = judge(FunctionPort(lambda c: flatten(made.answer(to_json(c)) or {}), "float64"), cases, search=False)
    names = report.diagnoses[0].mistakes
    assert "rslora-always" in names
    for name in names:  # every one that is named does explain the numbers
        replayed = next(m for m in SUITES["lora"].mistakes if m.name == name).replay(cases[0])
        assert replayed is not None
        np.testing.assert_array_equal(replayed["y"], flatten(made.answer(to_json(cases[0])) or {})["y"])
