"""An adapter folder: adapter_config.json and adapter_model.safetensors, as PEFT writes and reads them.

    folder/                 the adapter "default"
    folder/<name>/          every other adapter

Adapter tensors become the method's own parameters, module by module. What else is saved stays apart under its whole key: modules that
were trained whole (modules_to_save), biases (bias="all", "lora_only") and embeddings (save_embedding_layers). Every tensor has a place
or is an error. An adapter that was read is written back to the byte.

What several layers share stands in a file once. Where the layers are known, every module's parameters refer to that one array; where they
are not, nothing says which module refers to what, and it stays apart. What the configuration does not save is None.

A pickle (adapter_model.bin) is refused: unpickling runs whatever code it holds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from peft_ref.arrays import Array, namespace
from peft_ref.attending import AttentionAdapter, AttentionMethod
from peft_ref.contracts import WeightMethod
from peft_ref.errors import FileFormatError, KeyMismatchError, ShapeError, UnsupportedLayerError, naming
from peft_ref.files.atomic import committed, replace_files
from peft_ref.files.config import AdapterConfig, parse, render
from peft_ref.files.infer import infer_layer
from peft_ref.files.keys import PREFIX, SHARED_PREFIX, check_adapter_name, sort_tensors
from peft_ref.files.safetensors import RawTensor, SafetensorsFile, Tensor, open_file, serialize
from peft_ref.files.tokens import KEY, differs, once_more, tokens_at
from peft_ref.layers import Layer
from peft_ref.prompts import SAVED, Prompt
from peft_ref.reading.documents import read_bytes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (WEIGHTS, CONFIG)  # in the order they are put in place
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DEFAULT = "default"


class AdapterModule(NamedTuple):
    method: WeightMethod[Any]
    layer: Layer  # as far as the tensors tell, where no model said it
    params: Any


@dataclass(frozen=True, eq=False, kw_only=True)
class AdapterFile:
    config: AdapterConfig
    modules: Mapping[str, AdapterModule] = field(default_factory=dict)
    attention: Mapping[str, AttentionAdapter] = field(default_factory=dict)  # what is added to attention blocks, by their names
    shared: Mapping[str, Tensor] = field(default_factory=dict)  # what layers share, by key, where no model tells which of them
    prompt: Mapping[str, Tensor] = field(default_factory=dict)  # a prompt's own tensors, for its method in inference mode
    modules_to_save: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})


def state_dict(modules: Mapping[str, AdapterModule]) -> dict[str, Array]:
    """What a file holds of the modules' parameters, under their keys in it, in their stored shapes."""
    beside, shared = dict[str, Array](), dict[str, Array]()
    keys: Mapping[str, Mapping[str, str]] | None = None
    for name, (method, layer, params) in modules.items():
        if not any(spec.saved for spec in method.spec(layer)):
            continue
        packed, own = method.pack(layer, params), dict[str, Array]()
        keys = method.shared_keys(tuple(modules)) if keys is None else keys
        for spec in method.spec(layer):
            if spec.key not in packed or not spec.saved:
                continue
            if spec.shared:
                shared[f"{SHARED_PREFIX}{keys[name][spec.field]}"] = packed[spec.key]
            if spec.repeated or not spec.shared:
                own[spec.key] = packed[spec.key]
        beside |= {f"{PREFIX}{name}.{key}": value for key, value in method.in_file(own).items()}
    return {**beside, **shared}


def link(modules: Mapping[str, AdapterModule], shared: Mapping[str, Array]) -> dict[str, AdapterModule]:
    """The modules, each with references to what it shares, which is there by key. What a file leaves out may be missing."""
    linked, used = dict[str, AdapterModule](), set[str]()
    keys: Mapping[str, Mapping[str, str]] | None = None
    for name, module in modules.items():
        keys = module.method.shared_keys(tuple(modules)) if keys is None else keys
        given: dict[str, Array] = {}
        for spec in module.method.spec(module.layer):
            if not spec.shared:
                continue
            key = keys[name][spec.field]
            if key not in shared:
                if spec.saved:
                    raise KeyMismatchError(f"{SHARED_PREFIX}{key} missing, which {name!r} shares.\n  Came: {', '.join(shared) or 'none'}.")
            elif not spec.saved:
                raise KeyMismatchError(
                    f"{SHARED_PREFIX}{key} is there, and the configuration says that it is not saved, so that HF PEFT reads over it.\n"
                    "  Take it out, or say in the configuration that it is saved."
                )
            elif (came := tuple(shared[key].shape)) != spec.stored_shape:
                raise ShapeError(f"{SHARED_PREFIX}{key} is {came}, expected {spec.stored_shape}.\n  {module.method} at {name!r}.")
            elif (beside := getattr(module.params, spec.field)) is not None and not bool(namespace(beside).all(beside == shared[key])):
                raise KeyMismatchError(f"{PREFIX}{name}.{spec.key} is not {SHARED_PREFIX}{key}, of which it is a copy.\n  Make them equal.")
            else:
                given[spec.field] = namespace(shared[key]).reshape(shared[key], spec.shape) if spec.shape != came else shared[key]
            used.add(key)
        linked[name] = module._replace(params=module.params._replace(**given)) if given else module
    if extra := sorted(shared.keys() - used):
        raise KeyMismatchError(f"{SHARED_PREFIX}{extra[0]}: no module shares it, nor {len(extra) - 1} more.\n  Another model's adapter?")
    return linked


def from_state_dict(config: AdapterConfig, tensors: Mapping[str, Tensor], layers: Mapping[str, Layer] | None = None) -> AdapterFile:
    """Undoes `state_dict`. `layers` are the adapted modules' layers by name; without them their shapes are read off the tensors."""
    found = sort_tensors(config, _each_once(tensors))
    config = with_tokens_of(config, found.modules)
    if isinstance(config.method, Prompt):
        table = found.prompt.get(SAVED)
        fitted = config.method if table is None else config.method.fitted(tuple(table.shape))
        prompt = fitted.loaded(_checked_dtypes(found.prompt, ""))
        return AdapterFile(config=config, prompt=prompt, modules_to_save=found.modules_to_save, embeddings=found.embeddings)
    if isinstance(config.method, AttentionMethod):
        blocks = {name: _of_block(config.method, own, name) for name, own in found.modules.items()}
        return AdapterFile(config=config, attention=blocks, modules_to_save=found.modules_to_save, embeddings=found.embeddings)
    if layers is None and config.targets.target_parameters:
        raise UnsupportedLayerError(
            f"target_parameters={list(config.targets.target_parameters)}: tensors do not tell which parameter they belong to."
            "\n  Use peft_ref.model.parameters.load with the model."
        )
    if layers is not None:
        silent: dict[str, Mapping[str, Tensor]] = {
            n: {} for n, la in layers.items() if all(s.shared or not s.saved for s in config.method_for(n).spec(la))
        }
        found = found._replace(modules={**silent, **found.modules})  # a method may save nothing beside a layer
        _check_modules(config, found.modules, layers)
    alone, config = config, spanned(config, layers, {key: tuple(tensor.shape) for key, tensor in found.shared.items()})
    _checked_dtypes(found.shared, SHARED_PREFIX)
    modules = {}
    for name, own in found.modules.items():
        if "base_layer" in name.split("."):
            raise UnsupportedLayerError(
                f"{PREFIX}{name}.{min(own)}: an adapter inside an adapted layer belongs to a MultiheadAttention or to"
                " target_parameters.\n  Use peft_ref.model.blocks, or peft_ref.model.parameters, with the model."
            )
        method = config.method_for(name)
        own = method.from_file(_checked_dtypes(own, f"{PREFIX}{name}."))
        layer = infer_layer(alone.method_for(name), own, name) if layers is None else layers[name]
        method.check_layer(layer, name)
        modules[name] = AdapterModule(method, layer, method.unpack(layer, own, where=PREFIX + name, own=True))
    return AdapterFile(
        config=config,
        modules=modules if layers is None else link({name: modules[name] for name in layers}, found.shared),
        shared=found.shared if layers is None else {},
        modules_to_save=found.modules_to_save,
        biases=found.biases,
        embeddings=found.embeddings,
    )


def _each_once(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without the rows that are there once more."""
    copies = once_more(tensors)
    for key, own in copies.items():
        a, b = (_checked_dtypes({name: tensors[name]}, "")[name] for name in (key, own))
        if tuple(a.shape) != tuple(b.shape) or not bool(namespace(b).all(a == b)):
            raise KeyMismatchError(differs(key, own))
    return {key: tensor for key, tensor in tensors.items() if key not in copies} if copies else tensors


def with_tokens_of(config: AdapterConfig, modules: Mapping[str, Mapping[str, Tensor]]) -> AdapterConfig:
    """`config` that knows which modules have trained tokens, by their keys in a file, where no model has told it."""
    if not config.tokens or config.beside:
        return config
    there = [name for name, own in modules.items() if KEY in own]
    found = tokens_at(config.tokens, there)
    if unnamed := [name for name in there if name not in found]:
        raise KeyMismatchError(
            f"{PREFIX}{unnamed[0]}.{KEY}: trainable_token_indices names {', '.join(config.tokens)}, and no {unnamed[0]!r}.\n"
            "  The file belongs to another configuration."
        )
    return replace(config, beside=found)


def spanned(config: AdapterConfig, layers: Mapping[str, Layer] | None, shapes: Mapping[str, tuple[int, ...]]) -> AdapterConfig:
    """`config` whose method knows how much its layers share: from the layers, or else from the shapes in a file."""
    method = config.method
    if not isinstance(method, WeightMethod):
        return config
    known = method.spanned_by(shapes) if layers is None else method.spanning(layers)
    return config if known == method else replace(config, method=known)


def _of_block(method: AttentionMethod[Any], own: Mapping[str, Tensor], name: str) -> AttentionAdapter:
    tensors = _checked_dtypes(own, f"{PREFIX}{name}.")
    return AttentionAdapter(method, method.unpack(method.hidden_size_of(tensors), tensors, where=PREFIX + name))


def attention_state_dict(blocks: Mapping[str, AttentionAdapter]) -> dict[str, Array]:
    """The parameters of every block's adapter under their keys in a file."""
    return {f"{PREFIX}{name}.{key}": tensor for name, a in blocks.items() for key, tensor in a.method.pack(a.params).items()}


def all_tensors(adapter: AdapterFile) -> dict[str, Tensor]:
    """Everything that the adapter's file holds, by key."""
    method = adapter.config.method
    prompt = method.in_inference().saved(adapter.prompt) if isinstance(method, Prompt) else {}
    blocks = attention_state_dict(adapter.attention)
    shared = {f"{SHARED_PREFIX}{key}": tensor for key, tensor in adapter.shared.items()}
    return {**shared, **state_dict(adapter.modules), **blocks, **prompt, **adapter.modules_to_save, **adapter.biases, **adapter.embeddings}


def load_config(folder: str | os.PathLike[str], name: str = DEFAULT) -> AdapterConfig:
    """Read only the configuration of the adapter called `name`; its weights need not be there."""
    place = _place(Path(folder), name)
    path = committed(place, CONFIG, FILES)
    if not path.is_file():
        raise FileFormatError(f"{place} has no {CONFIG}.\n  Adapters there: {', '.join(adapter_names(folder)) or 'none'}.")
    return parse(read_bytes(path), str(path))


def open_adapter(folder: str | os.PathLike[str], name: str = DEFAULT) -> SafetensorsFile:
    """Open the tensors of the adapter called `name`: only their header is read."""
    place = _place(Path(folder), name)
    weights_path = committed(place, WEIGHTS, FILES)
    if not weights_path.is_file():
        pickles = sorted(p.name for p in place.iterdir() if p.suffix in PICKLES) if place.is_dir() else []
        raise FileFormatError(f"{place} has no {WEIGHTS}." + (_pickle_remedy(pickles[0]) if pickles else "\n  Save the adapter again."))
    return open_file(weights_path)


def load_adapter(folder: str | os.PathLike[str], name: str = DEFAULT, layers: Mapping[str, Layer] | None = None) -> AdapterFile:
    """Read the adapter called `name` from a folder. `layers` as in `from_state_dict`."""
    config = load_config(folder, name)
    file = open_adapter(folder, name)
    with naming(file.path):
        adapter = from_state_dict(config, {key: file.tensor(key) for key in file.entries}, layers)
    return AdapterFile(**{**vars(adapter), "metadata": file.metadata})


def save_adapter(folder: str | os.PathLike[str], adapter: AdapterFile, name: str = DEFAULT) -> Path:
    """Write an adapter's two files, both or none, and say where they lie."""
    return save_tensors(folder, adapter.config, all_tensors(adapter), adapter.metadata, name)


def save_tensors(
    folder: str | os.PathLike[str], config: AdapterConfig, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str = DEFAULT
) -> Path:
    """`save_adapter` of tensors under their keys in a file."""
    place = _place(Path(folder), name)
    replace_files(place, {WEIGHTS: serialize(tensors, metadata), CONFIG: render(config).encode()})
    return place


def adapter_names(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """The adapters saved in a folder: itself as "default", and its sub-folders."""
    folder = Path(folder)
    here = (DEFAULT,) if (folder / CONFIG).is_file() else ()
    below = sorted(p.name for p in folder.iterdir() if (p / CONFIG).is_file()) if folder.is_dir() else []
    return here + tuple(name for name in below if not name.startswith("."))


def _checked_dtypes(tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    """`tensors`, if NumPy has the dtype of each."""
    for key, tensor in tensors.items():
        if isinstance(tensor, RawTensor):
            raise FileFormatError(f"{prefix}{key} is {tensor.dtype}, which is no NumPy dtype here.\n  Convert the adapter to F32.")
    return tensors


def _place(folder: Path, name: str) -> Path:
    check_adapter_name(name)
    return folder if name == DEFAULT else folder / name


def _check_modules(config: AdapterConfig, found: Mapping[str, Any], layers: Mapping[str, Layer]) -> None:
    if missing := sorted(layers.keys() - found.keys()):
        keys = [spec.key for spec in config.method_for(missing[0]).spec(layers[missing[0]])]
        raise KeyMismatchError(
            f"{PREFIX}{missing[0]}: {', '.join(keys)} missing, and so for {len(missing) - 1} more modules.\n"
            "  The file was made for other target modules, or another model."
        )
    if extra := sorted(found.keys() - layers.keys()):
        raise KeyMismatchError(
            f"{PREFIX}{extra[0]}.{min(found[extra[0]])}: the model adapts no module {extra[0]!r}, nor {len(extra) - 1} more.\n"
            "  The file was made for other target modules, or another model."
        )


def _pickle_remedy(name: str) -> str:
    return (
        f" There is {name}, a pickle, and unpickling runs whatever code it holds: not read.\n"
        "  In a sandbox, torch.load(weights_only=True) it and save it with safetensors.torch.save_file."
    )
