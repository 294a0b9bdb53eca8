"""`peft-ref check`: judge a backend, a program or a file of answers."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_ref.check.case import OPERATIONS, Case
from peft_ref.check.port import Port
from peft_ref.check.result import Report
from peft_ref.check.tolerance import PRECISION
from peft_ref.errors import ConfigError
from peft_ref.methods import METHODS

EXAMPLES = """
examples:
  peft-ref check                                         our mathematics on NumPy in float32
  peft-ref check --backend jax --dtype float64           another backend
  peft-ref check -- node spec/ports/javascript/lora.mjs  any program that speaks spec/protocol.md
  peft-ref check --answers answers.json                  answers to exported cases (peft-ref cases export DIR)
  peft-ref check --html verdict.html -- ./my_port        and a page to look at

exit codes: 0 everything asked is right, 1 something is wrong, 2 the port or the call is broken
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "check",
        help="judge a backend, a program or a file of answers",
        description="Ask a port every case, say what is right and what is wrong, and name the mistake.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="peft-ref check [options] [-- PROGRAM ...]",
    )
    parser.add_argument("--backend", metavar="NAME", help="a backend by name, or module:Class (default: numpy)")
    parser.add_argument(
        "--dtype",
        choices=sorted(PRECISION),
        metavar="DTYPE",
        help="what a backend computes in: float64, float32, float16, bfloat16 (default: float32)",
    )
    parser.add_argument("--answers", type=Path, metavar="FILE", help="judge a file of answers instead of a process")
    parser.add_argument("--method", action="append", choices=sorted(METHODS), help="only this method; may be repeated")
    parser.add_argument("--operation", action="append", choices=OPERATIONS, help="only this operation; may be repeated")
    parser.add_argument("--case", metavar="TEXT", help="only cases whose id contains TEXT")
    parser.add_argument("--timeout", type=_seconds, default=10.0, metavar="S", help="seconds a program has for one answer (default: 10)")
    parser.add_argument("--validate", action="store_true", help="check every message of the program against the protocol's schema")
    parser.add_argument("--no-search", action="store_true", help="do not look for the smallest counterexample")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="the report as JSON, to FILE or standard output")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="the report as JUnit XML")
    parser.add_argument("--html", type=Path, metavar="FILE", help="the report as one self-contained page")
    parser.add_argument("--verbose", "-v", action="store_true", help="list every case, not only what is not right")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, program: Sequence[str]) -> int:
    from peft_ref.check.judge import judge
    from peft_ref.report import junit, terminal

    cases = _selected(options)
    for path in (options.junit, options.html, options.json if options.json != "-" else None):
        check_writable(path)
    progress = terminal.progress(sys.stderr)
    report = judge(_port(options, program), cases, progress=progress.step, search=not options.no_search)
    progress.done()
    if options.junit is not None:
        options.junit.write_text(junit.render(report), encoding="utf-8")
    return told(report, options)


def told(report: Report, options: argparse.Namespace) -> int:
    """The report in the forms that were asked for; returns the exit code."""
    from peft_ref.report import html, terminal

    if options.html is not None:
        options.html.write_text(html.render(report), encoding="utf-8")
    if options.json is not None:
        text = json.dumps(report.to_json(), indent=2)
        if options.json == "-":
            print(text)
            return report.exit_code
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    terminal.write(terminal.render(report, verbose=options.verbose, color=sys.stdout.isatty()), sys.stdout)
    return report.exit_code


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above zero")
    return value


def check_writable(path: Path | str | None) -> None:
    """Said before the port is asked, which may take minutes."""
    if path is None:
        return
    place = Path(path) if Path(path).exists() else Path(path).absolute().parent
    if Path(path).is_dir() or not place.exists() or not os.access(place, os.W_OK):
        raise ConfigError(f"{path}: cannot be written. Name a file in a folder that is there and yours.")


def _selected(options: argparse.Namespace) -> tuple[Case, ...]:
    from peft_ref.check.corpus import corpus
    from peft_ref.check.mistakes import SUITES

    for problem in SUITES.discover():
        print(f"peft-ref: left out: {problem}", file=sys.stderr)
    cases = tuple(
        c
        for c in corpus()
        if (not options.method or c.method in options.method)
        and (not options.operation or c.operation in options.operation)
        and (not options.case or options.case in c.id)
    )
    if not cases:
        raise ConfigError("no case is left to be asked: --method, --operation and --case exclude each other.")
    return cases


def _port(options: argparse.Namespace, program: Sequence[str]) -> Port:
    from peft_ref.backend import get_backend
    from peft_ref.check.answers import AnswersPort
    from peft_ref.check.port import BackendPort
    from peft_ref.check.program import ProgramPort

    chosen = [name for name, given in (("--backend", options.backend), ("--answers", options.answers), ("-- PROGRAM", program)) if given]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)}: only one port can be judged at a time.")
    if options.dtype and (program or options.answers is not None):
        raise ConfigError("--dtype is for --backend: a program or a file of answers says its own.")
    if program:
        return ProgramPort(program, timeout=options.timeout, validate=options.validate)
    if options.answers is not None:
        return AnswersPort(options.answers, validate=options.validate)
    return BackendPort(get_backend(options.backend or "numpy"), options.dtype or "float32")
