"""`peft-ref ranks`: how AdaLoRA's allocator shares out the ranks over a training, as a table, a picture or JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_ref.cli.check import check_writable
from peft_ref.errors import ConfigError
from peft_ref.reading.documents import read_value

EXAMPLES = """
examples:
  peft-ref ranks --svg ranks.svg                         a small training with a schedule of its own
  peft-ref ranks --init-r 8 --target-r 2 --tinit 30 --tfinal 80 --deltaT 10 --total-step 300 --svg ranks.svg
  peft-ref ranks --learn 6 1 3 --seed 4                  three modules, and the rank of what each has to learn
  peft-ref ranks --trace trace.json --json               a training from elsewhere: what spec/protocol.md asks of `allocate`

exit codes: 0 done, 2 the schedule, the trace or the call makes no sense
"""
SCHEDULE: dict[str, tuple[type, Any]] = {
    "init_r": (int, 6),
    "target_r": (int, 3),
    "tinit": (int, 30),
    "tfinal": (int, 80),
    "deltaT": (int, 10),
    "total_step": (int, 300),
    "beta1": (float, 0.85),
    "beta2": (float, 0.85),
    "orth_reg_weight": (float, 0.1),
}
LEARN, SEED = (5, 1, 4, 2), 0


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "ranks",
        help="draw how AdaLoRA's allocator shares out the ranks",
        description="AdaLoRA's allocator over a small training of its own, or over a trace: the ranks of the modules and the budget.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, (kind, default) in SCHEDULE.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(
            option, dest=name, type=kind, metavar="N" if kind is int else "X", help=f"AdaLoRA's {name} (default: {default})"
        )
    parser.add_argument("--learn", type=int, nargs="+", metavar="RANK", help="one module for each: the rank of what it has to learn")
    parser.add_argument("--seed", type=int, metavar="N", help=f"of the training's numbers (default: {SEED})")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a trace instead, as JSON: adapter_config and steps")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="the picture")
    parser.add_argument("--json", action="store_true", help="budget and ranks of every step as JSON, instead of the table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, program: Sequence[str]) -> int:
    from peft_ref.report import ranks, ranks_svg, terminal

    check_writable(options.svg)
    history = ranks.followed(_trace(options)) if options.trace is not None else _trained(options)
    if options.svg is not None:
        options.svg.write_text(ranks_svg.svg(history), encoding="utf-8")
    if options.json:
        print(json.dumps(history.to_json()))
    else:
        terminal.write(ranks.table(history), sys.stdout)
    return 0


def _trained(options: argparse.Namespace) -> Any:
    from peft_ref.methods.adalora import AdaLoRA
    from peft_ref.report.ranks import trained

    given = {name: default if getattr(options, name) is None else getattr(options, name) for name, (_, default) in SCHEDULE.items()}
    return trained(AdaLoRA(**given), options.learn or LEARN, SEED if options.seed is None else options.seed)


def _trace(options: argparse.Namespace) -> Any:
    own = [name for name in (*SCHEDULE, "learn", "seed") if getattr(options, name) is not None]
    if own:
        raise ConfigError(f"--{own[0].replace('_', '-')} is for a training of our own: a trace brings its schedule with it.")
    return read_value(options.trace)
