"""What happens to the second name of a tied weight when the first is changed.

refuse   an error
untie    the module that is changed gets a weight of its own, the others keep theirs: the merged model computes what the unmerged did
share    every module sees the change, as in HF's memory, where the tensor is one: the merged model computes something else
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

from peft_ref.errors import ConfigError, NotMergeableError
from peft_ref.graph.protocol import Graph

Ties: TypeAlias = Literal["refuse", "untie", "share"]


def check_ties(ties: Ties) -> None:
    if ties not in ("refuse", "untie", "share"):
        raise ConfigError(f"ties={ties!r}: there are 'refuse', 'untie' and 'share'.")


def names_of(graph: Graph, name: str) -> tuple[str, ...]:
    """All names of one parameter, the first one first."""
    first = graph.resolve(name)
    return (first, *(second for second, known in graph.tied().items() if known == first))


def changed_name(graph: Graph, name: str, ties: Ties, what: str) -> tuple[str, frozenset[str]]:
    """Under which name a change of `name` is kept, and which second names it parts from the first."""
    together = names_of(graph, name)
    if len(together) == 1:
        return together[0], frozenset()
    if ties == "share":
        return together[0], frozenset()
    if ties == "untie":
        return name, frozenset(together[1:])
    raise NotMergeableError(
        f"{what} changes {name}, which is also {' and '.join(other for other in together if other != name)}.\n"
        "  HF PEFT changes both, so that the model computes something else than before. Give ties='untie' to part them, or 'share'."
    )


def parted(graph: Graph, keys: Iterable[str], untied: frozenset[str]) -> Mapping[str, str]:
    """For every name that is parted from a changed one and not changed itself, the name whose old numbers it keeps."""
    keys = set(keys)
    ties = graph.tied()
    return {s: ties[s] for s in untied if s in ties and s not in keys and ties[s] in keys}
