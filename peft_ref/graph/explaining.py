"""Names near to what was asked for, and entries that ask for nothing."""

from __future__ import annotations

from difflib import get_close_matches

from peft_ref.graph.decide import suffixes
from peft_ref.graph.protocol import Graph


def unmatched(entries: tuple[str, ...], graph: Graph) -> list[str]:
    """The entries of a list that are no module's name and no end of one."""
    ends = {end for name in graph.modules() for end in (name, *suffixes(name))}
    return [entry for entry in entries if entry not in ends]


def nearest(target: str | tuple[str, ...] | None, parameters: tuple[str, ...] | None, graph: Graph) -> list[str]:
    """Up to six names that look like what was asked for: ends of names with as many parts as the entry has."""
    found: dict[str, None] = {}
    for entries, names in (
        ((target,) if isinstance(target, str) else target or (), graph.modules()),
        (parameters or (), graph.parameters()),
    ):
        for entry in entries[:20]:
            parts = entry.count(".") + 1
            ends = {".".join(name.split(".")[-parts:]) for name in names}
            found |= dict.fromkeys(get_close_matches(entry[:200], sorted(ends)[:5000], n=3, cutoff=0.5))
    return list(found)[:6]
