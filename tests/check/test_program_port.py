"""A program costs its own case, whatever it does: no other case, no time beyond its own, no process, thread, pipe or memory of ours."""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
import tracemalloc
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peft_ref.check.case import Case
from peft_ref.check.corpus import corpus
from peft_ref.check.judge import judge
from peft_ref.check.port import Answered, BrokenPort, Failed
from peft_ref.check.program import GIVE_UP_METHOD, GIVE_UP_PORT, LONGEST_ANSWER, ProgramPort
from peft_ref.check.result import Report, Verdict

pytestmark = pytest.mark.filterwarnings("error::ResourceWarning")  # a pipe that is left to the garbage collector
MISBEHAVING = Path(__file__).parent / "ports" / "misbehaving.py"
# The port can do these; everything about it is right, until it misbehaves.
CASES = tuple(c for c in corpus("lora") if c.id.startswith("lora.linear.plain."))
VICTIM = "plain.backward"
PATIENCE = 20.0  # of tests in which nothing should have to be waited for, on however slow a machine
TOKEN = f"peft-ref-test-{uuid.uuid4().hex}"  # in the command line of every process that these tests start


def port(how: str, where: str = VICTIM, timeout: float = PATIENCE) -> ProgramPort:
    return ProgramPort([sys.executable, "-S", str(MISBEHAVING), how, where, TOKEN], timeout=timeout, start_timeout=timeout)


def judged(how: str, where: str = VICTIM, timeout: float = PATIENCE) -> Report:
    return judge(port(how, where, timeout), CASES, search=False)


def victim(report: Report) -> Verdict:
    """The verdict on the one case that is not right."""
    assert not report.broken
    bad = [v for v in report.verdicts if v.status != "right"]
    assert [v.case for v in bad] == ["lora.linear.plain.backward"], [(v.case, v.status, v.reason) for v in bad]
    return bad[0]


def processes() -> list[str]:
    """Processes of these tests that are alive."""
    alive = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command, state = (entry / "cmdline").read_bytes(), (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if TOKEN.encode() in command and state != "Z":
                alive.append(command.replace(b"\0", b" ").decode())
    return alive


def zombies() -> list[str]:
    mine = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            except OSError:
                continue
            if state == "Z" and int(parent) == os.getpid():
                mine.append(entry.name)
    return mine


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    before = len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), zombies()
    yield
    deadline = time.monotonic() + 2
    while processes() and time.monotonic() < deadline:  # SIGKILL takes a moment to reach a whole group
        time.sleep(0.01)
    assert processes() == []
    assert (len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), zombies()) == before


def test_a_port_that_behaves_is_right_everywhere() -> None:
    report = judged("behaves")
    assert {v.status for v in report.verdicts} == {"right"}
    assert len(report.verdicts) == len(CASES) == 5


QUIRKS = ["crlf", "bom", "blank-lines", "noisy-stderr", "leaves-after", "child", "ignores-stop"]


@pytest.mark.parametrize("how", QUIRKS)
def test_a_harmless_quirk_costs_nothing(how: str) -> None:
    assert {v.status for v in judged(how).verdicts} == {"right"}


# What goes wrong at once, and what the reader is told.
AT_ONCE = {
    "dies": ("ended with exit code 3", "out of memory"),
    "segfaults": ("signal 11 (SIGSEGV)",),
    "leaves": ("exit code 0", "without an answer"),
    "half-a-line": ("exit code 1", "in the middle of a line", '{"id":'),
    "banner": ("no JSON", "Loading model...", "print anything else to standard error"),
    "junk": ("no JSON",),
    "utf-16": ("no JSON",),
    "floods-lines": ("no JSON object", "standard error"),
    "endless-line": ("more than 8 MiB",),
    "floods-blank": ("more than 8 MiB",),
    "wrong-id": ("lora.of.another.planet", "lora.linear.plain.backward was asked"),
    "stale-id": ("answered lora.linear.plain.forward a second time",),
    "number-id": ("id that is no text",),
    "no-id": ("lora.linear.plain.backward was asked",),
    "null": ("no JSON object", "null"),
    "list": ("no JSON object",),
    "nothing": ('none of "answer", "skipped" and "error"',),
    "null-answer": ('none of "answer"',),
    "list-answer": ('none of "answer"',),
    "missing": ("x, 0.lora_A.weight, 0.lora_B.weight missing",),
    "extra": ("loss in the answer, which nobody asked for",),
    "error": ("the port reports: thread 'main' panicked",),
    "deep-error": ("the port reports",),
    "surrogate": ("the port reports",),
    "adapters-null": ("cannot be read",),
    "adapters-object": ("cannot be read",),
    "adapters-numbers": ("cannot be read",),
    "shape": ("x has the shape (1, 2), expected (2, 3, 5)",),
    "scalar": ("x has the shape (), expected (2, 3, 5)",),
    "empty": ("x has the shape (0,)",),
    "ragged": ("ragged",),
    "text": ("x: could not convert",),
    "texts": ("x: could not convert",),
    "object": ("cannot be read: x",),
    "objects": ("cannot be read: x",),
    "not-even": ("no JSON",),
    "huge-integer": ("cannot be read",),
    "longest-integer": ("no JSON",),
    "deep": ("no JSON",),
    "deep-enough": ("cannot be read",),
    "deep-open": ("no JSON",),
    "child-and-dies": ("exit code 1",),
    "detached-child-and-dies": ("exit code 1",),
    "closes-stdout": ("closed its output and runs on",),
}


@pytest.mark.parametrize("how", AT_ONCE)
def test_what_goes_wrong_in_one_case_costs_that_case_at_once_and_says_what_it_was(how: str) -> None:
    began = time.monotonic()
    verdict = victim(judged(how))
    assert verdict.status == "error"
    for part in AT_ONCE[how]:
        assert part in verdict.reason
    assert len(verdict.reason) < 3000
    assert time.monotonic() - began < PATIENCE / 2, "it waited for something that could not come"


SLOW = {
    "hangs": ("did not answer within 1 s", "flush"),
    "no-end-of-line": ("did not answer within 1 s", "began a line and did not end it"),
    "floods-stderr": ("did not answer within 1 s", "warning: slow"),
}


@pytest.mark.parametrize("how", SLOW)
def test_a_case_without_an_answer_ends_when_its_time_is_up(how: str) -> None:
    began = time.monotonic()
    verdict = victim(judged(how, timeout=1.0))
    assert verdict.status == "error"
    for part in SLOW[how]:
        assert part in verdict.reason
    assert time.monotonic() - began < 6


@pytest.mark.parametrize("how", ["every-nan", "every-null", "every-huge", "every-inf"])
def test_numbers_that_are_not_finite_or_enormous_are_wrong_numbers_not_errors(how: str) -> None:
    report = judge(port(how), CASES, search=True)
    verdict = victim(report)
    assert verdict.status == "wrong"
    assert report.exit_code == 1
    assert len(report.diagnoses) == 1
    assert report.diagnoses[0].mistakes == ()


@pytest.mark.parametrize("how", ["twice", "floods-after", "closes-stdin"])
def test_what_comes_after_an_answer_costs_one_later_case_and_names_the_culprit(how: str) -> None:
    report = judged(how, "plain.forward", timeout=1.0)
    statuses = {v.case.rsplit(".", 1)[1]: v.status for v in report.verdicts}
    assert statuses == {"forward": "right", "backward": "error", "delta": "right", "merge": "right", "unmerge": "right"}
    reason = report.verdicts[1].reason
    assert {"twice": "lora.linear.plain.forward", "floods-after": "tick", "closes-stdin": "did not answer within 1 s"}[how] in reason


def test_a_program_that_does_not_read_a_long_question_ends_when_its_time_is_up() -> None:
    case = replace(CASES[0], x=np.ones((200, 200)))  # more than a pipe holds
    program = port("does-not-read", "questions", timeout=1.0)
    program.start()
    began = time.monotonic()
    reply = program.ask(case)
    program.close()
    assert isinstance(reply, Failed)
    assert "did not read its input within 1 s" in reply.reason
    assert time.monotonic() - began < 4


def test_a_long_question_reaches_a_program_that_reads_it_slowly() -> None:
    case = replace(CASES[0], x=np.ones((2000, 5)), id="long.forward")
    program = port("behaves")
    program.start()
    reply = program.ask(case)
    program.close()
    assert isinstance(reply, Answered)
    assert reply.answer["y"].shape == (2000, 7)


def test_an_endless_line_does_not_fill_the_memory() -> None:
    tracemalloc.start()
    try:
        victim(judged("endless-line"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * LONGEST_ANSWER


# ---- one that cannot be judged


AT_START = {
    "dies": ("ended with exit code 3", "out of memory"),
    "leaves": ("exit code 0",),
    "banner": ("no JSON", "Loading model...", "print anything else to standard error"),
    "junk": ("no JSON",),
    "floods-lines": ("no JSON object", "standard error"),
    "endless-line": ("more than 8 MiB",),
    "null": ("null", "standard error"),
    "name": ("the answer to start is", '{"name": "...", "dtype": "float32"}'),
    "dtype": ('["float32"]', "bfloat16"),
    "unknown-dtype": ("posit16", "bfloat16"),
    "operations": ("operations", "expected a list of names"),
}


@pytest.mark.parametrize("how", AT_START)
def test_a_program_that_starts_wrongly_is_broken_and_says_how(how: str) -> None:
    report = judged(how, "start")
    assert report.exit_code == 2
    assert report.verdicts == ()
    for part in AT_START[how]:
        assert part in report.broken


def test_a_long_name_is_cut() -> None:
    assert len(judged("long-name", "start").port.name) < 300


@pytest.mark.parametrize("how", ["hangs", "does-not-read"])
def test_a_program_that_hangs_at_the_start_is_broken_when_its_time_is_up(how: str) -> None:
    began = time.monotonic()
    report = judged(how, "start", timeout=0.5)
    assert report.exit_code == 2
    assert "asked to start, it did not answer within 0.5 s" in report.broken
    assert time.monotonic() - began < 4


def test_the_smoke_test_tells_a_broken_harness() -> None:
    report = judged("missing", "smoke")
    assert report.exit_code == 2
    assert "smoke test" in report.broken
    assert "y missing" in report.broken


def unstartable(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    plain, script, lost = tmp_path / "plain", tmp_path / "script", tmp_path / "lost"
    plain.write_text("print()")
    script.write_text("print()")
    lost.write_text("#!/nowhere/python\n")
    script.chmod(stat.S_IRWXU)
    lost.chmod(stat.S_IRWXU)
    return {
        "missing": ([str(tmp_path / "missing")], "Is the path right"),
        "not executable": ([str(plain)], "chmod +x"),
        "a folder": ([str(tmp_path)], "Is it a program"),
        "no first line": ([str(script)], "#!"),
        "no interpreter": ([str(lost)], "interpreter"),
        "a zero byte": (["a\0b"], "null byte"),
        "an empty name": ([""], "cannot be started"),
    }


@pytest.mark.parametrize(
    "what", ["missing", "not executable", "a folder", "no first line", "no interpreter", "a zero byte", "an empty name"]
)
def test_a_command_that_cannot_be_started_is_broken_and_says_what_to_do(what: str, tmp_path: Path) -> None:
    if what == "not executable" and os.access(os.devnull, os.X_OK):
        pytest.skip("everything is executable here")
    command, told = unstartable(tmp_path)[what]
    with pytest.raises(BrokenPort, match="cannot be started") as error:
        ProgramPort(command).start()
    assert told in str(error.value)


# ---- one that fails again and again


def many(method: str, n: int) -> tuple[Case, ...]:
    return tuple(replace(CASES[i % len(CASES)], id=f"{method}.{i}", method=method) for i in range(n))


def test_a_program_that_fails_three_times_in_a_row_on_a_method_is_asked_the_next_method() -> None:
    program = port("dies", "ia3.")
    program.start()
    replies = [program.ask(case) for case in (*many("ia3", 6), *many("loha", 3))]
    program.close()
    assert all(isinstance(r, Failed) for r in replies[:6])
    assert ["not asked" in r.reason for r in replies[:6] if isinstance(r, Failed)] == [False] * GIVE_UP_METHOD + [True] * 3
    assert all(isinstance(r, Answered) for r in replies[6:])


def test_a_program_that_always_dies_is_given_up() -> None:
    program = port("dies", "always")
    program.start()
    replies = [program.ask(case) for name in ("ia3", "loha", "lora", "dora") for case in many(name, 4)]
    program.close()
    reasons = [r.reason for r in replies if isinstance(r, Failed)]
    assert len(reasons) == 16
    assert sum("not asked" not in reason for reason in reasons) == GIVE_UP_PORT
    assert all(f"failed {GIVE_UP_PORT} times in a row" in reason for reason in reasons[12:])


def test_a_program_that_fails_every_other_time_is_never_given_up() -> None:
    program = port("dies", "ia3.")
    program.start()
    replies = [program.ask(case) for pair in zip(many("ia3", 5), many("loha", 5), strict=True) for case in pair]
    program.close()
    assert [isinstance(r, Answered) for r in replies] == [False, True] * 5
    assert not any("not asked" in r.reason for r in replies if isinstance(r, Failed))


# ---- what it leaves behind


def test_a_child_that_left_the_session_keeps_no_one_waiting() -> None:
    began = time.monotonic()
    assert {v.status for v in judged("detached-child").verdicts} == {"right"}
    assert time.monotonic() - began < PATIENCE / 2


def test_a_program_that_ignores_stop_is_killed() -> None:
    program = port("ignores-stop")
    program.start()
    began = time.monotonic()
    program.close()
    assert time.monotonic() - began < 4
    assert processes() == []


def test_closing_twice_or_before_the_start_is_fine() -> None:
    program = port("behaves")
    program.close()
    program.start()
    program.close()
    program.close()


def test_an_interrupted_judgement_leaves_no_process() -> None:
    def interrupt(n: int, total: int, text: str) -> None:
        if n == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(port("behaves"), CASES, progress=interrupt)
    assert processes() == []
