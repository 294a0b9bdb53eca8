"""The report as text for a terminal of 100 columns, and the line that shows how far the judge is."""

from __future__ import annotations

import shutil
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TextIO, final

from peft_ref.check.result import ASKED, STATUSES, Diagnosis, Report
from peft_ref.errors import clean
from peft_ref.report import (
    Group,
    about,
    closeness,
    distance,
    element,
    headline,
    hidden,
    one_line,
    operations,
    page,
    port_name,
    reasons,
    tally,
    title,
    undiagnosed,
)

WIDTH = 100
MARKS = {"wrong": "✗", "error": "!", "dialect": "~", "undecidable": "?"}  # the first that occurs marks a cell
LEGEND = {"✗": "wrong", "!": "no usable answer", "~": "dialect", "?": "undecidable"}
COLOURS = {"bad": "31", "good": "32", "doubtful": "33", "dim": "2", "bold": "1"}
STATUS_COLOURS = {"wrong": "bad", "error": "bad", "dialect": "doubtful", "undecidable": "doubtful", "right": "good"}
SHOWN = 4  # of a long list


def render(report: Report, verbose: bool = False, color: bool = False) -> str:
    """The whole report; its last line is the verdict."""
    paint = Paint(color)
    how, word, sentence = headline(report)
    parts = [_head(report, paint)]
    if report.broken:
        parts.append(_folded(clean(report.broken), "  "))
    if report.verdicts:
        parts += [_table(report, paint), _totals(report, paint)]
    parts += [_diagnosis(d, paint) for d in sorted(report.diagnoses, key=lambda d: d.dialect)]
    parts += [_texts(report, paint), _errors(report, paint), _hidden(report)]
    if verbose:
        parts.append(_every(report, paint))
    parts.append(f"{paint(word.upper(), how, 'bold')}  {sentence}")
    return "\n\n".join(part for part in parts if part)


@final
class Paint:
    """Colours, or none."""

    def __init__(self, on: bool) -> None:
        self._on = on

    def __call__(self, text: str, *styles: str) -> str:
        codes = ";".join(COLOURS[s] for s in styles)
        return f"\x1b[{codes}m{text}\x1b[0m" if self._on and text else text


def _head(report: Report, paint: Paint) -> str:
    who, details = textwrap.shorten(port_name(report), 50, placeholder=" ..."), textwrap.shorten(about(report), 30, placeholder=" ...")
    right = f"{len(report.verdicts)} {report.thing}s in {report.seconds:.1f} s"
    left = f"{who}  ({details})" if details else who
    return f"{paint(who, 'bold')}{left[len(who) :]}{right:>{max(WIDTH - len(left), len(right) + 2)}}"


# ---- the table


def _table(report: Report, paint: Paint) -> str:
    counts, columns = tally(report.verdicts), operations(report.verdicts)
    methods = list(dict.fromkeys(v.method for v in report.verdicts))
    shown = [m for m in methods if any(counts.get((m, o), Counter())[s] for o in columns for s in (*ASKED, "skipped"))]
    first = max((len(m) for m in shown), default=0) + 2
    wide = [max(len(o), *(len(_cell(counts.get((m, o)))) for m in shown), 5) + 2 for o in columns] if shown else []
    lines = ["  " + " " * first + "".join(f"{o:<{w}}" for o, w in zip(columns, wide, strict=True)).rstrip()] if shown else []
    for method in shown:
        cells = []
        for operation, width in zip(columns, wide, strict=True):
            count = counts.get((method, operation))
            cells.append(paint(_cell(count), _cell_colour(count)) + " " * (width - len(_cell(count))))
        lines.append(f"  {method:<{first}}" + "".join(cells).rstrip())
    if rest := [m for m in methods if m not in shown]:
        lines.append(_folded(f"not asked: {', '.join(rest)}", "  "))
    used = [mark for mark in LEGEND if any(_cell(c).startswith(mark) for c in counts.values())]
    legend = "   ".join(f"{mark} {LEGEND[mark]}" for mark in used)
    return "\n".join([*lines, paint(f"\n  right/asked   {legend}".rstrip(), "dim")])


def _cell(count: Counter[str] | None) -> str:
    """'✗ 3/22': three of 22 that were asked are right, and some are wrong."""
    if not count:
        return ""
    asked = sum(count[s] for s in ASKED)
    if not asked:
        return "skipped" if count["skipped"] else "-"
    mark = next((f"{MARKS[s]} " for s in MARKS if count[s]), "")
    return f"{mark}{count['right']}/{asked}"


def _cell_colour(count: Counter[str] | None) -> str:
    return next((STATUS_COLOURS[s] for s in (*MARKS, "right") if count and count[s]), "dim")


# ---- the totals


def _totals(report: Report, paint: Paint) -> str:
    n = report.counts
    executed = sum(n[s] for s in ("right", "wrong", "dialect", "undecidable"))
    kinds = ", ".join(f"{n[s]} {s if s != 'dialect' else 'in a dialect'}" for s in ("right", "wrong", "dialect", "undecidable") if n[s])
    lines = [_row("executed", executed, kinds if executed else "NOTHING WAS EXECUTED", paint if executed else Paint(False))]
    if n["error"]:
        lines.append(_row("errors", n["error"], "the port gave no usable answer", paint))
    for status in ("undecidable", "skipped", "not asked"):
        if n[status]:
            lines.append(_row(status, n[status], _listed([f"{g.reason} ({len(g.cases)})" for g in reasons(report, status)]), paint))
    close = closeness(report)
    if close.exact + close.within:
        lines.append(_row("exact", close.exact, "right to the bit, where nothing may round", paint))
    if close.worst is not None and close.worst.worst is not None:
        text = f"right within tolerance, at most {close.worst.worst.ratio:.2g} of it ({clean(close.worst.case)})"
        lines.append(_row("close", close.within, text, paint))
    return "\n".join(lines)


def _row(label: str, n: int, text: str, paint: Paint) -> str:
    lines = textwrap.wrap(text, WIDTH - 22, break_on_hyphens=False) or [""]  # an id is copied whole
    return "\n".join([f"  {label:<12}{n:>5}   {lines[0]}".rstrip(), *(" " * 22 + line for line in lines[1:])])


# ---- what is wrong


def _diagnosis(d: Diagnosis, paint: Paint) -> str:
    mark, style = (MARKS["dialect"], "doubtful") if d.dialect else (MARKS["wrong"], "bad")
    lines = [paint(f"{mark} {d.method}: {title(d)}", style, "bold"), _folded(clean(d.text), "  ")]
    where = f"{', '.join(d.operations)} on {', '.join(d.layers)}" if d.layers else ", ".join(d.operations)
    facts = [("where", f"{where} ({len(d.cases)} case{'s' if len(d.cases) > 1 else ''})")]
    if d.clause:
        facts.append(("clause", f"{d.clause}, in {page(d.method)}"))
    if d.worst is not None:
        got, want = d.worst.texts
        facts.append(("worst", f"{element(d.worst)}: got {got}, want {want} ({distance(d.worst)})"))
    if d.counterexample is not None:
        facts.append(("smallest", one_line(d.counterexample)))
    facts += [("" if n else "seen before", link) for n, link in enumerate(d.links)]
    return "\n".join([*lines, *(_fact(label, text) for label, text in facts)])


def _fact(label: str, text: str) -> str:
    return _folded(clean(text), f"    {label:<13}", " " * 17)


def _texts(report: Report, paint: Paint) -> str:
    """Wrong names, keys and fresh adapters: a reason each, no numbers."""
    parts: list[str] = []
    groups = undiagnosed(report)
    for where in dict.fromkeys((g.method, g.operation) for g in groups):
        members = [g for g in groups if (g.method, g.operation) == where]
        n = sum(len(g.cases) for g in members)
        parts.append(paint(f"{MARKS['wrong']} {where[0]}: {where[1]}, {n} case{'s' if n > 1 else ''}", "bad", "bold"))
        parts += [_reason(g) for g in members]
    return "\n".join(parts)


def _errors(report: Report, paint: Paint) -> str:
    groups = reasons(report, "error")
    if not groups:
        return ""
    lines = [paint(f"{MARKS['error']} no usable answer, {report.counts['error']} cases", "bad", "bold"), *(_reason(g) for g in groups[:12])]
    if len(groups) > 12:
        lines.append(f"  and {len(groups) - 12} more reasons (--verbose lists every case)")
    return "\n".join(lines)


def _reason(group: Group) -> str:
    lines = group.reason.splitlines() or [""]
    text = [_folded(lines[0], "  ")] + [line[: WIDTH - 4] for line in lines[1:7]] + (["    ..."] if len(lines) > 7 else [])
    return "\n".join([*text, _folded(f"{len(group.cases)}x  {_listed(group.cases)}", "      ")])


def _hidden(report: Report) -> str:
    mistakes = hidden(report)
    if not mistakes:
        return ""
    line = f"In {report.port.dtype} the cases that are right would not have shown these mistakes:"
    return "\n".join([line, *(_fact(method, ", ".join(names)) for method, names in mistakes.items())])


def _every(report: Report, paint: Paint) -> str:
    """Every case that was put to the port; what was not asked is summed up in the totals."""
    lines = []
    for v in sorted((v for v in report.verdicts if v.status != "not asked"), key=lambda v: STATUSES.index(v.status)):
        ratio = f"{v.worst.ratio:.2g} x tolerance" if v.worst is not None and v.status == "right" and not v.exact else ""
        told = clean(v.reason).splitlines()[0] if v.reason else "bits equal" if v.status == "right" and v.exact else ratio
        status = paint(f"{v.status:<12}", STATUS_COLOURS.get(v.status, "dim"))
        lines.append(f"  {status}{clean(v.case):<44}  {textwrap.shorten(told, 120, placeholder=' ...')}".rstrip())
    return "\n".join(lines)


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return clean(", ".join(items[:SHOWN]) + more)


def _folded(text: str, indent: str, rest: str | None = None) -> str:
    hanging = rest if rest is not None else " " * len(indent)
    return "\n".join(_wrapped(text.splitlines(), indent, hanging))


def _wrapped(lines: Iterable[str], indent: str, hanging: str) -> Iterator[str]:
    for n, line in enumerate(lines):
        first = indent if n == 0 else hanging
        yield from textwrap.wrap(line, WIDTH, initial_indent=first, subsequent_indent=hanging, break_on_hyphens=False) or [first.rstrip()]


# ---- while the judge is at work


class Progress(Protocol):
    def step(self, n: int, total: int, text: str) -> None:
        """`n` of `total` are done; `text` comes now."""

    def done(self) -> None: ...


def progress(stream: TextIO) -> Progress:
    """One line that is written again and again on a terminal; elsewhere a line every quarter of a minute."""
    return Line(stream) if stream.isatty() else Sparse(stream)


@final
class Line:
    def __init__(self, stream: TextIO, clock: float = 0.1) -> None:
        self._stream, self._every = stream, clock
        self._began, self._shown = time.monotonic(), 0.0

    def step(self, n: int, total: int, text: str) -> None:
        now = time.monotonic()
        if now - self._shown < self._every and n < total:
            return
        self._shown = now
        line = f"{n}/{total}{_time_left(now - self._began, n, total)}  {clean(text)}"
        self._stream.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
        self._stream.flush()

    def done(self) -> None:
        self._stream.write("\r\x1b[K")
        self._stream.flush()


@final
class Sparse:
    def __init__(self, stream: TextIO, clock: float = 15.0) -> None:
        self._stream, self._every = stream, clock
        self._began = self._shown = time.monotonic()

    def step(self, n: int, total: int, text: str) -> None:
        now = time.monotonic()
        if now - self._shown >= self._every:
            self._shown = now
            self._stream.write(f"{n} of {total}{_time_left(now - self._began, n, total)}\n")
            self._stream.flush()

    def done(self) -> None:
        pass


def _time_left(seconds: float, n: int, total: int) -> str:
    """Rate and time left, once there is enough to tell."""
    if seconds < 3 or not 0 < n < total:
        return ""
    left = seconds / n * (total - n)
    return f", {n / seconds:.1f}/s, {f'{left / 60:.0f} min' if left >= 90 else f'{left:.0f} s'} left"


def write(text: str, stream: TextIO) -> None:
    """Prints whatever the stream can encode."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
