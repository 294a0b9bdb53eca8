"""An adapter on torch's MultiheadAttention blocks: which blocks it is on, from and to a file, and what their weights are with it.

    adapter = load(graph, folder)                           PEFT's folder; also one that adapts layers beside the blocks
    effective(graph, [adapter.blocks], name)                the parameter `name`, a block's in_proj_weight or out_proj.weight, as the block
                                                            uses it, and as a merge stores it
    save(folder, adapter)                                   the folder that PEFT's save_pretrained writes

A block is a module that owns an in_proj_weight (3 E, E). The mathematics is in `methods/lora_attention.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from peft_ref.arrays import Array
from peft_ref.errors import ConfigError, KeyMismatchError, TargetError, naming
from peft_ref.files.adapter import DEFAULT, AdapterFile, all_tensors, from_state_dict, load_config, open_adapter, save_tensors
from peft_ref.files.config import AdapterConfig
from peft_ref.files.keys import PREFIX, sort_tensors
from peft_ref.graph.decide import TARGET
from peft_ref.graph.protocol import Graph
from peft_ref.graph.rules import rules_for
from peft_ref.layers import Layer
from peft_ref.methods.lora import LoRA
from peft_ref.methods.lora_attention import BlockParams, merged, pack, unpack
from peft_ref.model.numbers import as_stored, brought, to_file, wide

INTO, OUT = "in_proj_weight", "out_proj.weight"
INSIDE = ".base_layer.out_proj"


class OnBlock(NamedTuple):
    """What an adapter has for one block."""

    method: LoRA
    embed_dim: int
    params: BlockParams


class BlockAdapter(NamedTuple):
    file: AdapterFile  # its configuration, and what it has beside the blocks
    blocks: Mapping[str, OnBlock]  # by the blocks' names


def load(graph: Graph, folder: str | os.PathLike[str], name: str = DEFAULT) -> BlockAdapter:
    """The adapter called `name` in a folder."""
    file = open_adapter(folder, name)
    with naming(file.path):
        adapter = read(graph, load_config(folder, name), {key: file.tensor(key) for key in file.entries})
    return adapter._replace(file=replace(adapter.file, metadata=file.metadata))


def read(graph: Graph, config: AdapterConfig, tensors: Mapping[str, Any]) -> BlockAdapter:
    """The adapter that these tensors are, under their keys in a file."""
    targets, layers = _places(graph, config)
    found = sort_tensors(config, tensors).modules
    blocks, own = {}, set[str]()
    for block in targets:
        W = graph.weight(f"{block}.{INTO}")
        here = {**found.get(block, {}), **{f"{INSIDE[1:]}.{key}": tensor for key, tensor in found.get(block + INSIDE, {}).items()}}
        if not here:
            raise KeyMismatchError(f"{PREFIX}{block}: lora_A.weight missing.\n  The file was made for other target modules.")
        method: Any = config.method_for(block)
        params = unpack(method, W.shape[1], {key: brought(tensor, W) for key, tensor in here.items()}, PREFIX + block)
        blocks[block] = OnBlock(method, W.shape[1], params)
        own |= {f"{PREFIX}{block}.{key}" for key in here}
    return BlockAdapter(from_state_dict(config, {key: t for key, t in tensors.items() if key not in own}, layers), blocks)


def state_dict(adapter: BlockAdapter) -> dict[str, Any]:
    """What the adapter's file holds, by key."""
    own = {f"{PREFIX}{name}.{key}": to_file(tensor) for name, block in adapter.blocks.items() for key, tensor in pack(*block).items()}
    return {**all_tensors(adapter.file), **own}


def save(folder: str | os.PathLike[str], adapter: BlockAdapter, name: str = DEFAULT) -> Path:
    """Write the adapter's two files, both or none, and say where they lie."""
    return save_tensors(folder, adapter.file.config, state_dict(adapter), adapter.file.metadata, name)


def effective(graph: Graph, adapters: Sequence[Mapping[str, OnBlock]], name: str) -> Array:
    """The parameter `name` with what all the adapters add to it."""
    which = next((end for end in (INTO, OUT) if name.endswith(f".{end}")), None)
    if which is None:
        raise TargetError(f"{name!r} is no {INTO} and no {OUT} of a block.")
    block, stored = name.removesuffix(f".{which}"), graph.weight(name)
    into, out = wide(graph.weight(f"{block}.{INTO}")), wide(graph.weight(f"{block}.{OUT}"))
    for adapter in adapters:
        if block in adapter:
            method, embed_dim, params = adapter[block]
            into, out = merged(method, embed_dim, params, into, out)
    return as_stored(into if which == INTO else out, stored)


def _places(graph: Graph, config: AdapterConfig) -> tuple[list[str], dict[str, Layer]]:
    """The blocks, and the layers beside them."""
    if not isinstance(config.method, LoRA):
        raise ConfigError(f"{type(config.method).__name__} on MultiheadAttention: of LoRA alone there is that (HF PEFT refuses it too).")
    rules = rules_for(config.targets, graph, config.method.peft_type, config.housekeeping.get("task_type"))
    chosen = [name for name in graph.modules() if rules.decide(name).outcome == TARGET]
    blocks = [name for name in chosen if f"{name}.{INTO}" in graph.parameters()]
    if not blocks:
        raise TargetError("the targets are no MultiheadAttention.\n  Use peft_ref.model.load for layers.")
    others = [(name, graph.modules()[name].layer) for name in chosen if name not in blocks]
    return blocks, {name: layer for name, layer in others if layer is not None}
