"""What a report says is what the judge found; and nothing that a port says can do more than be read."""

from __future__ import annotations

import io
import re
import time
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from math import inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ref.check.case import OPERATIONS
from peft_ref.check.result import ASKED, STATUSES, Diagnosis, PortInfo, Verdict, Worst
from peft_ref.errors import clean
from peft_ref.report import html, junit, one_line, terminal
from tests.check.reports import ALL, ALPHA, ATTRIBUTES, ELEMENTS, HOSTILE, REPORTS, SMALLEST, WRONG, Page, report, verdict

# ---- text


LAST = {
    "wrong": r"WRONG  3 of 8 cases wrong\. 1 known mistake\.",
    "right": r"RIGHT  All 2 cases that were asked\.",
    "errors": r"BROKEN  1 of 2 cases had no usable answer; 1 right, none wrong\.",
    "nothing": r"NOTHING WAS EXECUTED  1 case skipped, 1 not asked\. .*",
    "undecided": r"UNDECIDED  In float32 none of 1 answer can be told .*",
    "dialect": r"RIGHT  1 of 2 cases right, 1 in a dialect, none wrong\.",
    "broken": r"BROKEN  The port could not be judged\.",
    "no cases": r"NOTHING WAS EXECUTED  .*",
}


@pytest.mark.parametrize("which", LAST)
def test_the_last_line_is_the_verdict(which: str) -> None:
    assert re.fullmatch(LAST[which], terminal.render(REPORTS[which]).splitlines()[-1])


@ALL
def test_the_verdict_agrees_with_the_exit_code(which: str) -> None:
    word = terminal.render(REPORTS[which]).splitlines()[-1].split("  ")[0]
    codes = {"RIGHT": 0, "UNDECIDED": 2, "WRONG": 1, "BROKEN": 2, "NOTHING WAS EXECUTED": 2}
    assert codes[word] == REPORTS[which].exit_code


def test_the_totals_add_up_to_every_case() -> None:
    lines = terminal.render(WRONG).splitlines()
    rows = {m[1]: int(m[2]) for line in lines if (m := re.match(r"  (executed|errors|skipped|not asked) +(\d+) ", line))}
    assert rows == {"executed": 7, "errors": 1, "skipped": 1, "not asked": 1}
    assert sum(rows.values()) == len(WRONG.verdicts)


def test_every_cell_of_the_table_counts_right_of_asked() -> None:
    lines = terminal.render(WRONG).splitlines()
    head = next(n for n, line in enumerate(lines) if line.split()[:1] == ["forward"])
    columns = {o: lines[head].index(o) for o in lines[head].split()}
    seen = 0
    for method in ("lora", "ia3", "loha"):
        line = next(line for line in lines[head:] if line.startswith(f"  {method} "))
        for operation, at in columns.items():
            statuses = Counter(v.status for v in WRONG.verdicts if (v.method, v.operation) == (method, operation))
            asked = sum(statuses[s] for s in ASKED)
            cell = re.split(r"\s{2,}", line[at:])[0].strip()
            expected = f"{statuses['right']}/{asked}" if asked else "skipped" if statuses["skipped"] else ""
            assert cell.removeprefix(cell[: -len(expected)] if expected else "") == expected
            assert (cell[:1] == "✗") == bool(statuses["wrong"])
            seen += asked
    assert seen == 8
    assert "not asked: dora" in terminal.render(WRONG)


def test_a_diagnosis_is_told_with_all_that_is_known() -> None:
    text = " ".join(terminal.render(WRONG).split())
    for part in (
        "✗ lora: scale-is-alpha",
        ALPHA.text,
        "forward, merge on linear, conv2d (2 cases)",
        "LORA-C3, in spec/methods/lora.md",
        "y[0, 2]: got 21.5, want 8.375 (bits must match here)",
        "W=[[0]] b=[0] x=[[-41]] -> you 6, want 3 at y[0, 0]",
        "seen before https://github.com/a/b/issues/1",
    ):
        assert part in text


TITLES = {
    "lora: an unknown mistake": {"mistakes": ()},
    "lora: one of a, b": {"mistakes": ("a", "b")},
    "lora: a and b": {"mistakes": ("a", "b"), "together": True},
}


@pytest.mark.parametrize("name", TITLES)
def test_what_is_not_certain_is_not_told_as_certain(name: str) -> None:
    told = terminal.render(replace(WRONG, diagnoses=(replace(ALPHA, **TITLES[name]),)))
    assert f"✗ {name}\n" in told


@pytest.mark.parametrize(
    ("worst", "told"),
    [
        (Worst("y", (1,), 2.0, 1.0, inf), "bits must match here"),
        (Worst("y", (1,), 2.0, 1.0, 37.0), "37 times the tolerance"),
        (Worst("y", (1,), nan, 1.0, inf), "got nan, want 1 (not a finite number)"),
        (Worst("y", (1,), -inf, 1.0, inf), "got -inf, want 1 (not a finite number)"),
    ],
)
def test_the_worst_element_says_how_far_off_it_is(worst: Worst, told: str) -> None:
    assert told in terminal.render(replace(WRONG, diagnoses=(replace(ALPHA, worst=worst),)))


def test_wrong_names_have_no_diagnosis_and_show_their_reason() -> None:
    text = terminal.render(WRONG)
    assert "✗ lora: targets, 1 case\n  missing: layers.10.q_proj\n      1x  lora.x.list.targets" in text
    assert "✗ lora: forward" not in text, "what a diagnosis explains is told once"


def test_errors_that_differ_in_the_case_alone_are_one_group() -> None:
    cases = [f"lora.linear.v{i}.forward" for i in range(9)]
    errors = [verdict(c, "error", f"the reply is for case 7; {c} was asked") for c in cases]
    text = " ".join(terminal.render(report(*errors)).split())
    assert "the reply is for case 7; <case> was asked 9x lora.linear.v0.forward" in text
    assert text.count("was asked 9x") == 1


def test_mistakes_that_could_not_have_shown_are_named_but_for_those_that_did() -> None:
    text = terminal.render(replace(WRONG, undecidable={"lora": ("scale-is-alpha", "rslora-ignored"), "ia3": ()}))
    assert "would not have shown these mistakes:\n    lora         rslora-ignored\n" in text


def test_verbose_lists_every_case_that_was_asked() -> None:
    text = terminal.render(WRONG, verbose=True)
    for v in WRONG.verdicts:
        if v.status == "not asked":
            assert not re.search(rf"{re.escape(v.case)}\b", text)
            continue
        assert re.search(rf"^  {v.status} +{re.escape(v.case)}\b", text, re.M)


@ALL
def test_a_line_is_never_wider_than_the_page(which: str) -> None:
    assert max(map(len, terminal.render(REPORTS[which]).splitlines())) <= 100


@ALL
def test_colours_change_nothing_but_colours(which: str) -> None:
    coloured = terminal.render(REPORTS[which], verbose=True, color=True)
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == terminal.render(REPORTS[which], verbose=True)


def test_a_counterexample_that_is_not_small_is_told_in_short() -> None:
    case = {**SMALLEST.case, "layer": {"kind": "linear", "weight": [[0.0] * 9, [0.0] * 8 + [2.0]], "bias": None}}
    long = replace(SMALLEST, case=case, text="W=[[...]]" * 40 + " -> you 6, want 3 at y[0, 0]")
    assert one_line(long) == (
        "W=(2x9 zeros, but 2 at [1, 8]) lora_A.weight=[[0],[1]] x=[[-41]] r=2 lora_alpha=6 -> you 6, want 3 at y[0, 0]"
    )


def test_clean_text_cannot_steer_a_terminal() -> None:
    assert clean(HOSTILE).isprintable()
    assert clean("a\tb\r\nc\nd") == "a\tb\nc\nd"
    assert clean("naïve 数 → 😀") == "naïve 数 → 😀"
    assert clean("\x1b[31m") == "\\x1b[31m"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_report_can_be_written_in_any_encoding(encoding: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    terminal.write(terminal.render(WRONG), stream)
    stream.flush()
    assert b"scale-is-alpha" in raw.getvalue()


# ---- whatever a port says


texts = st.text(max_size=30) | st.sampled_from(["", HOSTILE, "<b>", "&amp;", "]]>", "\x1b]0;x\x07", "a\nb\r\nc"])
numbers = st.floats(allow_nan=True, allow_infinity=True)
worsts = st.none() | st.builds(
    Worst, texts, st.lists(st.integers(0, 9), max_size=3).map(tuple), numbers, numbers, st.just(inf) | st.floats(0)
)
verdicts = st.builds(
    Verdict,
    case=texts,
    method=st.sampled_from(["lora", "dora"]),
    operation=st.sampled_from(OPERATIONS),
    layer=st.sampled_from(["", "linear", "conv2d"]),
    clause=st.just("LORA-C3"),
    status=st.sampled_from(STATUSES),
    reason=texts,
    worst=worsts,
    exact=st.booleans(),
)
ports = st.builds(PortInfo, name=texts, dtype=st.just("float32"), language=texts, version=texts, homepage=texts)
diagnoses = st.builds(lambda worst, text: replace(ALPHA, worst=worst, text=text), worsts, texts)


@given(st.lists(verdicts, max_size=6), st.lists(diagnoses, max_size=1), ports, st.just("") | texts)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_nothing_that_a_port_says_breaks_a_report(cases: list[Verdict], causes: list[Diagnosis], port: PortInfo, broken: str) -> None:
    shown = report(*cases, diagnoses=causes, port=port, broken=broken)
    page = Page(html.render(shown))
    assert {tag for tag, _ in page.elements} <= ELEMENTS
    assert {key for _, attrs in page.elements for key in attrs} <= ATTRIBUTES
    ET.fromstring(junit.render(shown).encode("utf-8"))
    told = terminal.render(shown, verbose=True)
    assert all(c.isprintable() or c in "\n\t" or ord(c) >= 0x80 for c in told)
    told.encode("utf-8")


# ---- progress


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_one_line_that_goes_away() -> None:
    stream = Tty()
    line = terminal.progress(stream)
    line.step(0, 200, "lora.linear.plain.forward")
    line.step(200, 200, "the end\x1b[2J")
    line.done()
    assert "\n" not in stream.getvalue()
    assert "0/200  lora.linear.plain.forward" in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[K")


def test_progress_elsewhere_is_silent_when_it_is_quick() -> None:
    stream = io.StringIO()
    line = terminal.progress(stream)
    for n in range(200):
        line.step(n, 200, "x")
    line.done()
    assert stream.getvalue() == ""


def test_progress_of_a_long_run_tells_rate_and_time_left_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    line = terminal.progress(stream)
    for n in range(100):
        now[0] += 0.5
        line.step(n + 1, 100, "x")
    line.done()
    assert stream.getvalue().splitlines() == [
        "30 of 100, 2.0/s, 35 s left",
        "60 of 100, 2.0/s, 20 s left",
        "90 of 100, 2.0/s, 5 s left",
    ]
