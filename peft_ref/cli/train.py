"""`peft-ref train`: an adapter or a prompt for a causal language model, trained with nothing but NumPy."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_ref.cli.check import check_writable
from peft_ref.errors import ConfigError
from peft_ref.reading.documents import read_object

EXAMPLES = """
The options of the method are the keys of adapter_config.json: --r 8 --lora-alpha 16 --target-modules q_proj v_proj, --num-virtual-tokens 8.

examples:
  peft-ref train --tiny --data README.md --out run --method lora --r 8 --target-modules q_proj v_proj --picture loss.svg
  peft-ref train --model my-llama --data tokens.txt --ids --out run --config adapter_config.json --every 50
  peft-ref train --model my-llama --data tokens.txt --ids --out run --config adapter_config.json --every 50 --resume

It leaves an adapter in --out, which PEFT loads: PeftModel.from_pretrained(model, "run"). With --tiny the model itself is in run/base.

exit codes: 0 done, 1 the loss is finite no longer, 2 the call, a file or the configuration makes no sense, 130 interrupted
"""
INTERRUPTED = 130
LISTS = ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules")
PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "feedforward_modules", "bias")
SETTINGS: dict[str, tuple[Any, str, str]] = {  # the defaults of peft_ref.train.run.Plan, which is not imported for --help
    "steps": (100, "N", "optimiser steps"),
    "batch": (8, "N", "windows of a micro-batch"),
    "accumulate": (1, "N", "micro-batches of a step"),
    "length": (64, "N", "tokens of a window"),
    "lr": (1e-3, "X", "learning rate of AdamW"),
    "schedule": ("linear", "NAME", "constant, linear or cosine"),
    "warmup": (0, "N", "steps until the rate is reached"),
    "weight_decay": (0.0, "X", "of AdamW"),
    "clip": (1.0, "X", "the gradient's largest norm"),
    "seed": (0, "N", "of the start, of the windows and of dropout"),
}


def add_parser(verbs: Any) -> None:
    from peft_ref.methods import METHODS

    able = sorted(METHODS)
    parser = verbs.add_parser(
        "train",
        help="train an adapter on a text, with NumPy alone",
        description="Fine-tune a causal language model (Llama, GPT-2) with any method here, on the bytes or token ids of a file.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, metavar="FOLDER", help="a causal language model as HF's save_pretrained writes it")
    model.add_argument("--tiny", action="store_true", help="a tiny random Llama of bytes, made in OUT/base")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="what is trained on: its bytes are the tokens")
    parser.add_argument("--ids", action="store_true", help="the file spells token ids instead, apart by spaces, commas or lines")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the adapter goes")
    method = parser.add_mutually_exclusive_group(required=True)
    method.add_argument("--config", type=Path, metavar="FILE", help="an adapter_config.json")
    method.add_argument("--method", choices=able, metavar="NAME", help=f"or a method by name: {', '.join(able)}")
    for name, (default, metavar, what) in SETTINGS.items():
        told = f"{what} (default: {default})"
        parser.add_argument(option(name), dest=name, type=type(default), default=default, metavar=metavar, help=told)
    parser.add_argument("--every", type=int, default=0, metavar="N", help="write a checkpoint to OUT/checkpoint every N steps")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint, with the same numbers as if never stopped")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="the loss over the steps as an SVG file")
    parser.add_argument("--json", action="store_true", help="the losses and where the adapter lies as JSON on standard output")
    for name in keys():
        parser.add_argument(*dict.fromkeys((option(name), f"--{name}")), dest=f"key:{name}", nargs="+", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, program: Sequence[str]) -> int:
    from peft_ref.files.adapter import save_adapter
    from peft_ref.train import checkpoint, file_of
    from peft_ref.train.run import DivergedError, Plan
    from peft_ref.train.run import run as trained
    from peft_ref.train.session import prepared

    check_writable(options.picture)
    if options.every < 0:
        raise ConfigError(f"--every {options.every}: a number of steps, or 0 for no checkpoints.")
    plan = Plan(**{name: getattr(options, name) for name in SETTINGS})
    folder = options.out / "checkpoint"
    if not options.resume and checkpoint.exists(folder):
        raise ConfigError(f"{folder} holds a training that may be resumed.\n  Add --resume, or choose another --out, or delete it.")
    session = prepared(options.model, options.data, _config(options, plan.steps), plan, options.out, ids=options.ids)
    teller = _Teller(plan.steps, sys.stderr)
    try:
        done = trained(
            session.training,
            plan,
            session.tokens,
            tell=teller.tell,
            folder=folder,
            every=options.every,
            resume=options.resume,
            settings=session.settings,
        )
    except DivergedError as error:
        print(f"peft-ref train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        there = f"Go on with --resume from {folder}." if checkpoint.exists(folder) else "There is no checkpoint: --every N writes them."
        print(f"\npeft-ref train: interrupted. {there}", file=sys.stderr)
        return INTERRUPTED
    place = save_adapter(options.out, file_of(session.training, done.state))
    if options.picture is not None:
        from peft_ref.report import loss_svg

        options.picture.write_text(loss_svg.svg(done.losses, subtitle=session.told), encoding="utf-8")
    if options.json:
        print(json.dumps({"adapter": str(place), "steps": plan.steps, "losses": done.losses, "tokens_per_second": done.tokens_per_second}))
    else:
        print(f"{session.told}\nloss {done.losses[0]:.4f} at step 1, {done.losses[-1]:.4f} at step {plan.steps}\nadapter in {place}")
    return 0


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def keys() -> list[str]:
    """The keys of adapter_config.json that an option may set: of any method."""
    from dataclasses import fields

    from peft_ref.files.config import DERIVED
    from peft_ref.methods import METHODS

    own = {f.name for cls in METHODS.values() for f in fields(cls)}  # type: ignore[arg-type]  # every method is a dataclass
    return sorted({*own, *PLACES} - {*DERIVED, *SETTINGS})


def _config(options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """The flat configuration that was asked for."""
    from peft_ref.train.session import named_config

    given = {name: _value(name, words) for name in keys() if (words := getattr(options, f"key:{name}")) is not None}
    if options.method is not None:
        return named_config(options.method, given, steps)
    return {**read_object(options.config), **given}


def _value(name: str, words: Sequence[str]) -> Any:
    if name in LISTS:
        return words[0] if list(words) == ["all-linear"] else list(words)
    values = [_one(word) for word in words]
    return values[0] if len(values) == 1 else values


def _one(word: str) -> Any:
    """A number, true, false or null, or else a text."""
    try:
        return json.loads(word.lower() if word in ("True", "False") else word)
    except ValueError:
        return word


class _Teller:
    """Progress on a stream: one line that is written over on a terminal, elsewhere one every few seconds."""

    def __init__(self, steps: int, stream: Any) -> None:
        self.steps, self.stream, self.last = steps, stream, -1e9

    def tell(self, progress: Any) -> None:
        at_end, now = progress.step == self.steps, time.monotonic()
        live = self.stream.isatty()
        if not at_end and now - self.last < (0.1 if live else 5.0):
            return
        self.last = now
        left = int(progress.seconds_left + 0.5)
        line = (
            f"step {progress.step}/{self.steps}  loss {progress.loss:.4f}  {progress.tokens_per_second:,.0f} tokens/s"
            f"  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )
        print(f"\r{line}\033[K" if live else line, end="\n" if at_end or not live else "", file=self.stream, flush=True)
