"""An embedding table and what is tied to it, for a LoraConfig with ensure_weight_tying.

Where `embed_tokens` or `lm_head` are among modules_to_save, or else among target_modules, the table takes the place of what is tied to it
there, and what is tied to it shares the table's copy, or the table's factors.

HF      LoraModel._add_modules_to_save_to_tie, _add_targets_to_tie. Only these two names ask for it: "wte" ties nothing. Where nothing is
        tied HF warns. A merge adds the factors' delta to the one weight twice, for the table and for the head: see peft_ref.model.ties.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from peft_ref.graph.patterns import Matcher
from peft_ref.graph.protocol import Graph

ASKING = ("embed_tokens", "lm_head")


class Tie(NamedTuple):
    table: str  # the module
    others: tuple[str, ...]  # the modules whose weight is the table's


def embedding_tie(graph: Graph) -> Tie | None:
    modules, ties = graph.modules(), graph.tied()
    for first in dict.fromkeys(ties.values()):
        table = first.rpartition(".")[0]
        if table in modules and modules[table].kind == "embedding":
            return Tie(table, tuple(second.rpartition(".")[0] for second, its_first in ties.items() if its_first == first))
    return None


def asks(names: str | tuple[str, ...] | None) -> bool:
    if isinstance(names, str):
        matcher = Matcher()
        return any(matcher.full(names, name) for name in ASKING)
    return any(name.rpartition(".")[2] in ASKING for name in names or ())


def with_table(names: tuple[str, ...], tie: Tie) -> tuple[str, ...]:
    """`names` with the table, and for each module that is tied to it without the first name that is of it."""
    kept = list(names) if tie.table in names else [*names, tie.table]
    for other in tie.others:
        if gone := next((name for name in kept if f".{name}." in f".{other}."), None):
            kept.remove(gone)
    return tuple(kept)


def targets_with_table(names: str | tuple[str, ...], tie: Tie) -> str | tuple[str, ...]:
    return rf"(?:{names}|^{re.escape(tie.table)}$)" if isinstance(names, str) else with_table(names, tie)
