"""HF PEFT itself as a port: whatever it answers is right, or a dialect that has a name; what it cannot do is listed here."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_ref.check.corpus import corpus
from peft_ref.check.judge import judge
from peft_ref.check.program import ProgramPort
from peft_ref.check.result import Report
from tests.ports.page import PORTS

pytestmark = pytest.mark.hf

# PEFT does not pass a convolution's dilation on to lora_A and crashes in the forward pass; merging works.
DILATION = {f"{method}.conv1d-dilation.plain.{operation}" for method in ("lora", "dora") for operation in ("forward", "backward")}
# These two it works out in float32 and refuses in float64.
COMPUTED_STARTS = {"lora.linear.init-pissa.init", "lora.linear.init-olora.init"}
# Two tasks' forward does not hand task_ids on, without which the encoder of multitask prompt tuning raises.
WITHOUT_TASK_IDS = {f"multitask_prompt_tuning.splice-{task}.splice" for task in ("answering", "features")}
# The smallest of no scores is nothing: where no triplet is to go, PEFT's allocator crashes.
NOTHING_GOES = {"adalora.allocator.nothing-goes.allocate"}
# It divides by l + 1e-8; in float32 that is l.
EPSILON = {c.id for c in corpus("ia3") if c.operation == "unmerge"}


# It puts a saved copy of the frozen weight back, whatever it is given.
SAVED_COPY = {c.id for c in corpus("hira") if c.operation == "unmerge"}


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


def test_only_what_peft_is_known_not_to_do_is_skipped(report: Report) -> None:
    assert ids(report, "skipped") == DILATION | WITHOUT_TASK_IDS | NOTHING_GOES | (
        COMPUTED_STARTS if report.port.dtype == "float64" else set()
    )


def test_the_only_dialects_are_two_ways_to_unmerge_and_float32_hides_that_of_ia3(report: Report) -> None:
    wide = report.port.dtype == "float64"
    assert ids(report, "dialect") == SAVED_COPY | (EPSILON if wide else set())
    assert {d.mistakes for d in report.diagnoses} == {("unmerge-saved-copy",)} | ({("ia3-unmerge-epsilon",)} if wide else set())
