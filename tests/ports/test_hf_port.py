"""HF PEFT itself as a port: whatever it answers is right, or a dialect that has a name; what it cannot do is listed here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_ref.check.corpus import corpus
from peft_ref.check.judge import judge
from peft_ref.check.program import ProgramPort
from peft_ref.check.prompting import INTEGERS, PromptVariant, make_prompt_case
from peft_ref.check.result import Report
from peft_ref.methods import METHODS
from peft_ref.splice import SEQ_2_SEQ, TASKS
from tests.methods import facts
from tests.methods.facts import Facts
from tests.ports.page import PORTS
from tests.spec.dialect_table import dialects

pytestmark = pytest.mark.hf

# Two tasks' forward does not hand task_ids on, without which the encoder of multitask prompt tuning raises.
WITHOUT_TASK_IDS = {f"multitask_prompt_tuning.splice-{task}.splice" for task in ("answering", "features")}
# Heads whose widths do not add up to the model's.
HEAD_DIM = {f"adaption_prompt.wide.{operation}" for operation in ("attention", "attention_backward")}  # ADAPTIONPROMPT-Q2


@pytest.fixture(scope="module", params=["float64", "float32"])
def report(request: pytest.FixtureRequest) -> Report:
    command = [sys.executable, str(PORTS / "hf_peft/port.py"), "--dtype", request.param]
    return judge(ProgramPort(command, timeout=60, start_timeout=120, validate=True), corpus(), search=False)


def ids(report: Report, status: str) -> set[str]:
    return {v.case for v in report.verdicts if v.status == status}


def test_peft_is_right_or_a_named_dialect_in_every_case_it_can_answer(report: Report) -> None:
    assert report.broken == ""
    assert [(v.case, v.status, v.reason) for v in report.verdicts if v.status in ("wrong", "error", "undecidable", "not asked")] == []
    assert report.exit_code == 0


def of(asked: Callable[[Facts], Callable[[str, str], bool] | None], dtype: str) -> set[str]:
    found = ((c.id, asked(facts(c.method))) for c in corpus() if c.method in METHODS.weights)
    return {case for case, says in found if says is not None and says(case, dtype)}


def test_only_what_peft_is_known_not_to_do_is_skipped(report: Report) -> None:
    assert ids(report, "skipped") == WITHOUT_TASK_IDS | HEAD_DIM | of(lambda own: own.unable, report.port.dtype)


def test_only_the_dialects_are_seen_that_are_known(report: Report) -> None:
    """Case by case: what the spec's table of dialects counts is what PEFT shows, no more and no less."""
    known = {(case.id, d.mistake.name) for d in dialects() for case in d.cases[report.port.dtype]}
    assert {(case, name) for d in report.diagnoses for case in d.cases for name in d.mistakes} == known
    assert ids(report, "dialect") == {case for case, _ in known}


def test_what_a_model_receives_is_pefts_for_every_task_and_number_of_submodules() -> None:
    """Also where a configuration gives two to a task that has one, or one to an encoder-decoder."""
    sizes = {"num_virtual_tokens": 3, "token_dim": 6, "num_attention_heads": 2, "num_layers": 5}
    own: dict[str, dict[str, Any]] = {
        "cpt": {"cpt_token_ids": [2, 0, 1], "cpt_tokens_type_mask": [1, 2, 4]},
        "multitask_prompt_tuning": {"num_tasks": 2},
        "p_tuning": {"encoder_hidden_size": 4},
    }
    asked = []
    for name, task, n in product(METHODS.prompts, TASKS, (1, 2)):
        if METHODS.prompts[name].only_task not in (None, task):
            continue
        config = {**sizes, **own.get(name, {}), "num_transformer_submodules": n}
        inputs = ("attention_mask", "labels") if task == SEQ_2_SEQ else INTEGERS
        variant = PromptVariant(name=f"{task}-{n}", clause="", config=config, operations=("splice",), task_type=task, inputs=inputs)
        asked.append(make_prompt_case(name, variant, "splice"))
    report = judge(ProgramPort([sys.executable, str(PORTS / "hf_peft/port.py")], start_timeout=120, validate=True), asked, search=False)
    skipped = {f"multitask_prompt_tuning.{task}-{n}.splice" for task in ("QUESTION_ANS", "FEATURE_EXTRACTION") for n in (1, 2)}
    assert ids(report, "skipped") == skipped
    assert ids(report, "right") == {c.id for c in asked} - skipped
