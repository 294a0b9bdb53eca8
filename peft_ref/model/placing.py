"""Where an adapter goes on a model, and what its configuration says once that is known.

HF writes into the configuration what it took from the model: default targets, "all-linear" as a list of names, the head of a task among
modules_to_save, IA3's feed-forward modules. What is saved later says so too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from peft_ref.contracts import WeightMethod
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.files.adapter import spanned
from peft_ref.files.config import AdapterConfig
from peft_ref.files.rules import field_names
from peft_ref.graph.protocol import Graph
from peft_ref.graph.rules import SAVED_BY_TASK, default_feedforward, rules_for
from peft_ref.graph.targets import match
from peft_ref.layers import Layer
from peft_ref.model.adapted import Adapted
from peft_ref.prompts import Prompt

# HF's PeftMixedModel takes these together; their effects are all a change of the weight on the same input.
MIXABLE = frozenset({"LORA", "LOHA", "LOKR", "ADALORA", "OFT", "SHIRA"})


class Placed(NamedTuple):
    config: AdapterConfig
    layers: Mapping[str, Layer]  # the modules that get an adapter, in the model's order
    saved: tuple[str, ...]  # the modules that are trained in full


def bias_of(config: AdapterConfig) -> str:
    return str(config.housekeeping.get("bias", "none"))


def place(model: Adapted, config: AdapterConfig) -> Placed:
    """Where `config` sends an adapter of the model."""
    method, graph = config.method, model.base
    if not isinstance(method, WeightMethod):
        where = (
            "it goes before a model's inputs (peft_ref.splice)"
            if isinstance(method, Prompt)
            else "it adds to attention blocks: give it to a network as `Net.attention`"
        )
        raise ConfigError(f"{type(method).__name__} adapts no layer: {where}.")
    config = settled(config, graph)
    task = config.housekeeping.get("task_type")
    matched = match(config.targets, graph, peft_type=method.peft_type, task_type=task, kinds=method.kinds)
    if matched.parameters:
        raise UnsupportedLayerError(
            f"target_parameters: {', '.join(matched.parameters)}: adapters on single parameters are not built here."
        )
    layers = {name: model.layer(name) for name in matched.modules}
    for name, layer in layers.items():
        config.method_for(name).check_layer(layer, name)
    return Placed(spanned(config, layers, {}), layers, matched.saved)


def settled(config: AdapterConfig, graph: Graph) -> AdapterConfig:
    """`config` with everything written out that it leaves to the model."""
    method, targets, patterns = config.method, config.targets, config.patterns
    task = config.housekeeping.get("task_type")
    written = rules_for(targets, graph, method.peft_type, task).target
    saved = (*(targets.modules_to_save or ()), *SAVED_BY_TASK.get(task or "", ()))
    if written != targets.target_modules:
        targets = replace(targets, target_modules=written)
    if saved != (targets.modules_to_save or ()):
        targets = replace(targets, modules_to_save=tuple(dict.fromkeys(saved)))
    if "is_feedforward" in field_names(type(method)) and patterns.feedforward_modules is None:
        patterns = replace(patterns, feedforward_modules=default_feedforward(graph))
    return config if targets is config.targets and patterns is config.patterns else replace(config, targets=targets, patterns=patterns)


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
    """Raise `ConfigError` where one adapter would adapt what another, or it itself, trains in full.

    HF refuses the same module; inside of one it puts adapters into the copy, each of its own.
    """
    adapted = {name: tuple(placed.layers)} | {other: tuple(adapter.modules) for other, adapter in model.adapters.items()}
    whole = {name: placed.saved} | {other: adapter.whole for other, adapter in model.adapters.items()}
    for owner, saved in whole.items():
        for other, modules in adapted.items():
            for module in modules:
                if above := next((s for s in saved if f"{module}.".startswith(f"{s}.")), None):
                    raise ConfigError(
                        f"adapter {owner!r} trains {above!r} in full, and {other!r} goes to {module!r}.\n"
                        "  Take one of them out: modules_to_save takes every module whose name ends so."
                    )
