"""Adapters come onto a model, get new numbers, and leave it.

add       fresh parameters. The first adapter becomes active; a later one waits for `activate`. What is merged is unmerged first, as in HF.
          `starts` has those that were made of data (corda, eva, lora_ga), module by module
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

from peft_ref.arrays import Array, namespace
from peft_ref.attending import AttentionAdapter, AttentionMethod
from peft_ref.contracts import Start, declared
from peft_ref.errors import ConfigError, KeyMismatchError, ShapeError
from peft_ref.files.adapter import AdapterModule
from peft_ref.files.config import AdapterConfig
from peft_ref.files.keys import check_adapter_name
from peft_ref.graph.protocol import Graph
from peft_ref.layers import Layer
from peft_ref.methods import lora
from peft_ref.methods.dora import DoRA, with_magnitudes
from peft_ref.methods.loftq_init import loftq, loftq_of
from peft_ref.methods.lora import LoRA, transposed
from peft_ref.model.adapted import NOTHING, Adapted, Attached, Merged
from peft_ref.model.numbers import as_stored, wide
from peft_ref.model.placing import Placed, bias_of, check_apart, check_new, place
from peft_ref.model.sharing import common, shared
from peft_ref.model.switching import trained
from peft_ref.model.ties import Ties, changed_name, check_ties, names_of, parted
from peft_ref.model.tokens import followed


def add(
    model: Adapted,
    name: str,
    config: AdapterConfig,
    rng: np.random.Generator,
    *,
    ties: Ties = "refuse",
    starts: Mapping[str, Start[Any]] | None = None,
) -> Adapted:
    """`model` with a fresh adapter. `ties` says what an init does that changes a tied weight."""
    check_ties(ties)
    check_new(model, name, config)
    placed = place(model, config)
    if unknown := sorted((starts or {}).keys() - placed.layers.keys()):
        raise KeyMismatchError(f"a start for {unknown[0]!r}, which the adapter is not on.\n  It is on {', '.join(placed.layers)}.")
    modules: dict[str, AdapterModule] = {}
    blocks: dict[str, AttentionAdapter] = {}
    for name_of_block, block in placed.blocks.items():
        method = attention_method(placed.config)
        blocks[name_of_block] = AttentionAdapter(method, method.init(block.hidden_size, weight_in(model, name_of_block), rng))
    made = common(model, placed, rng)
    for module, layer in placed.layers.items():
        given = None if starts is None else starts.get(module)
        model, params = started(model, module, layer, placed.config, rng, ties, made=made.get(module), given=given)
        modules[module] = AdapterModule(placed.config.method_for(module), layer, params)
    for head, table in placed.mirrored.items():  # HF starts the head last, in the memory that both have
        lora = modules[head].method
        source, target = (table, head) if isinstance(lora, LoRA) and lora.init_lora_weights is False else (head, table)
        modules[target] = modules[target]._replace(params=transposed(modules[source].params))
    modules = followed(modules, placed.following)
    return joined(model, name, placed, modules, blocks=blocks, trainable=not placed.config.housekeeping.get("inference_mode", False))


def started(
    model: Adapted,
    module: str,
    layer: Layer,
    config: AdapterConfig,
    rng: np.random.Generator,
    ties: Ties,
    *,
    made: Any = None,
    given: Start[Any] | None = None,
) -> tuple[Adapted, Any]:
    """Fresh parameters at `module`, `given` or of what was `made` for all, and the model with the frozen weight that the init leaves."""
    key = weight_name(model, module)
    frozen = model.frozen(key)
    W, method = wide(layer.fold(frozen)), config.method_for(module)
    if given is not None and isinstance(method, DoRA) and isinstance(given.params, lora.Params):
        given = with_magnitudes(method, given)
    if given is not None:
        method.unpack(layer, method.pack(layer, given.params), where=module)  # in the method's own shapes, or an error
        start = given
    else:
        start = start_of(config, method, layer, W, rng, made)
    if start.W is not W:
        kept, apart = changed_name(model.base, key, ties, f"{type(config.method).__name__}'s init at {module!r}")
        model = overlaid(model, {kept: as_stored(layer.unfold(start.W), frozen)}, apart)
    if method.swaps:
        bias = model.modules()[module].bias
        params = method.with_frozen_bias(start.params, None if bias is None else model.frozen(bias))
        return model, type(params)(*(None if v is None else as_stored(v, frozen) for v in params))
    return model, start.params


def start_of(config: AdapterConfig, method: Any, layer: Layer, W: Array, rng: np.random.Generator, made: Any = None) -> Start[Any]:
    """Fresh parameters of `method` on the frozen matrix W, and what is left of it."""
    if isinstance(method, LoRA | DoRA) and method.init_lora_weights == "loftq":
        corrected = loftq(method, layer, W, loftq_of(config.housekeeping.get("loftq_config")))
        return with_magnitudes(method, corrected) if isinstance(method, DoRA) else corrected
    start: Start[Any] = method.start(layer, W, rng, made)
    return start


def joined(
    model: Adapted,
    name: str,
    placed: Placed,
    modules: Mapping[str, AdapterModule],
    *,
    blocks: Mapping[str, AttentionAdapter] = NOTHING,
    saved: Mapping[str, Array] | None = None,
    biases: Mapping[str, Array] | None = None,
    trainable: bool,
) -> Adapted:
    """`model` with an adapter whose parameters are there. What is not given of the modules saved in full is copied from the model."""
    check_adapter_name(name)
    check_new(model, name, placed.config)
    check_mirrored(modules, placed.mirrored)
    check_apart(model, name, placed)
    keys = [key for module in placed.saved for key in parameters_below(model.base, module) if key not in placed.tied]
    kept = {key: b for key, b in model.buffers().items() if any(key.startswith(f"{module}.") for module in placed.saved)}
    copies = {**{key: model.frozen(key) for key in keys}, **kept, **one_copy(saved or {}, placed.tied)}
    first = not model.adapters
    adapter = Attached(
        config=placed.config,
        modules=modules,
        blocks=blocks,
        saved=copies,
        whole=placed.saved,
        tied=placed.tied,
        mirrored=placed.mirrored,
        following=placed.following,
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
    """`model` with other numbers for the adapter `name`: parameters by module or block, copies and biases by the parameters' own names."""
    adapter = model.attached(name)
    if name in model.merged.names:
        raise ConfigError(f"adapter {name!r} is merged, and its old numbers are in the weights.\n  Unmerge it first.")
    modules, blocks = dict(adapter.modules), dict(adapter.blocks)
    for module, values in (params or {}).items():
        if module not in modules.keys() | blocks.keys():
            raise KeyMismatchError(f"adapter {name!r} is not on {module!r}.\n  It is on {', '.join([*modules, *blocks])}.")
        method = modules[module].method if module in modules else blocks[module].method
        if type(values) is not method.params_type:
            raise ConfigError(f"parameters at {module!r} are a {type(values).__name__}, expected those of {type(method).__name__}.")
        if module in blocks:
            blocks[module] = in_block(model, module, attention_method(adapter.config), values)
            continue
        old = modules[module]
        specs = old.method.spec(old.layer)
        if extra := [f for f in declared(type(values)) if getattr(values, f) is not None and f not in {s.field for s in specs}]:
            raise KeyMismatchError(f"{name!r} at {module!r}: {extra[0]} came, and {old.method} has none on {old.layer}.")
        for spec in specs:
            value = getattr(values, spec.field)
            came = None if value is None else tuple(value.shape)
            if came != spec.shape:
                raise ShapeError(f"{name!r} at {module!r}: {spec.field} is {came}, expected {spec.shape}.\n  {old.method} on {old.layer}.")
        modules[module] = old._replace(params=values)
    check_mirrored(modules, adapter.mirrored)
    modules = followed(modules, adapter.following, (params or {}).keys())
    saved = one_copy(saved or {}, adapter.tied)
    if unknown := sorted(saved.keys() - adapter.saved.keys()):
        raise KeyMismatchError(f"adapter {name!r} has no copy of {unknown[0]!r}.\n  It has {', '.join(adapter.saved) or 'none'}.")
    if unknown := sorted((biases or {}).keys() - model.parameters().keys()):
        raise KeyMismatchError(f"no parameter {unknown[0]!r} in this model.")
    shared(modules)
    changed = replace(adapter, modules=modules, blocks=blocks, saved={**adapter.saved, **saved})
    return replace(overlaid(model, biases or {}, frozenset()), adapters={**model.adapters, name: changed})


def check_mirrored(modules: Mapping[str, AdapterModule], mirrored: Mapping[str, str]) -> None:
    for head, table in mirrored.items():
        A, B, _ = transposed(modules[table].params)
        if any(bool(namespace(x).any(x != y)) for x, y in zip((A, B), modules[head].params[:2], strict=True)):
            raise KeyMismatchError(
                f"the factors of {head!r} are not those of {table!r}, to which it is tied (HF PEFT takes the last ones)."
            )


def one_copy(saved: Mapping[str, Array], tied: Mapping[str, str]) -> dict[str, Array]:
    """The copies without those that are another's, with which they must agree."""
    for second, first in tied.items():
        xp = namespace(*(saved[name] for name in (first, second) if name in saved))
        if second in saved and first in saved and not bool(xp.all(saved[second] == saved[first])):
            raise KeyMismatchError(f"{second} and {first} are tied, and their copies differ (HF PEFT takes one of them).\n  Give one.")
    return {name: copy for name, copy in saved.items() if name not in tied}


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
    if gone.blocks:  # HF: the one that came first of those left
        return trained(replace(rest, active_names=tuple(left)[:1]), tuple(left)[:1])
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


def weight_in(model: Adapted, block: str) -> Array:
    """A weight of an attention block, whose dtype its adapter has, of 16 bits too, as in HF."""
    return model.frozen(parameters_below(model.base, block)[0])


def attention_method(config: AdapterConfig) -> AttentionMethod[Any]:
    assert isinstance(config.method, AttentionMethod)
    return config.method


def in_block(model: Adapted, name: str, method: AttentionMethod[Any], params: Any) -> AttentionAdapter:
    """The adapter with these parameters, which must fit the block."""
    block = model.modules()[name].block
    assert block is not None
    return AttentionAdapter(method, method.unpack(block.hidden_size, method.pack(params), where=name))


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
