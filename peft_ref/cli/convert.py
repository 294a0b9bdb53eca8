"""`peft-ref convert`: an adapter of any method that changes weights as a LoRA adapter, which PEFT and everything else loads."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_ref.errors import ConfigError, naming

if TYPE_CHECKING:
    from peft_ref.files.adapter import AdapterFile
    from peft_ref.model.converting import Conversion

EXAMPLES = """
examples:
  peft-ref convert my-loha my-lora --rank 16             the nearest LoRA of rank 16, and what it loses
  peft-ref convert my-dora my-lora --energy 0.99 --model my-llama    as many ranks in every module as hold 99 % of its delta's energy
  peft-ref convert my-adalora my-lora                    nothing is lost: every module keeps the rank that its delta has
  peft-ref convert my-pissa my-lora --initial my-start   from an init that changed the weight, back to the weight as it was

A method whose delta depends on the frozen weight (DoRA, IA3, OFT ...) needs --model.

exit codes: 0 done, 2 the call or a file makes no sense, or the adapter cannot be a LoRA
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "convert",
        help="make a LoRA adapter of any adapter that changes weights",
        description="Write an adapter folder as a LoRA adapter folder, and say what is lost.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="the folder of the adapter")
    parser.add_argument("out", type=Path, metavar="OUT", help="where the LoRA goes: both of its files, or none")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--rank", type=int, metavar="N", help="the largest rank of a module")
    how.add_argument("--energy", type=float, metavar="X", help="the share of each delta's squared norm that is kept, from 0 to 1")
    how.add_argument("--initial", type=Path, metavar="FOLDER", help="a pissa, olora, corda or lora_ga adapter before training, to undo")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="the frozen model as HF's save_pretrained writes it")
    parser.add_argument("--json", action="store_true", help="rank and loss of every module as JSON on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, program: Sequence[str]) -> int:
    from peft_ref.files.adapter import load_adapter, save_adapter
    from peft_ref.model.converting import Conversion, check_finite, plain

    if options.out.resolve() == options.adapter.resolve():
        raise ConfigError(f"{options.out}: the adapter itself would be overwritten.\n  Name another folder.")
    source = load_adapter(options.adapter)
    with naming(options.adapter):
        check_finite(source)
        if options.initial is not None:
            file = plain(source, load_adapter(options.initial))
            made = Conversion(file, dict.fromkeys(file.modules, 0.0))
        else:
            made = _converted(source, options)
    place = save_adapter(options.out, made.file)
    ranks = {name: int(found.params.A.shape[0]) for name, found in made.file.modules.items()}
    if options.json:
        rows = {name: {"rank": ranks[name], "lost": made.lost[name]} for name in ranks}
        print(json.dumps({"adapter": str(place), "lost": max(made.lost.values()), "modules": rows}))
    else:
        from peft_ref.report import terminal

        terminal.write(_table(ranks, made.lost) + f"\nLoRA in {place}", sys.stdout)
    return 0


def _converted(source: AdapterFile, options: argparse.Namespace) -> Conversion:
    from peft_ref.graph import under_live_names
    from peft_ref.model import adapt, load
    from peft_ref.model.converting import as_lora, check_on_its_weight, converted

    if options.model is None:
        return converted(source, rank=options.rank, energy=options.energy)
    check_on_its_weight(source.config)
    model = load(adapt(under_live_names(options.model, source.modules)), options.adapter)
    return as_lora(model, next(iter(model.adapters)), rank=options.rank, energy=options.energy)


def _table(ranks: Mapping[str, int], lost: Mapping[str, float]) -> str:
    width = max(len(name) for name in (*ranks, "module"))
    rows = [f"{name:{width}}  {rank:5}  {lost[name]:8.2%}" for name, rank in ranks.items()]
    return "\n".join([f"{'module':{width}}  {'rank':>5}  {'lost':>8}", *rows])
