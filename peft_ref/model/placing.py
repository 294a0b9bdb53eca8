"""Where an adapter goes on a model, and what its configuration says once that is known.

HF writes into the configuration what it took from the model: default targets, "all-linear" as a list of names, the head of a task among
modules_to_save, IA3's feed-forward modules. What is saved later says so too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from peft_ref.attending import AttentionBlock, AttentionMethod
from peft_ref.contracts import WeightMethod
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.files.adapter import spanned
from peft_ref.files.config import AdapterConfig
from peft_ref.files.rules import field_names
from peft_ref.graph.blocks import blocks_of
from peft_ref.graph.order import ORDERS
from peft_ref.graph.protocol import Graph
from peft_ref.graph.replicated import ReplicatedGraph
from peft_ref.graph.rules import SAVED_BY_TASK, WITHOUT_SAVED, default_feedforward, rules_for
from peft_ref.graph.targets import match
from peft_ref.graph.tying import Tie, asks, embedding_tie, targets_with_table, with_table
from peft_ref.layers import Layer
from peft_ref.methods.lora import LoRA
from peft_ref.methods.trainable_tokens import TrainableTokens
from peft_ref.model.adapted import NOTHING, Adapted
from peft_ref.model.tokens import check_beside, check_tokens_alone, in_order, tied_to_table, tokens_beside, trains

TYING = "ensure_weight_tying"
# HF's PeftMixedModel takes these together; their effects are all a change of the weight on the same input.
MIXABLE = frozenset({"LORA", "LOHA", "LOKR", "ADALORA", "OFT", "SHIRA"})


class Placed(NamedTuple):
    config: AdapterConfig
    layers: Mapping[str, Layer]  # the modules that get an adapter, in the model's order
    saved: tuple[str, ...] = ()  # the modules that are trained in full
    tied: Mapping[str, str] = NOTHING  # the parameters of those whose copy is that of another name
    mirrored: Mapping[str, str] = NOTHING  # the modules whose factors are those of another one, transposed
    following: Mapping[str, str] = NOTHING  # the modules whose trained tokens are those of another one
    blocks: Mapping[str, AttentionBlock] = NOTHING  # the attention blocks that get one


def bias_of(config: AdapterConfig) -> str:
    return str(config.housekeeping.get("bias", "none"))


def task_with_head(config: AdapterConfig) -> Any:
    """The task whose head is trained beside the adapter."""
    return None if config.method.peft_type in WITHOUT_SAVED else config.housekeeping.get("task_type")


def place(model: Adapted, config: AdapterConfig) -> Placed:
    """Where `config` sends an adapter of the model."""
    method, graph = config.method, model.base
    if isinstance(method, AttentionMethod):
        return _in_attention(config, method, graph)
    if not isinstance(method, WeightMethod):
        raise ConfigError(f"{type(method).__name__} adapts no layer: it goes before a model's inputs (peft_ref.splice).")
    check_replicated(config, graph)
    if method.counts_layers and not graph.in_order:
        raise ConfigError(
            f"{type(method).__name__} gives every layer its part by its place in the live model, which the files of a {graph.model_type}"
            " model do not tell.\n  Known are the orders of "
            f"{', '.join(sorted(ORDERS))}; of any other model use a graph of the live one, TorchGraph."
        )
    tied, table = shared_copies(config, graph), mirrored_by(config, graph)
    config = settled(config, graph)
    task = task_with_head(config)
    matched = match(config.targets, graph, peft_type=method.peft_type, task_type=task, kinds=method.kinds)
    if matched.parameters:
        raise UnsupportedLayerError(
            f"target_parameters: {', '.join(matched.parameters)}: that acts on no layer.\n  Use peft_ref.model.parameters."
        )
    mirrored = {} if table is None else dict.fromkeys(table.others, table.table)
    layers = {name: model.layer(name) for name in dict.fromkeys((*matched.modules, *mirrored))}
    config = spanned(config, layers, {})
    saved = (*matched.saved, *(m for m in dict.fromkeys(s.rpartition(".")[0] for s in tied) if m not in matched.saved))
    check_mirrors(config, layers, mirrored)
    following = tied_to_table(graph, layers) if isinstance(method, TrainableTokens) else {}
    if following:
        layers = in_order(graph, {**layers, **{name: model.layer(name) for name in following}})
    placed = with_tokens(Placed(config, layers, saved, tied, mirrored, following), model)
    for name, layer in placed.layers.items():
        placed.config.method_for(name).check_layer(layer, name)
    return placed


def with_tokens(placed: Placed, model: Adapted) -> Placed:
    """The same with the modules that have trained tokens."""
    if not placed.config.tokens:
        return placed
    methods, following = tokens_beside(placed.config, model.base)
    config = replace(placed.config, beside=methods)
    check_beside(config, placed.layers, placed.saved)
    own = {name: model.layer(name) for name in methods}
    for name, layer in own.items():
        methods[name].alone.check_layer(layer, name)
    layers = in_order(model.base, {**placed.layers, **own})
    return placed._replace(config=config, layers=layers, following=following)


def _in_attention(config: AdapterConfig, method: AttentionMethod[Any], graph: Graph) -> Placed:
    """The blocks; nothing beside them is trained. The configuration then says what they end in, as in HF."""
    if config.targets.modules_to_save or bias_of(config) != "none":
        raise ConfigError(f"{method.peft_type} trains nothing beside it (HF PEFT's has no modules_to_save and no bias).\n  Leave them out.")
    blocks = blocks_of(method, config.targets, graph)
    method.dims()
    ending = next(iter(blocks)).rpartition(".")[2]
    if config.targets.target_modules is None:
        config = replace(config, targets=replace(config.targets, target_modules=ending))
    return Placed(config, {}, blocks=blocks)


def check_replicated(config: AdapterConfig, graph: Graph) -> None:
    """Raise `ConfigError` where the configuration's layers are not those of the model."""
    wanted = config.housekeeping.get("layer_replication")
    given = graph.layer_replication if isinstance(graph, ReplicatedGraph) else ()
    if wanted and tuple(tuple(pair) for pair in wanted) != given:
        raise ConfigError(
            f"layer_replication={wanted!r:.80}, and the model's layers are {given or 'its own'}.\n"
            "  Adapt ReplicatedGraph(graph, layer_replication) instead of the graph (peft_ref.graph)."
        )


def settled(config: AdapterConfig, graph: Graph) -> AdapterConfig:
    """`config` with everything written out that it leaves to the model."""
    method, targets, patterns = config.method, config.targets, config.patterns
    task = task_with_head(config)
    written = rules_for(targets, graph, method.peft_type, task).target
    saved = (*(targets.modules_to_save or ()), *SAVED_BY_TASK.get(task or "", ()))
    if (tie := tie_of(config, graph)) is not None and asks(saved):
        saved = with_table(saved, tie)
    if (table := mirrored_by(config, graph)) is not None and written is not None:
        written = targets_with_table(written, table)
    if written != targets.target_modules:
        targets = replace(targets, target_modules=written)
    if saved != (targets.modules_to_save or ()):
        targets = replace(targets, modules_to_save=tuple(dict.fromkeys(saved)))
    if "is_feedforward" in field_names(type(method)) and patterns.feedforward_modules is None:
        patterns = replace(patterns, feedforward_modules=default_feedforward(graph))
    return config if targets is config.targets and patterns is config.patterns else replace(config, targets=targets, patterns=patterns)


def tie_of(config: AdapterConfig, graph: Graph) -> Tie | None:
    """The tie of embeddings that the configuration asks to keep."""
    wanted = config.method.peft_type in ("LORA", "ADALORA") and bool(config.housekeeping.get(TYING))
    return embedding_tie(graph) if wanted else None


def shared_copies(config: AdapterConfig, graph: Graph) -> dict[str, str]:
    """The second names whose copy is that of the first."""
    tie, task = tie_of(config, graph), config.housekeeping.get("task_type")
    if tie is None or not asks((*(config.targets.modules_to_save or ()), *SAVED_BY_TASK.get(task or "", ()))):
        return {}
    if tables := [name for name in tie.others if graph.modules()[name].kind == "embedding"]:
        raise UnsupportedLayerError(
            f"{TYING} with {tables[0]!r}: it is a table too, in whose place HF PEFT puts a linear layer, which then fails.\n  Leave it out."
        )
    return {second: first for second, first in graph.tied().items() if second.rpartition(".")[0] in tie.others}


def mirrored_by(config: AdapterConfig, graph: Graph) -> Tie | None:
    """The table and what has its factors, transposed. A table that is trained in full, or said to be, asks for none."""
    tie, targets = tie_of(config, graph), config.targets
    return tie if tie is not None and not shared_copies(config, graph) and asks(targets.target_modules) else None


def check_mirrors(config: AdapterConfig, layers: Mapping[str, Layer], mirrored: Mapping[str, str]) -> None:
    for name, table in mirrored.items():
        method = config.method_for(name)
        if (
            type(method) is not LoRA
            or method.lora_bias
            or (isinstance(method.init_lora_weights, str) and method.init_lora_weights != "gaussian")
        ):
            raise UnsupportedLayerError(
                f"{TYING} at {name!r} with {method}: a plain LoRA with a plain start is shared here.\n  Leave it out."
            )
        if method != config.method_for(table) or layers[name].kind != "linear":
            raise UnsupportedLayerError(f"{TYING}: {name!r} is no linear layer with the rank and scale of {table!r}, whose factors it has.")


def check_new(model: Adapted, name: str, config: AdapterConfig) -> None:
    """Raise `ConfigError` where the model takes no such adapter beside those it has."""
    kind = config.method.peft_type
    if name in model.adapters:
        raise ConfigError(f"there is an adapter {name!r} already (HF PEFT refuses it too).\n  Delete it first, or choose another name.")
    if model.mixed and kind not in MIXABLE:
        raise ConfigError(f"{kind} is not mixed with other types (HF PEFT refuses it too).\n  Mixable: {', '.join(sorted(MIXABLE))}.")
    others = {adapter.config.method.peft_type for adapter in model.adapters.values()} - {kind}
    if others and not model.mixed:
        raise ConfigError(
            f"adapter {name!r} is {kind}, the model has {', '.join(sorted(others))} (HF PEFT refuses it too).\n"
            f"  Use adapt(base, mixed=True) to mix {', '.join(sorted(MIXABLE))}."
        )
    training = [other for other, a in model.adapters.items() if not a.config.housekeeping.get("inference_mode")]
    if kind == "ADALORA" and training and not model.mixed and not config.housekeeping.get("inference_mode"):
        raise ConfigError(
            f"adapters {training[0]!r} and {name!r}: of AdaLoRA a model trains one (HF PEFT refuses it too).\n"
            "  Give one of them inference_mode=True in its configuration, or load it as not trainable."
        )
    biased = [other for other, adapter in model.adapters.items() if bias_of(adapter.config) != "none"]
    if biased and bias_of(config) != "none":
        raise ConfigError(
            f"adapters {biased[0]!r} and {name!r} both train biases, which a model has once (HF PEFT refuses it too).\n"
            "  Use bias='none' for one of them."
        )


def check_apart(model: Adapted, name: str, placed: Placed) -> None:
    """Raise `ConfigError` where one adapter would adapt what another, or it itself, trains in full, or trains tokens of.

    HF refuses the same module; inside of one it puts adapters into the copy, each of its own.
    """
    adapted = {name: tuple(placed.layers)} | {other: tuple(adapter.modules) for other, adapter in model.adapters.items()}
    for other, adapter in model.adapters.items():
        check_tokens_alone(trains(repr(name), placed.config, placed.layers), trains(repr(other), adapter.config, adapter.modules))
    whole = {name: placed.saved} | {other: adapter.whole for other, adapter in model.adapters.items()}
    for owner, saved in whole.items():
        for other, modules in adapted.items():
            for module in modules:
                if above := next((s for s in saved if f"{module}.".startswith(f"{s}.")), None):
                    raise ConfigError(
                        f"adapter {owner!r} trains {above!r} in full, and {other!r} goes to {module!r}.\n"
                        "  Take one of them out: modules_to_save takes every module whose name ends so."
                    )
