"""Where trainable_token_indices of a configuration sends trained tokens on a model, beside what the adapter does to its targets.

A list means the model's input embedding, a map the modules whose names end so. What is tied to a table that is among them follows it: its
rows are the table's, it is trained with it, and no file holds it. So a merge changes the one weight that both have, for both alike.

HF      peft.utils.other.set_additional_trainable_modules. Where a map gives a table and what is tied to it different tokens, nothing
        follows: each has its own rows, and a merge puts those of both into the one weight (see peft_ref.model.ties).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

from peft_ref.arrays import namespace
from peft_ref.errors import ConfigError, KeyMismatchError, TargetError
from peft_ref.files.adapter import AdapterModule
from peft_ref.files.config import AdapterConfig
from peft_ref.files.keys import EMBEDDINGS
from peft_ref.files.tokens import INPUT, WORD, TokensBeside
from peft_ref.graph.protocol import Graph
from peft_ref.graph.tying import Tie, embedding_tie
from peft_ref.layers import Layer
from peft_ref.methods.trainable_tokens import TrainableTokens

TYING = "ensure_weight_tying"


class Trains(NamedTuple):
    """An adapter, as far as others must know of it."""

    name: str  # as an error calls it
    tokens: Mapping[str, TrainableTokens]  # by module
    modules: Collection[str]  # all that it adapts


class Beside(NamedTuple):
    methods: Mapping[str, TokensBeside]  # by module
    following: Mapping[str, str]  # the modules whose rows are those of another one


def tokens_beside(config: AdapterConfig, graph: Graph) -> Beside:
    """The modules that have trained tokens."""
    asked = {input_embedding(graph) if end == INPUT else end: method for end, method in config.tokens.items()}
    on = {end: [name for name in graph.modules() if name.endswith(end)] for end in asked}
    if astray := next((end for end, found in on.items() if not found), None):
        raise TargetError(f"{WORD} names {astray!r}, and no module of the model is called so (HF PEFT refuses it too).\n  See `modules()`.")
    tie = embedding_tie(graph) if asked else None
    if tie is None or not any(tie.table in found for found in on.values()):
        return Beside(_first(on, asked), {})
    tied = [end for end in asked if tie.table.endswith(end) or any(o.endswith(end) or end in o.split(".") for o in tie.others)]
    if any(asked[end] != asked[tied[0]] for end in tied):
        if config.housekeeping.get(TYING):
            raise ConfigError(f"{TYING} with other tokens for {tied[0]!r} than for what is tied to it (HF PEFT refuses it too)")
        return Beside(_first(on, asked), {})
    own = _first({end: found for end, found in on.items() if end not in tie.others}, asked)
    return _followed(own, tie)


def _first(on: Mapping[str, list[str]], asked: Mapping[str, TokensBeside]) -> dict[str, TokensBeside]:
    """By module; the first name that means it counts."""
    found: dict[str, TokensBeside] = {}
    for end, names in on.items():
        for name in names:
            found.setdefault(name, asked[end])
    return found


def _followed(own: Mapping[str, TokensBeside], tie: Tie) -> Beside:
    following = dict.fromkeys((name for name in tie.others if name not in own), tie.table)
    return Beside({**own, **{name: replace(own[table], own=False) for name, table in following.items()}}, following)


def tied_to_table(graph: Graph, modules: Collection[str]) -> dict[str, str]:
    """Of an adapter that is nothing but trained tokens, on these modules: what is tied to the table follows it, and is in the file too."""
    tie = embedding_tie(graph)
    if tie is None or tie.table not in modules:
        return {}
    if named := [name for name in tie.others if name in modules]:
        raise ConfigError(
            f"target_modules names {tie.table!r}, and {named[0]!r} too, which is tied to it (HF PEFT takes both, and cannot run).\n"
            f"  Name {tie.table!r} alone: what is tied to it has its rows."
        )
    return dict.fromkeys(tie.others, tie.table)


def input_embedding(graph: Graph) -> str:
    """The table that words are looked up in."""
    for name, module in graph.modules().items():
        if module.kind == "embedding" and name.rpartition(".")[2] in EMBEDDINGS:
            return name
    raise TargetError(
        f"{WORD} is a list, which means the model's input embedding, and none is called {', '.join(EMBEDDINGS[:4])} or the like.\n"
        "  Name the layer: {'table': [3, 7]}."
    )


def check_beside(config: AdapterConfig, layers: Collection[str], saved: Collection[str]) -> None:
    """Raise `ConfigError` where the adapter does something else to such a module too."""
    for name in config.beside:
        if name in layers:
            raise ConfigError(
                f"{name!r} has trained tokens and is a target of the adapter (HF PEFT refuses it too, or merges something else).\n"
                f"  Take it out of target_modules, or out of {WORD}."
            )
        if above := next((s for s in saved if f"{name}.".startswith(f"{s}.")), None):
            raise ConfigError(
                f"{name!r} has trained tokens and {above!r} is trained in full (HF PEFT refuses it too, or cannot run it).\n"
                f"  Take it out of modules_to_save, or out of {WORD}."
            )


def trains(name: str, config: AdapterConfig, modules: Collection[str]) -> Trains:
    method = config.method
    return Trains(name, dict.fromkeys(modules, method) if isinstance(method, TrainableTokens) else config.beside, modules)


def check_tokens_alone(one: Trains, other: Trains) -> None:
    """Raise `ConfigError` where one of two adapters trains tokens of what the other adapts otherwise."""
    for a, b in ((one, other), (other, one)):
        if module := next((m for m in a.tokens if m in b.modules and m not in b.tokens), None):
            raise ConfigError(
                f"{a.name} trains tokens of {module!r}, which {b.name} adapts too (HF PEFT refuses it too).\n  Take one of them out."
            )


def check_tokens(one: Trains, other: Trains, when: Literal["active", "merged"]) -> None:
    """Raise `ConfigError` for two adapters with the same tokens of one module; beside another method only one is active with any."""
    for module, method in one.tokens.items():
        if module not in other.tokens:
            continue
        both = set(method.token_indices) & set(other.tokens[module].token_indices)
        if both or (when == "active" and isinstance(method, TokensBeside)):
            what = f"token {min(both)}" if both else "tokens"
            raise ConfigError(
                f"adapters {one.name} and {other.name} both train {what} of {module!r} and are {when} together (HF PEFT refuses it too).\n"
                "  Take one of them."
            )


def in_order(graph: Graph, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The layers in the model's order."""
    place = {name: n for n, name in enumerate(graph.modules())}
    return {name: layers[name] for name in sorted(layers, key=lambda name: place.get(name, len(place)))}


def followed_everywhere(following: Mapping[str, str], module: str) -> bool:
    """Whether everything that has the module's weight has its trained tokens too: a change of the one weight is meant for all."""
    return module in following or module in following.values()


def followed(modules: Mapping[str, AdapterModule], following: Mapping[str, str], given: Collection[str] = ()) -> dict[str, AdapterModule]:
    """`modules` where each that follows has the rows of its table. Raises where `given` ones have others."""
    out = dict(modules)
    for name, table in following.items():
        D, own = modules[table].params.D, modules[name].params.D
        if name in given and own is not None and not bool(namespace(D).all(own == D)):
            raise KeyMismatchError(f"the rows of {name!r} are not those of {table!r}, to which it is tied (HF PEFT takes the table's).")
        out[name] = modules[name]._replace(params=modules[table].params)
    return out
