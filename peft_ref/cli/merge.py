"""`peft-ref merge`: adapters into a checkpoint, as a stream over its files; no torch, no model, and no more memory for a larger one."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_ref.errors import ConfigError, PeftRefError

if TYPE_CHECKING:
    from peft_ref.checkpoints.engine import Merged
    from peft_ref.checkpoints.plan import Plan, Source
    from peft_ref.checkpoints.todo import Progress

EXAMPLES = """
examples:
  peft-ref merge my-llama my-lora -o merged              the same shards with the adapter in their weights, config and tokenizer beside them
  peft-ref merge my-llama my-lora -o merged --dry-run    what would be written, and nothing is
  peft-ref merge my-llama one two -o merged --weights 0.7,0.3    several adapters, in this order, each times its weight
  peft-ref merge my-llama my-lora -o merged --exact      HF PEFT's bits, whatever BLAS NumPy has; slower
  peft-ref merge my-llama my-lora -o merged --dtype float16 --max-shard-size 2GB

OUT appears whole or not at all: what is being written lies beside it, as .OUT.merge, until it is complete. A run that was killed is
continued by the same command, and the shards that it had finished are kept. Ctrl-C and errors leave nothing behind.
--overwrite replaces a checkpoint that is there, and all else in its folder, in one step at the end.

exit codes: 0 done, 1 a file, an adapter or the disk is at fault, 2 the call makes no sense, 130 interrupted
"""
INTERRUPTED = 130
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "merge",
        help="merge adapters into a checkpoint, file by file, without torch",
        description="Write a checkpoint with the effect of one or several adapters in its weights.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("base", metavar="BASE", help="the folder of the checkpoint, as save_pretrained writes it, sharded or not")
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="folders of adapters, merged in this order")
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="the folder that is to be written")
    parser.add_argument("--weights", metavar="W,W", help="one for each adapter, with commas between them (default: 1 for each)")
    parser.add_argument(
        "--rounding",
        choices=("default", "safe", "kept"),
        default="default",
        help="as PEFT rounds: default once, at the end; safe, as with safe_merge=True; kept, as with autocast_adapter_dtype=False",
    )
    parser.add_argument("--exact", action="store_true", help="the very bits that HF PEFT gets on a CPU, whatever BLAS NumPy was built with")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of all weights of the output (default: as they are stored)")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="cut the output anew, into files of at most this size: 5GB, 500MB")
    parser.add_argument(
        "--ties",
        choices=("refuse", "untie", "share"),
        default="refuse",
        help="of a tied weight that changes: refuse, untie (each name a tensor of its own) or share (both names change)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, if it is a checkpoint")
    parser.add_argument("--threads", type=int, metavar="N", help="workers, about 8 MB of memory each (default: one for each core)")
    parser.add_argument("--no-fsync", action="store_true", help="do not wait for the disk: faster, but a power failure may lose the output")
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="of a Dask cluster, tcp://host:8786, whose workers write the shards; then BASE, ADAPTER and OUT are paths that all of them"
        " see, or what fsspec knows: s3://bucket/model, hf://org/model",
    )
    parser.add_argument("--json", action="store_true", help="the plan or the result as JSON on standard output, and no progress")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, program: Sequence[str]) -> int:
    weights = read_weights(options.weights, options.adapters)
    size = _size(options.max_shard_size)
    if options.threads is not None and options.threads < 1:
        raise ConfigError(f"--threads {options.threads}: at least one does the work.")
    try:
        return _run(options, weights, size)
    except (PeftRefError, OSError) as error:
        print(f"peft-ref merge: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\npeft-ref merge: interrupted. Nothing was left behind.", file=sys.stderr)
        return INTERRUPTED


def _run(options: argparse.Namespace, weights: Sequence[float], size: int | None) -> int:
    from peft_ref.checkpoints.moving import is_address
    from peft_ref.checkpoints.plan import Source
    from peft_ref.checkpoints.planning import plan

    how = {
        "rounding": options.rounding,
        "exact": options.exact,
        "dtype": DTYPES[options.dtype] if options.dtype else None,
        "max_shard_size": size,
        "ties": options.ties,
    }
    address = next(filter(is_address, (options.base, *options.adapters, options.out)), None)
    if address is not None and options.scheduler is None:
        raise ConfigError(f"{address} is an address: the workers of a cluster read and write there.\n  Give --scheduler, or paths.")
    if options.scheduler is not None:
        adapters = list(zip(options.adapters, weights, strict=True))
        merged = _on_cluster(options, adapters, lambda base, sources: plan(base, sources, **how))
    else:
        sources = [Source(Path(folder), weight) for folder, weight in zip(options.adapters, weights, strict=True)]
        merged = _executed(options, plan(Path(options.base), sources, **how))
    if merged is None:
        return 0
    if options.json:
        print(json.dumps({"out": options.out, "written": merged.written, "kept": merged.kept, "seconds": merged.seconds}))
    else:
        from peft_ref.checkpoints.summary import amount

        kept = f"; kept of a run that was stopped: {', '.join(merged.kept)}" if merged.kept else ""
        rate = amount(int(merged.written / max(merged.seconds, 1e-9)))
        print(f"{options.out}: {amount(merged.written)} written in {merged.seconds:.1f} s, {rate} a second{kept}")
    return 0


def _told(options: argparse.Namespace, plan: Plan, addresses: Mapping[Path, str]) -> None:
    from peft_ref.checkpoints import summary
    from peft_ref.checkpoints.engine import cores

    threads = options.threads or cores()
    told = (plan, options.out, threads, addresses)
    print(json.dumps(summary.as_json(*told)) if options.json else summary.in_words(*told))


def _executed(options: argparse.Namespace, plan: Plan) -> Merged | None:
    """None of a dry run, which was told instead."""
    from peft_ref.checkpoints.engine import execute

    if options.dry_run:
        _told(options, plan, {})
        return None
    with _bar(options) as tell:
        how = {"threads": options.threads, "fsync": not options.no_fsync, "overwrite": options.overwrite}
        return execute(plan, Path(options.out), tell=tell, **how)


def _on_cluster(
    options: argparse.Namespace, adapters: Sequence[tuple[str, float]], planned: Callable[[Path, Sequence[Source]], Plan]
) -> Merged | None:
    from peft_ref.checkpoints.cluster import merge_on, planned_at

    if options.dry_run:
        with planned_at(options.base, adapters, planned) as (plan, places):
            _told(options, plan, {place.here: place.address for place in places})
            return None
    with _bar(options) as tell:
        how = {"fsync": not options.no_fsync, "overwrite": options.overwrite}
        return merge_on(options.scheduler, options.base, adapters, options.out, planned, tell=tell, **how)


@contextlib.contextmanager
def _bar(options: argparse.Namespace) -> Iterator[Callable[[Progress], None]]:
    from peft_ref.checkpoints.telling import Bar

    bar = Bar(sys.stderr)
    try:
        yield (lambda progress: None) if options.json else bar.tell
    finally:
        bar.done()


def read_weights(text: str | None, adapters: Sequence[object]) -> list[float]:
    if text is None:
        return [1.0] * len(adapters)
    try:
        weights = [float(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {text}: expected numbers with commas between them, like 0.7,0.3.") from None
    if len(weights) != len(adapters):
        raise ConfigError(f"--weights {text}: {len(weights)} for {len(adapters)} adapters. Each gets one.")
    if not all(abs(weight) < float("inf") for weight in weights):
        raise ConfigError(f"--weights {text}: each has to be a finite number.")
    return weights


def _size(text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS or not (size := int(float(match[1]) * UNITS[match[2].upper()])):
        raise ConfigError(f"--max-shard-size {text}: expected a size like 5GB, 500MB or 2GiB.")
    return size
