"""The judge names what went wrong in prompts it has never seen: `planted/prompts.py` was written from the mistakes' sentences alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_ref.check.case import Answer, Case, to_json
from peft_ref.check.judge import judge
from peft_ref.check.mistakes import SUITES
from peft_ref.check.oracle import answer
from peft_ref.check.protocol import flatten
from peft_ref.check.result import Report
from tests.check.discrimination import array_cases
from tests.check.function_port import FunctionPort
from tests.check.planted import prompts

RIGHT: dict[str, Any] = {"prefix_tuning": prompts.PrefixTuning, "p_tuning": prompts.PTuning}
PLANTED: dict[str, dict[str, Any]] = {"prefix_tuning": prompts.PREFIX, "p_tuning": prompts.P_TUNING}
PAIRS = [(method, name) for method, mistakes in PLANTED.items() for name in mistakes]


def judged(method: str, made: Any, dtype: str) -> Report:
    port = made(np.dtype(dtype).type)

    def reply(case: Case) -> Answer | None:
        out = port.answer(to_json(case))
        return None if out is None else flatten(out)

    return judge(FunctionPort(reply, dtype), array_cases(method), search=False)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("method", PLANTED)
def test_the_port_without_a_mistake_is_right(method: str, dtype: str) -> None:
    report = judged(method, RIGHT[method], dtype)
    assert not report.broken
    assert not report.diagnoses
    assert {v.case for v in report.verdicts if v.status != "right"} == {f"{method}.splice-answering.splice"}  # which it has not built
    assert report.counts["right"] >= 19
    assert report.exit_code == 0


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.sweep)])
@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_a_planted_mistake_is_diagnosed_by_its_name_and_no_other(method: str, name: str, dtype: str) -> None:
    report = judged(method, PLANTED[method][name], dtype)
    assert not report.broken
    assert not report.counts["error"]
    assert [(d.mistakes, d.together) for d in report.diagnoses] == [((name,), False)], [
        (d.mistakes, d.operations, d.text) for d in report.diagnoses
    ]
    mistake = next(m for m in SUITES[method].mistakes if m.name == name)
    assert mistake.sentence in report.diagnoses[0].text
    assert report.exit_code == (0 if mistake.dialect else 1)


HIDDEN = {
    "prefix_tuning.one-of-each": "heads-interleaved heads-reshaped heads-before-layers keys-rotated gradient-averaged",
    "prefix_tuning.inference": "tanh-missing relu-for-tanh tanh-at-end",
    "prefix_tuning.two-sides-odd": "shared-slots-overwritten",
    "prefix_tuning.plain": "own-slots cross-attention-slots",
    "p_tuning.lstm-one-row": "both-directions-forward reverse-not-put-back gradient-of-one-step one-lstm-layer state-kept-between-layers",
    "p_tuning.lstm-half": "dropout-divided-by-p dropout-first-mask-for-all",
    "p_tuning.mlp-five-layers": "one-lstm-layer gates-i-f-o-g",
    "p_tuning.inference": "relu-missing encoder-input-saved",
}


@pytest.mark.parametrize("variant", HIDDEN)
def test_where_a_mistake_changes_nothing_it_gives_the_right_numbers(variant: str) -> None:
    """Else a port that makes it would be told from its replay by a case that it got right."""
    cases = [case for case in array_cases(variant.partition(".")[0]) if case.id.startswith(f"{variant}.")]
    assert cases
    for mistake in SUITES[cases[0].method].mistakes:
        if mistake.name in HIDDEN[variant].split():
            for case in cases:
                right = answer(case)
                for key, value in (mistake.replay(case) or right).items():
                    np.testing.assert_allclose(value, right[key], rtol=1e-13, atol=1e-14)
    assert set(HIDDEN[variant].split()) <= {m.name for m in SUITES[cases[0].method].mistakes}


def test_two_mistakes_at_once_in_an_lstm_are_both_named() -> None:
    class Both(prompts.GatesIFOG, prompts.BiasHHMissing):
        pass

    report = judged("p_tuning", Both, "float64")
    assert [(set(d.mistakes), d.together) for d in report.diagnoses] == [({"gates-i-f-o-g", "bias-hh-missing"}, True)]


def test_a_mistake_that_nobody_knows_is_called_unknown() -> None:
    class Odd(prompts.PrefixTuning):
        def bend(self, x: Any) -> Any:
            return x / (1 + x * x)

    assert [d.mistakes for d in judged("prefix_tuning", Odd, "float64").diagnoses] == [()]
