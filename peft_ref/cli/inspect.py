"""`peft-ref inspect`: what an adapter folder holds, whether it fits a base, and what other programs make of it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_ref.cli.check import check_writable
from peft_ref.errors import ConfigError

if TYPE_CHECKING:
    from peft_ref.checkpoints.spectrum import Measured
    from peft_ref.report.inspecting import Told

EXAMPLES = """
examples:
  peft-ref inspect my-adapter                            method, modules, ranks, scales and where they come from; no tensor is read
  peft-ref inspect my-llama my-adapter                   the same, and whether it is an adapter for that model
  peft-ref inspect my-llama                              a checkpoint's tensors, dtypes, files and sizes
  peft-ref inspect my-adapter --numbers                  norms, NaNs, what was not trained; with a base, |delta| over |W|
  peft-ref inspect my-adapter --spectrum --svg it.svg    the singular values of every delta, as bars and as a picture
  peft-ref inspect my-adapter --for vllm --for llama.cpp     what would not load there, or compute something else, and why
  peft-ref inspect my-llama my-adapter --json | jq .findings

exit codes: 0 fine, 1 something is wrong (with the adapter, with its base, or elsewhere with --for), 2 the call or a file makes no sense
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "inspect",
        help="say what an adapter folder holds and whether it is right",
        description="Look into an adapter folder, or a checkpoint. Headers and configurations are read, tensors only where asked for.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="ADAPTER, or BASE ADAPTER, or BASE")
    parser.add_argument("--numbers", action="store_true", help="read the tensors: norms, NaNs, what was not trained")
    parser.add_argument("--spectrum", action="store_true", help="the singular values of every delta too")
    parser.add_argument(
        "--for", dest="programs", action="append", metavar="PROGRAM", help="vllm, llama.cpp or mlx; may be given several times"
    )
    parser.add_argument("--each", action="store_true", help="a row for every module, not one for those that are alike")
    parser.add_argument("--json", action="store_true", help="everything as JSON on standard output")
    parser.add_argument("--html", type=Path, metavar="FILE", help="everything as one page")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="the singular values as a picture")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, program: Sequence[str]) -> int:
    from peft_ref.checkpoints.inspecting_base import is_base
    from peft_ref.files.adapter import adapter_names

    if len(options.folders) > 2:
        raise ConfigError(f"{len(options.folders)} folders: give an adapter, or a base and its adapter.")
    for path in (options.html, options.svg):
        check_writable(path)
    if missing := next((folder for folder in options.folders if not folder.is_dir()), None):
        raise ConfigError(f"{missing} is no folder.\n  Give the one with adapter_config.json, or with model.safetensors.")
    adapter = options.folders[-1]
    if "default" not in adapter_names(adapter):
        if len(options.folders) == 1 and is_base(adapter):
            return _base(options)
        _refuse(options, adapter)
    return _adapter(options, adapter, options.folders[0] if len(options.folders) == 2 else None)


def _refuse(options: argparse.Namespace, folder: Path) -> None:
    from peft_ref.files.adapter import CONFIG, adapter_names

    if len(options.folders) == 2 and "default" in adapter_names(options.folders[0]):
        raise ConfigError(f"{folder} has no {CONFIG}, and {options.folders[0]} has.\n  The base comes first.")
    if below := adapter_names(folder):
        raise ConfigError(
            f"{folder} has no {CONFIG}, and there are adapters below.\n  Give one of {', '.join(str(folder / n) for n in below)}."
        )
    raise ConfigError(f"{folder} has no {CONFIG} and no model.safetensors.\n  Give the folder that `save_pretrained` wrote.")


def _adapter(options: argparse.Namespace, folder: Path, base: Path | None) -> int:
    from peft_ref.checkpoints.elsewhere import verdicts
    from peft_ref.checkpoints.fitting import fitted
    from peft_ref.checkpoints.inspecting import inspect
    from peft_ref.graph import CheckpointGraph
    from peft_ref.report.inspecting import Told, to_json

    inspection = inspect(folder)
    programs: list[str] = list(dict.fromkeys(options.programs or ()))
    elsewhere = {name: verdicts(inspection, name) for name in programs}
    fit = None if base is None else fitted(inspection, CheckpointGraph(base))
    told = Told(inspection=inspection, fit=fit, measured=_measured(options, inspection, fit), elsewhere=elsewhere)
    _write(options, told)
    if options.json:
        print(json.dumps(to_json(told), allow_nan=False))
    else:
        from peft_ref.report import inspect_text, terminal

        terminal.write(inspect_text.render(told, options.each, sys.stdout.isatty()), sys.stdout)
    return int(told.bad)


def _measured(options: argparse.Namespace, inspection: Any, fit: Any) -> Measured | None:
    spectrum = options.spectrum or options.svg is not None
    if not (options.numbers or spectrum):
        return None
    from peft_ref.checkpoints.spectrum import measured
    from peft_ref.report.terminal import progress

    line = progress(sys.stderr)
    try:
        return measured(inspection, fit, spectrum=spectrum, step=line.step)
    finally:
        line.done()


def _write(options: argparse.Namespace, told: Told) -> None:
    if options.svg is not None:
        from peft_ref.report.spectrum_svg import svg

        assert told.measured is not None
        name = f"{told.inspection.method} in {told.inspection.folder.resolve().name}"
        options.svg.write_text(svg(told.measured.deltas, subtitle=name), encoding="utf-8")
    if options.html is not None:
        from peft_ref.report import inspect_html

        options.html.write_text(inspect_html.render(told, options.each), encoding="utf-8")


def _base(options: argparse.Namespace) -> int:
    from peft_ref.checkpoints.inspecting_base import inspect_base
    from peft_ref.report import inspect_text, terminal
    from peft_ref.report.inspecting import base_json

    asked = {
        "--numbers": options.numbers,
        "--spectrum": options.spectrum,
        "--for": options.programs,
        "--svg": options.svg,
        "--html": options.html,
    }
    if given := [name for name, value in asked.items() if value]:
        raise ConfigError(f"{given[0]} is asked of an adapter, and {options.folders[0]} is a checkpoint.\n  Give its adapter too.")
    base = inspect_base(options.folders[0])
    if options.json:
        print(json.dumps(base_json(base)))
    else:
        terminal.write(inspect_text.render_base(base, sys.stdout.isatty()), sys.stdout)
    return int(any(finding.level == "wrong" for finding in base.findings))
