"""The plan of a merge: which tensors of the base change by what, and how the output is laid out. It reads headers and configurations only.

plan(base, [Source(adapter)])                      PEFT's merge_and_unload, written as save_pretrained would
plan(base, [Source(a), Source(b, 0.5)])            two adapters, one after the other, the second with half its scale
plan(..., rounding="safe", exact=True)             PEFT's safe_merge, to the bit
plan(..., dtype="bfloat16", ties="untie")          in another dtype; the head that was the embedding gets numbers of its own
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from peft_ref.checkpoints.base import Base
from peft_ref.checkpoints.gathering import Asked, Gathered
from peft_ref.checkpoints.layout import dtype_of, laid_out
from peft_ref.checkpoints.plan import Plan, Rounding, Source
from peft_ref.checkpoints.sources import config_of, modules_in, read
from peft_ref.errors import ConfigError
from peft_ref.graph import under_live_names
from peft_ref.model.adapted import adapt
from peft_ref.model.ties import Ties, check_ties

ROUNDINGS = ("default", "safe", "kept")


def plan(
    base: Path,
    adapters: Sequence[Source],
    *,
    rounding: Rounding = "default",
    exact: bool = False,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    ties: Ties = "refuse",
) -> Plan:
    """What is to be written for `base` with these adapters in it, one after the other."""
    check_ties(ties)
    if rounding not in ROUNDINGS:
        raise ConfigError(f"rounding={rounding!r}: there are {', '.join(ROUNDINGS)}.")
    asked = Asked(rounding, exact, dtype_of(dtype), ties)
    sources = _checked(adapters)
    checkpoint = Base(Path(base))
    configs = [config_of(source) for source in sources]
    checkpoint.check()
    graph = under_live_names(base, [name for pair in zip(sources, configs, strict=True) for name in modules_in(*pair)])
    model = adapt(graph)
    read_in = [read(model, source, config) for source, config in zip(sources, configs, strict=True)]
    gathered = Gathered(model, checkpoint, graph.prefix, asked)
    for adapter in read_in:
        gathered.load(adapter)
    gathered.merge(read_in)
    for adapter in read_in:
        gathered.copies(adapter)
    return laid_out(checkpoint, sources, gathered.wanted(max_shard_size))


def _checked(adapters: Sequence[Source]) -> list[Source]:
    sources = [Source(Path(source.folder), float(source.weight)) for source in adapters]
    if not sources:
        raise ConfigError("no adapter was given: there is nothing to merge.")
    for source in sources:
        if not math.isfinite(source.weight):
            raise ConfigError(f"{source.folder}: weight {source.weight} is no number.")
    if twice := [s.folder for n, s in enumerate(sources) if s.folder.resolve() in [other.folder.resolve() for other in sources[:n]]]:
        raise ConfigError(f"{twice[0]} is there twice, and would be merged twice.\n  Name it once; give it weight 2 if that is meant.")
    return sources
