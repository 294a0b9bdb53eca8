"""An adapter of `target_parameters` on a model: which parameters it is on, from and to a file, and what they are with it.

    adapter = load(graph, folder)                           PEFT's folder; also one that adapts modules beside the parameters
    effective(graph, [adapter.parameters], name)            W' of one parameter, which the module that owns it then runs with
    save(folder, adapter)                                   the folder that PEFT's save_pretrained writes

`transposed` names the modules that say is_transposed, whose experts are stored (E, in, out): no file tells. The mathematics is in
`methods/lora_parameter.py`. Such an adapter is no part of an `Adapted` model, whose adapters act on layers.

HF      peft.tuners.lora.ParamWrapper. All adapters of a model that target parameters have to target the same ones there.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_ref.arrays import Array
from peft_ref.errors import ConfigError, KeyMismatchError, naming
from peft_ref.files.adapter import DEFAULT, AdapterFile, all_tensors, from_state_dict, load_config, open_adapter, save_tensors
from peft_ref.files.config import AdapterConfig
from peft_ref.files.keys import PREFIX, sort_tensors
from peft_ref.graph.protocol import Graph
from peft_ref.graph.targets import match
from peft_ref.layers import Layer
from peft_ref.methods.lora import LoRA, Params
from peft_ref.methods.lora_parameter import Stack, check, delta, init, keys, pack, stack_of, unpack
from peft_ref.model.numbers import as_stored, brought, to_file, wide
from peft_ref.model.tokens import check_beside, in_order, tokens_beside


class OnParameter(NamedTuple):
    """What an adapter has for one parameter."""

    method: LoRA
    stack: Stack
    params: Params


class ParameterAdapter(NamedTuple):
    file: AdapterFile  # its configuration, and what it has beside the parameters
    parameters: Mapping[str, OnParameter]  # by the parameters' own names
    keys: Mapping[str, str]  # where each is in a file


class Places(NamedTuple):
    parameters: Mapping[str, tuple[LoRA, Stack]]
    layers: Mapping[str, Layer]
    keys: Mapping[str, str]
    tokens: frozenset[str] = frozenset()  # those of the layers that have trained tokens


def add(graph: Graph, config: AdapterConfig, rng: np.random.Generator, *, transposed: Collection[str] = ()) -> ParameterAdapter:
    """A fresh adapter on the parameters that `config` targets, and on no module."""
    placed = places(graph, config, transposed)
    if placed.layers:
        raise ConfigError(f"{', '.join(placed.layers)} are modules.\n  Give them an adapter of their own: target_modules=[] here.")
    fresh = {
        name: OnParameter(method, stack, init(method, stack, wide(graph.weight(name)), rng).params)
        for name, (method, stack) in placed.parameters.items()
    }
    return ParameterAdapter(AdapterFile(config=config), fresh, placed.keys)


def load(graph: Graph, folder: str | os.PathLike[str], name: str = DEFAULT, *, transposed: Collection[str] = ()) -> ParameterAdapter:
    """The adapter called `name` in a folder."""
    file = open_adapter(folder, name)
    with naming(file.path):
        adapter = read(graph, load_config(folder, name), {key: file.tensor(key) for key in file.entries}, transposed=transposed)
    return adapter._replace(file=replace(adapter.file, metadata=file.metadata))


def read(graph: Graph, config: AdapterConfig, tensors: Mapping[str, Any], *, transposed: Collection[str] = ()) -> ParameterAdapter:
    """The adapter that these tensors are, under their keys in a file."""
    placed = places(graph, config, transposed)
    found = sort_tensors(config, tensors).modules
    wanted = {place: name for name, place in placed.keys.items()}
    if missing := sorted(wanted.keys() - found.keys()):
        raise KeyMismatchError(f"{PREFIX}{missing[0]}: lora_A.weight, lora_B.weight missing, of {wanted[missing[0]]!r}.")
    own = {f"{PREFIX}{place}.{key}" for place in wanted for key in found[place]}
    parameters = {}
    for place, name in wanted.items():
        method, stack = placed.parameters[name]
        here = {key: brought(tensor, graph.weight(name)) for key, tensor in found[place].items()}
        parameters[name] = OnParameter(method, stack, unpack(method, stack, here, PREFIX + place))
    rest = {key: tensor for key, tensor in tensors.items() if key not in own}
    return ParameterAdapter(from_state_dict(config, rest, placed.layers), {n: parameters[n] for n in placed.parameters}, placed.keys)


def state_dict(adapter: ParameterAdapter) -> dict[str, Any]:
    """What the adapter's file holds, by key."""
    own = {
        f"{PREFIX}{adapter.keys[name]}.{key}": to_file(tensor)
        for name, (method, stack, params) in adapter.parameters.items()
        for key, tensor in pack(method, stack, params).items()
    }
    return {**all_tensors(adapter.file), **own}


def save(folder: str | os.PathLike[str], adapter: ParameterAdapter, name: str = DEFAULT) -> Path:
    """Write the adapter's two files, both or none, and say where they lie."""
    return save_tensors(folder, adapter.file.config, state_dict(adapter), adapter.file.metadata, name)


def effective(graph: Graph, adapters: Sequence[Mapping[str, OnParameter]], name: str) -> Array:
    """The parameter `name` with what all the adapters add to it: what the model runs with, and what a merge stores."""
    W = graph.weight(name)
    changed = wide(W)
    for adapter in adapters:
        if name in adapter:
            changed = changed + delta(*adapter[name])
    return as_stored(changed, W)


def places(graph: Graph, config: AdapterConfig, transposed: Collection[str]) -> Places:
    """Where `config` sends an adapter: parameters, and modules beside them."""
    method = config.method
    if not isinstance(method, LoRA):
        raise ConfigError(f"{type(method).__name__} on parameters: of LoRA alone there is that (HF PEFT refuses it too).")
    task = config.housekeeping.get("task_type")
    matched = match(config.targets, graph, peft_type=method.peft_type, task_type=task, kinds=method.kinds)
    order = {name: place for place, name in enumerate(graph.parameters())}
    found: dict[str, tuple[LoRA, Stack]] = {}
    owned: dict[str, list[str]] = {}
    for name in sorted(matched.parameters, key=lambda name: order.get(name, len(order))):
        owner, _, last = name.rpartition(".")
        own: Any = config.method_for(name)
        check(own)
        found[name] = own, stack_of(graph.parameters()[graph.resolve(name)].shape, owner in transposed)
        owned.setdefault(owner, []).append(last)
    layers = {module: layer for module in matched.modules if (layer := graph.modules()[module].layer) is not None}
    tokens = tokens_beside(config, graph)
    check_beside(replace(config, beside=tokens.methods), layers, matched.saved)
    own = {module: layer for module in tokens.methods if (layer := graph.modules()[module].layer) and module not in tokens.following}
    return Places(found, in_order(graph, {**layers, **own}), keys(owned), frozenset(own))
