"""`peft-ref`: one small module per verb. Exit codes: 0 all right, 1 wrong, 2 the call or the port is broken."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from peft_ref.errors import PeftRefError

VERBS = ("check", "cases", "ranks", "train", "convert", "merge")  # only the one that is asked for is imported: `merge` counts every MB
ONE_THREAD = ("merge",)  # those that bring threads of their own: BLAS is told before NumPy is loaded


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from peft_ref import __version__

    arguments = list(sys.argv[1:] if argv is None else argv)
    given, program = _split(arguments)
    named = given[0] if given else ""
    if argv is None and named in ONE_THREAD:
        from peft_ref.checkpoints.blas import quiet

        quiet()
    modules = [import_module(f"peft_ref.cli.{verb}") for verb in ([named] if named in VERBS else VERBS)]
    from peft_ref.methods import METHODS

    for problem in METHODS.discover():
        print(f"peft-ref: left out: {problem}", file=sys.stderr)
    parser = argparse.ArgumentParser(
        prog="peft-ref",
        description="The reference of parameter-efficient fine-tuning methods, and a judge of implementations.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"peft-ref {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for module in modules:
        module.add_parser(verbs)
    options = parser.parse_args(given)
    if given != arguments and not program:
        parser.error('"--" is followed by no program')
    try:
        return int(options.run(options, program))
    except PeftRefError as error:
        print(f"peft-ref {options.verb}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        return 2
    except OSError as error:  # a file or folder that cannot be read or written
        print(f"peft-ref {options.verb}: {error}", file=sys.stderr)
        return 2


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What comes before "--", and the program after it."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]
