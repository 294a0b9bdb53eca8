"""Adapters come onto a model, get new numbers, and leave it.

add       fresh parameters. The first adapter becomes active; a later one waits for `activate`. What is merged is unmerged first, as in HF
attach    parameters from a file; the init runs once more where it changes the frozen weight (pissa, olora), as when HF loads
update    other numbers: what a training made of parameters, of modules_to_save, of biases
delete    of an active adapter: what remains active stays so, else the first by name on the first module that was adapted; it is trainable

HF      initialises a new adapter before it unmerges, so that DoRA's magnitudes, pissa and olora start from the merged weight; here from the
        frozen one. After a deletion HF chooses the next adapter module by module, here once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from peft_ref.arrays import Array
from peft_ref.errors import ConfigError, KeyMismatchError, ShapeError
from peft_ref.files.adapter import AdapterModule
from peft_ref.files.config import AdapterConfig
from peft_ref.files.keys import check_adapter_name
from peft_ref.graph.protocol import Graph
from peft_ref.layers import Layer
from peft_ref.model.adapted import Adapted, Attached, Merged
from peft_ref.model.numbers import as_stored, wide
from peft_ref.model.placing import Placed, bias_of, check_apart, check_new, place
from peft_ref.model.sharing import common, shared
from peft_ref.model.switching import trained
from peft_ref.model.ties import Ties, changed_name, check_ties, names_of, parted


def add(model: Adapted, name: str, config: AdapterConfig, rng: np.random.Generator, *, ties: Ties = "refuse") -> Adapted:
    """`model` with a fresh adapter. `ties` says what an init does that changes a tied weight."""
    check_ties(ties)
    check_new(model, name, config)
    placed = place(model, config)
    modules: dict[str, AdapterModule] = {}
    made = common(model, placed, rng)
    for module, layer in placed.layers.items():
        model, params = started(model, module, layer, placed.config, rng, ties, made.get(module))
        modules[module] = AdapterModule(placed.config.method_for(module), layer, params)
    return joined(model, name, placed, modules, trainable=not placed.config.housekeeping.get("inference_mode", False))


def started(
    model: Adapted, module: str, layer: Layer, config: AdapterConfig, rng: np.random.Generator, ties: Ties, made: Any = None
) -> tuple[Adapted, Any]:
    """Fresh parameters at `module`, given what was made for all, and the model with the frozen weight that the init leaves."""
    key = weight_name(model, module)
    frozen = model.frozen(key)
    W = wide(layer.fold(frozen))
    start = config.method_for(module).start(layer, W, rng, made)
    if start.W is not W:
        kept, apart = changed_name(model.base, key, ties, f"{type(config.method).__name__}'s init at {module!r}")
        model = overlaid(model, {kept: as_stored(layer.unfold(start.W), frozen)}, apart)
    return model, start.params


def joined(
    model: Adapted,
    name: str,
    placed: Placed,
    modules: Mapping[str, AdapterModule],
    *,
    saved: Mapping[str, Array] | None = None,
    biases: Mapping[str, Array] | None = None,
    trainable: bool,
) -> Adapted:
    """`model` with an adapter whose parameters are there. What is not given of the modules saved in full is copied from the model."""
    check_adapter_name(name)
    check_new(model, name, placed.config)
    check_apart(model, name, placed)
    copied = {key: model.frozen(key) for module in placed.saved for key in parameters_below(model.base, module)}
    first = not model.adapters
    adapter = Attached(
        config=placed.config,
        modules=modules,
        saved={**copied, **(saved or {})},
        whole=placed.saved,
        trainable=trainable and first,
    )
    free = biases_of(model.base, placed) if first and trainable else frozenset[str]()
    return replace(
        overlaid(model, biases or {}, frozenset()),
        adapters={**model.adapters, name: adapter},
        active_names=(name,) if first else model.active_names,
        merged=Merged(),
        trainable_biases=model.trainable_biases | free,
    )


def update(
    model: Adapted,
    name: str,
    params: Mapping[str, Any] | None = None,
    *,
    saved: Mapping[str, Array] | None = None,
    biases: Mapping[str, Array] | None = None,
) -> Adapted:
    """`model` with other numbers for the adapter `name`: parameters by module, copies and biases by the parameters' own names."""
    adapter = model.attached(name)
    if name in model.merged.names:
        raise ConfigError(f"adapter {name!r} is merged, and its old numbers are in the weights.\n  Unmerge it first.")
    modules = dict(adapter.modules)
    for module, values in (params or {}).items():
        if module not in modules:
            raise KeyMismatchError(f"adapter {name!r} is not on {module!r}.\n  It is on {', '.join(modules)}.")
        old = modules[module]
        if type(values) is not old.method.params_type:
            raise ConfigError(f"parameters at {module!r} are a {type(values).__name__}, expected those of {type(old.method).__name__}.")
        for spec in old.method.spec(old.layer):
            value = getattr(values, spec.field)
            came = None if value is None else tuple(value.shape)
            if came != spec.shape:
                raise ShapeError(f"{name!r} at {module!r}: {spec.field} is {came}, expected {spec.shape}.\n  {old.method} on {old.layer}.")
        modules[module] = old._replace(params=values)
    if unknown := sorted((saved or {}).keys() - adapter.saved.keys()):
        raise KeyMismatchError(f"adapter {name!r} has no copy of {unknown[0]!r}.\n  It has {', '.join(adapter.saved) or 'none'}.")
    if unknown := sorted((biases or {}).keys() - model.parameters().keys()):
        raise KeyMismatchError(f"no parameter {unknown[0]!r} in this model.")
    shared(modules)
    changed = replace(adapter, modules=modules, saved={**adapter.saved, **(saved or {})})
    return replace(overlaid(model, biases or {}, frozenset()), adapters={**model.adapters, name: changed})


def delete(model: Adapted, name: str) -> Adapted:
    """`model` without the adapter `name`. What its init changed of the frozen weight, and trained biases, stay as they are."""
    gone = model.attached(name)
    if name in model.merged.names:
        raise ConfigError(f"adapter {name!r} is merged (HF PEFT refuses it too).\n  Unmerge it first.")
    left = {other: adapter for other, adapter in model.adapters.items() if other != name}
    rest = replace(model, adapters=left, active_names=tuple(other for other in model.active_names if other != name))
    if name not in model.active_names:
        return rest
    if rest.active_names:
        return trained(rest, rest.active_names)
    first = next((m for m in model.modules() if m in gone.modules or any(m in a.modules for a in left.values())), None)
    heirs = sorted(other for other, adapter in left.items() if first in adapter.modules)
    return trained(replace(rest, active_names=tuple(heirs[:1])), heirs[:1])


def overlaid(model: Adapted, weights: Mapping[str, Array], apart: frozenset[str]) -> Adapted:
    """`model` with other frozen weights, of which `apart` are the second names that are tied no longer."""
    if not weights and not apart:
        return model
    kept = {second: model.frozen(second) for second in parted(model.base, weights, apart)}
    return replace(model, changed={**model.changed, **kept, **weights}, untied=model.untied | apart)


def weight_name(model: Adapted, module: str) -> str:
    key = model.modules()[module].weight
    if key is None:
        raise ConfigError(f"{module!r} has no parameter called weight, which an adapter could change.")
    return key


def parameters_below(graph: Graph, module: str) -> list[str]:
    """The parameters inside a module, under their names there, which may be second ones."""
    return [key for key in (*graph.parameters(), *graph.tied()) if key.startswith(f"{module}.")]


def biases_of(graph: Graph, placed: Placed) -> frozenset[str]:
    """The biases that the adapter trains, by the parameters' first names."""
    mode = bias_of(placed.config)
    if mode == "none":
        return frozenset()
    if mode == "all":
        found = [key for key in graph.parameters() if key == "bias" or key.endswith(".bias")]
    else:  # "lora_only" and its like: of the modules that get an adapter
        modules = graph.modules()
        found = [key for key in (modules[name].bias for name in placed.layers) if key is not None]
    whole = {name for module in placed.saved for key in parameters_below(graph, module) for name in names_of(graph, key)}
    return frozenset(graph.resolve(key) for key in found) - whole
