"""`peft-ref cases`: list the cases, or write them to a folder to be answered anywhere."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_ref.errors import ConfigError
from peft_ref.methods import METHODS

EXAMPLES = """
examples:
  peft-ref cases list --method dora
  peft-ref cases export cases/          one JSON file per method: the cases, and the right answers beside them
  peft-ref check --answers answers.json then judges what was answered
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "cases",
        help="list or export the cases",
        description="The cases that a port is asked.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("list", "export"))
    parser.add_argument("folder", nargs="?", type=Path, help="where export writes")
    parser.add_argument("--method", action="append", choices=sorted(METHODS), help="only this method; may be repeated")
    parser.add_argument("--json", action="store_true", help="list as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, program: Sequence[str]) -> int:
    from peft_ref.check.corpus import corpus
    from peft_ref.check.export import export

    if options.action == "export":
        if options.folder is None:
            raise ConfigError("cases export: name the folder to write to.")
        written = export(options.folder, options.method or sorted(METHODS))
        print("\n".join(f"{path}  {count} cases" for path, count in written))
        return 0
    cases = [c for c in corpus() if not options.method or c.method in options.method]
    if options.json:
        print(json.dumps([{"id": c.id, "method": c.method, "operation": c.operation, "clause": c.clause} for c in cases], indent=1))
    else:
        print("\n".join(f"{c.id:60} {c.clause}" for c in cases))
    return 0
