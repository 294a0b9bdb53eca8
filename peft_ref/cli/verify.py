"""`peft-ref verify`: whether a checkpoint is a base with these adapters merged, and if not, which mistake was made."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """
examples:
  peft-ref verify my-llama my-lora merged                    is this merge right, and if not, which mistake is it?
  peft-ref verify my-llama my-lora merged --html page.html   and a page to look at
  peft-ref verify my-llama one two merged --weights 0.7,0.3  of several adapters, in this order, each times its weight
  peft-ref verify my-llama my-lora merged --verbose          every tensor, with how far off its worst element is

Who merged does not matter, nor in which of PEFT's ways it was rounded: a tensor is right if it is the exact result up to one
merge's rounding.

exit codes: 0 everything is right, 1 something is wrong, 2 the call or a file makes no sense, or no change could be seen
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "verify",
        help="say whether a merged checkpoint is right, and which mistake was made",
        description="Compare a merged checkpoint, tensor by tensor, with its base and what the adapters do to it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="peft-ref verify [options] BASE ADAPTER [ADAPTER ...] MERGED",
    )
    parser.add_argument("base", type=Path, metavar="BASE", help="the folder of the checkpoint before the merge")
    parser.add_argument("adapters", type=Path, nargs="+", metavar="ADAPTER", help="folders of adapters, in the order they were merged in")
    parser.add_argument("merged", type=Path, metavar="MERGED", help="the folder of the checkpoint after it")
    parser.add_argument("--weights", metavar="W,W", help="one for each adapter, with commas between them (default: 1 for each)")
    parser.add_argument(
        "--ties",
        choices=("share", "untie"),
        default="share",
        help="of a tied weight that changes: share (both names changed, as PEFT's merge does; the default) or untie (each has its own)",
    )
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="the report as JSON, to FILE or standard output")
    parser.add_argument("--html", type=Path, metavar="FILE", help="the report as one self-contained page")
    parser.add_argument("--verbose", "-v", action="store_true", help="list every tensor, not only what is not right")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, program: Sequence[str]) -> int:
    from peft_ref.checkpoints.plan import Source
    from peft_ref.checkpoints.planning import plan
    from peft_ref.checkpoints.verifying import verify
    from peft_ref.cli.check import check_writable, told
    from peft_ref.cli.merge import read_weights
    from peft_ref.report import terminal

    for path in (options.html, options.json if options.json != "-" else None):
        check_writable(path)
    weights = read_weights(options.weights, options.adapters)
    sources = [Source(folder, weight) for folder, weight in zip(options.adapters, weights, strict=True)]
    progress = terminal.progress(sys.stderr)
    report = verify(plan(options.base, sources, ties=options.ties), options.merged, progress.step)
    progress.done()
    return told(report, options)
