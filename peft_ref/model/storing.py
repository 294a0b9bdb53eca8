"""Adapters of a model from and to HF's files.

load    the adapter in a folder comes onto the model, under any name; with `lazy` its tensors stay in the file until they are asked for
save    the folder that HF's PeftModel.save_pretrained writes: the adapter "default" into it, any other into a folder below, by its name

A file holds, beside the adapter's parameters:
    copies of modules_to_save               under the modules' own names, with their buffers (a running mean)
    biases, for bias="all" or "lora_only"   those of adapted layers as base_layer.bias; loading puts them into the frozen weights
    embeddings                              HF's save_embedding_layers="auto": the tables that a transformers model adapts, but of trained
                                            tokens none; the same

HF      loads what it finds, warns of what is missing and forgets the rest; here a tensor too few or too many is an error. With bias="all"
        HF saves the biases of modules_to_save twice more ("original_module.bias", "modules_to_save.bias"); they are read over.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from peft_ref.arrays import Array
from peft_ref.attending import AttentionAdapter
from peft_ref.contracts import WeightMethod
from peft_ref.errors import FileFormatError, KeyMismatchError, naming
from peft_ref.files.adapter import (
    DEFAULT,
    AdapterFile,
    AdapterModule,
    all_tensors,
    from_state_dict,
    load_config,
    open_adapter,
    save_adapter,
)
from peft_ref.files.config import AdapterConfig
from peft_ref.files.keys import EMBEDDINGS, PREFIX, parameter_name, shared_keys, sort_tensors
from peft_ref.files.rules import field_names
from peft_ref.files.safetensors import RawTensor, Tensor
from peft_ref.files.tokens import KEY, WRAPPER, TokensBeside
from peft_ref.graph.patterns import Matcher
from peft_ref.graph.tying import ASKING
from peft_ref.methods.trainable_tokens import TrainableTokens
from peft_ref.model.adapted import Adapted
from peft_ref.model.attaching import in_block, joined, started, weight_in, weight_name
from peft_ref.model.lazy import LazyModules, read_later
from peft_ref.model.numbers import as_stored, brought, to_file
from peft_ref.model.placing import Placed, bias_of, check_new, place
from peft_ref.model.sharing import brought_modules, completed, given_apart
from peft_ref.model.ties import Ties

REPEATED = frozenset({"original_module", "modules_to_save"})  # inside HF's wrapper; of bias="all" its biases are saved under these too


def load(
    model: Adapted,
    folder: str | os.PathLike[str],
    name: str = DEFAULT,
    *,
    subfolder: str = DEFAULT,
    trainable: bool = False,
    lazy: bool = False,
    ties: Ties = "refuse",
) -> Adapted:
    """`model` with the adapter that lies in `folder`, or in its `subfolder`, under `name`."""
    with naming(folder if subfolder == DEFAULT else Path(folder) / subfolder):
        return _loaded(model, folder, name, subfolder, trainable, lazy, ties)


def _loaded(model: Adapted, folder: str | os.PathLike[str], name: str, subfolder: str, trainable: bool, lazy: bool, ties: Ties) -> Adapted:
    config = _trained(load_config(folder, subfolder), trainable)
    check_new(model, name, config)
    placed = place(model, config)
    file = open_adapter(folder, subfolder)
    another = isinstance(config.method, WeightMethod) and config.method.saves_another_form
    another |= any(f"{PREFIX}{head}.{key}" in file.entries for head in placed.following for key in (KEY, TrainableTokens.key))
    if not lazy or placed.blocks or another:  # what is on attention blocks is small and read at once
        return _attached(model, name, placed, _read(placed, {key: file.tensor(key) for key in file.entries}), None, trainable, ties)
    specs = {m: placed.config.method_for(m).spec(layer) for m, layer in placed.layers.items()}
    keys = {f"{PREFIX}{m}.{s.key}" for m, own in specs.items() for s in read_later(own)}
    again = {f"{PREFIX}{m}.{s.key}" for m, own in specs.items() for s in own if s.repeated}
    if missing := sorted(keys - file.entries.keys()):
        raise KeyMismatchError(f"{file.path}: {missing[0]} missing, and {len(missing) - 1} more.\n  It was made for other target modules.")
    beside = _read(placed._replace(layers={}), {key: file.tensor(key) for key in file.entries.keys() - keys - again})
    like = model.frozen(weight_name(model, next(iter(placed.layers)))) if placed.layers else np.zeros(0)
    given = given_apart(model, placed, beside.shared, like)
    return _attached(
        model, name, placed, beside, LazyModules(file, placed.config, placed.layers, like, given, placed.following), trainable, ties
    )


def attach(model: Adapted, name: str, file: AdapterFile, *, trainable: bool = False, ties: Ties = "refuse") -> Adapted:
    """`model` with an adapter that was read, or made, without a model."""
    config = _trained(file.config, trainable)
    check_new(model, name, config)
    placed = place(model, config)
    return _attached(model, name, placed, _read(placed, all_tensors(file)), None, trainable, ties)


def save(model: Adapted, folder: str | os.PathLike[str], name: str = DEFAULT, *, embeddings: bool | Literal["auto"] = "auto") -> Path:
    """Write the adapter `name`, and say where it lies."""
    return save_adapter(folder, adapter_file(model, name, embeddings=embeddings), name)


def adapter_file(model: Adapted, name: str, *, embeddings: bool | Literal["auto"] = "auto") -> AdapterFile:
    """The adapter `name` as its file holds it."""
    adapter = model.attached(name)
    config = replace(adapter.config, housekeeping={**adapter.config.housekeeping, "inference_mode": True})
    copies = {**adapter.saved, **{second: adapter.saved[first] for second, first in adapter.tied.items()}}
    tables = _embeddings(model, config, embeddings)
    modules = _as_numpys(adapter.modules) if isinstance(config.method, WeightMethod) and config.method.swaps else adapter.modules
    return AdapterFile(
        config=config,
        modules={**modules, **_heads_beside(modules, tables, adapter.following)} if adapter.following else modules,
        attention=adapter.blocks,
        modules_to_save={f"{PREFIX}{key}": to_file(copy) for key, copy in copies.items()},
        biases={_stored_key(model, key): to_file(model.frozen(key)) for key in _biases(model, config, copies)},
        embeddings={_stored_key(model, key): to_file(model.frozen(key)) for key in tables},
    )


def _heads_beside(modules: Mapping[str, AdapterModule], tables: list[str], following: Mapping[str, str]) -> dict[str, AdapterModule]:
    """The heads that are saved whole, beside which HF saves the rows that they have of the table once more."""
    heads = {head: method for head in following if f"{head}.weight" in tables and isinstance(method := modules[head].method, TokensBeside)}
    return {head: modules[head]._replace(method=replace(method, own=True)) for head, method in heads.items()}


def _as_numpys(modules: Mapping[str, AdapterModule]) -> dict[str, AdapterModule]:
    """Numbers of 16 bits, which a library has and NumPy has not."""
    return {name: m._replace(params=type(m.params)(*(None if v is None else to_file(v) for v in m.params))) for name, m in modules.items()}


def state_dict(model: Adapted, name: str) -> dict[str, Tensor]:
    """What the adapter's file holds, by key: HF's get_peft_model_state_dict."""
    return all_tensors(adapter_file(model, name))


def _attached(
    model: Adapted,
    name: str,
    placed: Placed,
    file: AdapterFile,
    lazy: Mapping[str, AdapterModule] | None,
    trainable: bool,
    ties: Ties,
) -> Adapted:
    modules: dict[str, AdapterModule] = {}
    if lazy is None:
        likes = {module: model.frozen(weight_name(model, module)) for module in placed.layers}
        modules = completed(model, placed, brought_modules({name: file.modules[name] for name in placed.layers}, likes))
    for module, layer in placed.layers.items():
        if _may_change_weight(placed.config):
            model, _ = started(model, module, layer, placed.config, np.random.default_rng(0), ties)
    blocks = {block: brought_to(model, block, found) for block, found in file.attention.items()}
    saved, frozen = beside(file, placed.tied)
    saved = {name: _like(model, name, tensor) for name, tensor in saved.items()}
    loaded = joined(
        model,
        name,
        placed,
        modules if lazy is None else lazy,
        blocks=blocks,
        saved={key: value for key, value in saved.items() if not REPEATED & set(key.split("."))},
        biases={model.base.resolve(key): _like(model, key, tensor) for key, tensor in frozen.items()},
        trainable=trainable,
    )
    if not trainable:
        return loaded
    return replace(loaded, adapters={**loaded.adapters, name: replace(loaded.adapters[name], trainable=True)})


def _trained(config: AdapterConfig, trainable: bool) -> AdapterConfig:
    return replace(config, housekeeping={**config.housekeeping, "inference_mode": not trainable})


def _read(placed: Placed, tensors: Mapping[str, Tensor]) -> AdapterFile:
    """The tensors as what they are. With no layers, those that are no adapter's."""
    if placed.layers:
        return from_state_dict(placed.config, tensors, placed.layers)
    if placed.blocks:
        return read_blocks(placed.config, tensors, placed.blocks)
    found = sort_tensors(placed.config, tensors)
    if found.modules:
        module, own = next(iter(found.modules.items()))
        raise KeyMismatchError(
            f"{PREFIX}{module}.{min(own)}: the model adapts no such module.\n  The file was made for other target modules."
        )
    return AdapterFile(**{**found._asdict(), "config": placed.config})


def beside(file: AdapterFile, tied: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a file holds beside the adapter, by the parameters' own names: copies, those that are tied too, and frozen weights."""
    saved = {parameter_name(key): tensor for key, tensor in file.modules_to_save.items()}
    other = {parameter_name(key): tensor for key, tensor in {**file.biases, **file.embeddings}.items()}
    copies = {name: tensor for name, tensor in other.items() if name in tied}
    return {**saved, **copies}, {name: tensor for name, tensor in other.items() if name not in tied}


def read_blocks(config: AdapterConfig, tensors: Mapping[str, Tensor], blocks: Collection[str]) -> AdapterFile:
    """The tensors of an adapter on these attention blocks."""
    file = from_state_dict(config, tensors)
    if wrong := sorted(file.attention.keys() ^ set(blocks)):
        what = "is not in the file" if wrong[0] in blocks else "is in the file, and no block of the model that gets an adapter"
        raise KeyMismatchError(f"{PREFIX}{wrong[0]} {what}.\n  The file was made for another model, or for another adapter_layers.")
    return file


def brought_to(model: Adapted, block: str, found: AttentionAdapter) -> AttentionAdapter:
    """What a file holds for an attention block, as the block's own numbers are."""
    like = weight_in(model, block)
    return in_block(model, block, found.method, type(found.params)(*(as_stored(brought(p, like), like) for p in found.params)))


def _like(model: Adapted, name: str, tensor: Any) -> Array:
    """A tensor that stands for the parameter `name`, or for a buffer that the model does not show."""
    if isinstance(tensor, RawTensor):
        raise FileFormatError(f"{name} is {tensor.dtype}, which is no NumPy dtype here.\n  Convert the adapter to F32.")
    if name not in model.base.parameters() and name not in model.base.tied():
        return tensor
    frozen = model.frozen(name)
    return as_stored(brought(tensor, frozen), frozen)


def _may_change_weight(config: AdapterConfig) -> bool:
    """Whether the init has a name: one that is only on or off draws parameters and nothing else."""
    if shared_keys(type(config.method)):
        return False
    inits = [getattr(config.method, f) for f in field_names(type(config.method)) if f.startswith("init_") and f.endswith("weights")]
    cuts = isinstance(config.method, WeightMethod) and config.method.cuts_weight
    return cuts or not inits or any(isinstance(init, str) for init in inits)


def _adapted(model: Adapted) -> set[str]:
    return {module for adapter in model.adapters.values() for module in adapter.modules}


def _stored_key(model: Adapted, name: str) -> str:
    module, _, last = name.rpartition(".")
    if any(module in adapter.config.beside for adapter in model.adapters.values()):
        return f"{PREFIX}{module}.{WRAPPER}.base_layer.{last}"
    return f"{PREFIX}{module}.base_layer.{last}" if module in _adapted(model) else f"{PREFIX}{name}"


def _biases(model: Adapted, config: AdapterConfig, saved: Mapping[str, Array]) -> list[str]:
    mode = bias_of(config)
    if mode == "none":
        return []
    if mode != "all":
        return [key for key in (model.modules()[module].bias for module in model.modules() if module in _adapted(model)) if key]
    return [key for key in (*model.base.parameters(), *model.base.tied()) if f".{key}".endswith(".bias") and key not in saved]


def _embeddings(model: Adapted, config: AdapterConfig, wanted: bool | Literal["auto"]) -> list[str]:
    """The tables that are saved whole: where target_modules names one those that are adapted, elsewhere all, if they are asked for."""
    if wanted is False or not model.pretrained:
        return []
    named = _names_table(model, config.targets.target_modules)
    if wanted == "auto" and (not named or config.tokens or isinstance(config.method, TrainableTokens)):
        return []
    tables = {m for m, found in model.modules().items() if found.kind == "embedding" and m.rpartition(".")[2] in EMBEDDINGS}
    tables |= {model.output_head} if model.output_head else set()
    if named:
        tables &= {module for adapter in model.adapters.values() for module in adapter.modules if module not in adapter.config.beside}
    return [key for module in sorted(tables) if (key := model.modules()[module].weight)]


def _names_table(model: Adapted, targets: str | tuple[str, ...] | None) -> bool:
    """Whether HF finds one of its two names among the targets: a list has the bare name, a pattern matches a module's whole one."""
    if not isinstance(targets, str):
        return bool(set(ASKING) & set(targets or ()))
    matcher = Matcher()
    return any(matcher.full(targets, name) for name in model.modules() if name.rpartition(".")[2] in ASKING)
