"""An adapter folder as what it does to a base, told from its configuration and the header of its file alone.

Everything is checked here that `load` would check: every key has a place on this model, every shape fits. What is in the file is refused or
planned, never passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np

from peft_ref.attending import AttentionMethod
from peft_ref.checkpoints.pieces import Piece, pieces, same
from peft_ref.checkpoints.plan import NDArray, Source
from peft_ref.contracts import WeightMethod
from peft_ref.errors import ConfigError, KeyMismatchError, NotMergeableError, ShapeError, UnsupportedLayerError
from peft_ref.files.adapter import AdapterFile, AdapterModule, from_state_dict, load_config, open_adapter
from peft_ref.files.config import AdapterConfig
from peft_ref.files.keys import PREFIX, SHARED_PREFIX, parameter_name
from peft_ref.files.safetensors import RawTensor, Tensor, dtypes
from peft_ref.files.tokens import differs, once_more
from peft_ref.layers import Layer
from peft_ref.methods.lora import LoRA
from peft_ref.methods.lora_parameter import Stack, shapes
from peft_ref.model.adapted import Adapted
from peft_ref.model.parameters import Places, places
from peft_ref.model.placing import Placed, place, with_tokens
from peft_ref.model.storing import beside

# Architectures whose experts are stored (E, in, out); no file tells.
TRANSPOSED = frozenset({"gpt_oss", "llama4", "llama4_text"})

MOST = 6  # parameters of one module, whose orders are tried


class OnModule(NamedTuple):
    """What an adapter has at one module."""

    method: WeightMethod[Any]
    layer: Layer
    tensors: Mapping[str, Piece]  # by key
    shared: Mapping[str, Piece]  # by field, what it shares with other modules
    absent: tuple[str, ...]  # fields that are in no file


class OnParameter(NamedTuple):
    """What it has at a bare parameter."""

    method: LoRA
    stack: Stack
    A: Piece
    B: Piece


class Adapter(NamedTuple):
    source: Source
    config: AdapterConfig
    modules: Mapping[str, OnModule]
    parameters: Mapping[str, OnParameter]
    following: Mapping[str, str]  # modules whose trained tokens are those of another one, in whose weight they are
    copies: Mapping[str, Piece]  # of modules_to_save, by the parameters' own names
    tied: Mapping[str, str]  # those whose copy is that of another name
    frozen: Mapping[str, Piece]  # what takes the place of frozen parameters: trained biases, saved embeddings


def config_of(source: Source) -> AdapterConfig:
    """Its configuration, if it is one that a weight can take up."""
    config = load_config(source.folder)
    method, name = config.method, type(config.method).__name__
    if not isinstance(method, WeightMethod):
        what = "adds to what attention blocks return" if isinstance(method, AttentionMethod) else "puts vectors before the model's inputs"
        raise NotMergeableError(
            f"{source.folder}: {name} {what}, which no weight can take up (HF PEFT cannot merge it either).\n"
            "  Keep it as an adapter beside the base: PeftModel.from_pretrained(base, adapter)."
        )
    if config.housekeeping.get("layer_replication"):
        raise NotMergeableError(
            f"{source.folder}: layer_replication gives layers that are one tensor in the base adapters of their own, so that a merged\n"
            "  checkpoint would need other layers than this one has. Write out the deeper base first, or keep the adapter beside it."
        )
    return config


def modules_in(source: Source, config: AdapterConfig) -> list[str]:
    """The modules that its file names, as they are called in the live model: by the look of the keys alone."""
    found: dict[str, None] = {}
    for key in open_adapter(source.folder).entries:
        parts = key.removeprefix(PREFIX).split(".")
        ends = (n for n, part in enumerate(parts) if part == "base_layer" or part.startswith(config.method.tuner_prefix))
        found.setdefault(".".join(parts[: next(ends, -1)]))
    return list(found)


def read(model: Adapted, source: Source, config: AdapterConfig) -> Adapter:
    """What the adapter does to this model."""
    there = pieces(open_adapter(source.folder))
    placed, parameters = _placed(model, config, there)
    for key, own in once_more(there).items():
        if not same(there[key], there[own]):
            raise KeyMismatchError(f"{source.folder}: {differs(key, own)}")
    rest = {name: _hollow(p) for name, p in there.items() if not any(p in (on.A, on.B) for on in parameters.values())}
    found = from_state_dict(placed.config, rest, placed.layers)
    saved, frozen = (_pieces(part, there) for part in beside(_keyed(found), placed.tied))
    names = placed.config.method.shared_keys(tuple(found.modules)) if isinstance(placed.config.method, WeightMethod) else {}
    modules = {}
    for name, (method, layer, params) in found.modules.items():
        specs = method.spec(layer)
        keys = {s.key: f"{PREFIX}{name}.{s.key}" for s in specs if s.saved and not s.shared}
        shared = {s.field: f"{SHARED_PREFIX}{names[name][s.field]}" for s in specs if s.saved and s.shared}
        absent = tuple(s.field for s in specs if getattr(params, s.field) is None)
        if name in placed.following:
            continue
        modules[name] = OnModule(method, layer, {k: there[f] for k, f in keys.items()}, {k: there[f] for k, f in shared.items()}, absent)
    modules |= {name: _follower(name, modules[table], found.modules[name], there) for name, table in placed.following.items()}
    if source.weight != 1 and (other := [*saved, *(parameter_name(key) for key in found.biases)]):
        raise ConfigError(
            f"{source.folder}: weight {source.weight} and a whole {other[0]}, which takes the place of the base's and has no scale.\n"
            "  Use weight 1."
        )
    for second, one in placed.tied.items():
        if second in saved and one in saved and not same(saved[second], saved[one]):
            raise KeyMismatchError(f"{second} and {one} are tied, and their copies differ (HF PEFT takes one of them).\n  Give one.")
    copies = {name: tensor for name, tensor in saved.items() if name not in placed.tied}
    return Adapter(source, placed.config, modules, parameters, placed.following, copies, placed.tied, frozen)


def _follower(name: str, table: OnModule, own: AdapterModule, there: Mapping[str, Piece]) -> OnModule:
    """A head with the rows of the table it is tied to, which a file that holds both whole has once more."""
    ((key, rows),) = table.tensors.items()
    again = there.get(f"{PREFIX}{name}.{key}")
    if again is not None and not same(again, rows):
        raise KeyMismatchError(f"{again.name} and {rows.name} are of one weight, and differ (HF PEFT takes the table's).")
    return OnModule(own.method, own.layer, table.tensors, {}, ())


def _placed(model: Adapted, config: AdapterConfig, there: Mapping[str, Piece]) -> tuple[Placed, dict[str, OnParameter]]:
    """Where it goes: to modules, and to bare parameters."""
    if not config.targets.target_parameters:
        return place(model, config), {}
    graph = model.base
    turned = [name for name in graph.modules() if name.endswith("experts")] if graph.model_type in TRANSPOSED else []
    found = places(graph, config, turned)
    by_owner: dict[str, list[str]] = {}
    for name in found.parameters:
        by_owner.setdefault(name.rpartition(".")[0], []).append(name)
    parameters: dict[str, OnParameter] = {}
    for names in by_owner.values():
        parameters |= _in_order(names, found, there)
    own = {name: layer for name, layer in found.layers.items() if name not in found.tokens}
    return with_tokens(Placed(config, own), model), parameters


def _in_order(names: Sequence[str], found: Places, there: Mapping[str, Piece]) -> dict[str, OnParameter]:
    """The parameters of one module with their tensors, whose keys tell them apart by the module's own order, which no checkpoint has.

    So it is the one in which all shapes fit.
    """
    keys = sorted((found.keys[name] for name in names), key=len)
    pairs = [[f"{PREFIX}{key}.lora_{letter}.weight" for letter in "AB"] for key in keys]
    if missing := [key for pair in pairs for key in pair if key not in there]:
        raise KeyMismatchError(f"{missing[0]} missing, of {names[0]!r}.\n  The file was made for other parameters, or another model.")
    if len(names) > MOST:
        raise UnsupportedLayerError(f"{names[0]!r} and {len(names) - 1} more parameters of one module: at most {MOST} are told apart.")
    fitting = []
    for order in permutations(names):
        tensors = {name: [there[key] for key in pair] for name, pair in zip(order, pairs, strict=True)}
        given = {name: shapes(*found.parameters[name]) for name in order}
        if all((A.shape, B.shape) == tuple(given[name][:2]) for name, (A, B) in tensors.items()):
            fitting.append({name: OnParameter(*found.parameters[name], A, B) for name, (A, B) in tensors.items()})
    if len(fitting) != 1:
        came = ", ".join(f"{tuple(there[key].shape)}" for pair in pairs for key in pair)
        what = "in no order" if not fitting else "in several orders"
        raise ShapeError(f"{', '.join(names)}: tensors {came} fit them {what}.\n  Another model's adapter, or another rank than it says.")
    return fitting[0]


def _hollow(p: Piece) -> Tensor:
    """An array of that shape and dtype that takes no memory: what a header tells is enough to check it."""
    if p.dtype not in dtypes():
        return RawTensor(p.dtype, p.shape, b"")
    array: NDArray = np.broadcast_to(np.zeros((), dtypes()[p.dtype]), p.shape)
    return array


def _keyed(found: AdapterFile) -> AdapterFile:
    """What lies beside the adapter, each tensor as its own key."""
    parts: dict[str, Any] = {part: {key: key for key in getattr(found, part)} for part in ("modules_to_save", "biases", "embeddings")}
    return AdapterFile(config=found.config, **parts)


def _pieces(part: Mapping[str, Any], there: Mapping[str, Piece]) -> dict[str, Piece]:
    return {name: there[key] for name, key in part.items()}
