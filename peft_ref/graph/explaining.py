"""Why nothing matched, what may not be meant, and names near to what was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from peft_ref.graph.decide import EXCLUDED, SAVED, TARGET, Rules, Verdict, suffixes
from peft_ref.graph.protocol import Graph

if TYPE_CHECKING:
    from peft_ref.graph.targets import Targets


def nothing_matched(targets: Targets, rules: Rules, graph: Graph, verdicts: Mapping[str, Verdict]) -> str:
    outcomes = {verdict.outcome for verdict in verdicts.values()}
    if outcomes and outcomes <= {EXCLUDED, SAVED}:
        return "every module is excluded, by exclude_modules or modules_to_save.\n  Narrow them."
    shown = "target_parameters" if rules.target is None else f"target_modules={targets.target_modules!r:.80}"
    lines = [f"{shown} matches none of the {len(verdicts)} modules."]
    near = nearest(rules.target, targets.target_parameters, graph)
    lines.append(f"  The nearest names: {', '.join(near)}." if near else "  No name is near; `graph.modules()` lists them.")
    held = [verdict.reason for verdict in verdicts.values() if verdict.near]
    lines.append(f"  {held[0]}" if held else "  A list matches whole names or ends from a dot on; text is a regex of the whole name.")
    return "\n".join(lines)


def notes_on(targets: Targets, rules: Rules, graph: Graph, verdicts: Mapping[str, Verdict], parameters: tuple[str, ...]) -> Iterator[str]:
    outcomes = {verdict.outcome for verdict in verdicts.values()}
    if verdicts and targets.exclude_modules and not outcomes & {EXCLUDED, SAVED}:
        yield f"exclude_modules={targets.exclude_modules!r:.80} excludes nothing."
    if verdicts and targets.target_modules and TARGET not in outcomes:
        yield f"target_modules={targets.target_modules!r:.80} matches no module."
    if targets.target_parameters and not parameters:
        yield f"target_parameters={targets.target_parameters!r:.80} matches no parameter."
    if isinstance(targets.target_modules, tuple):
        for entry in unmatched(targets.target_modules, graph):
            yield f"target_modules: {entry!r} matches no module."


def unmatched(entries: tuple[str, ...], graph: Graph) -> list[str]:
    """The entries of a list that are no module's name and no end of one."""
    ends = {end for name in graph.modules() for end in (name, *suffixes(name))}
    return [entry for entry in entries if entry not in ends]


def nearest(target: str | tuple[str, ...] | None, parameters: tuple[str, ...] | None, graph: Graph) -> list[str]:
    """Up to six names that look like what was asked for: ends of names with as many parts as the entry has."""
    from difflib import get_close_matches  # for those alone who missed: a merge counts every MB

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
