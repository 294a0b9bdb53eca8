"""The keys of an adapter's tensors: what each one belongs to, told by its structure alone.

    base_model.model.<module path>.lora_A.weight                in a file
    base_model.model.<module path>.lora_A.<adapter>.weight      in PEFT's memory: the adapter's name follows the parameter's own
    base_model.model.<module path>.token_adapter.trainable_tokens_delta  the rows of trained tokens, beside another method (`tokens.py`)
    base_model.vera_A, base_model.tinylora_v.0                  what several layers share, once
    prompt_embeddings                                           a prompt's, which belongs to no module
    base_model.<module path>.weight                             beside a prompt, a module that was trained whole, or an embedding

HF      drops other adapters' keys where ".<name>." occurs anywhere, so beside an adapter called "0" every `layers.0.*` is lost from the
        saved file. Here a name is one only where a name can be.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import NamedTuple, get_args, get_type_hints

from peft_ref.attending import AttentionMethod
from peft_ref.contracts import Key, Method, WeightMethod, declared
from peft_ref.errors import ConfigError, KeyMismatchError
from peft_ref.files.config import AdapterConfig
from peft_ref.files.removed import name_of_today
from peft_ref.files.safetensors import Tensor
from peft_ref.files.tokens import KEY, WRAPPER
from peft_ref.prompts import Prompt

PREFIX = "base_model.model."
PROMPT_PREFIX = SHARED_PREFIX = "base_model."
# Tables that PEFT saves as a whole when they are adapted or were resized (save_embedding_layers), under their usual names.
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out", "tok_embeddings", "embeddings")
MAGNITUDE = "lora_magnitude_vector"  # DoRA's, a module in PEFT's memory and a bare parameter in its files


class Sorted(NamedTuple):
    """The tensors of a file by what they are. Adapter tensors by module and key; the others under their whole key."""

    modules: Mapping[str, Mapping[str, Tensor]]
    modules_to_save: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    embeddings: Mapping[str, Tensor]
    prompt: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]  # by the key below "base_model."


def sort_tensors(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> Sorted:
    """Which tensor is what. One that is nothing the configuration asks for is an error."""
    if isinstance(config.method, Prompt):
        return _sorted_prompt(config, config.method, tensors)
    found, strangers = told_apart(config, tensors)
    if strangers:
        raise KeyMismatchError(next(iter(strangers.values())))
    return found


def told_apart(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> tuple[Sorted, dict[str, str]]:
    """Which tensor is what, and every key that is nothing the configuration asks for, with why."""
    found, strangers = Sorted({}, {}, {}, {}, {}, {}), dict[str, str]()
    known, common = parameter_keys(type(config.method)), shared_keys(type(config.method))
    known |= {KEY} if config.tokens else set()
    shared: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, str] = {}
    for key in sorted(tensors):
        if _is_shared(key, common):
            shared[key.removeprefix(SHARED_PREFIX)] = tensors[key]
            continue
        if not key.startswith(PREFIX):
            strangers[key] = f"{key!r} does not begin with {PREFIX!r}, as every key of a PEFT adapter does.\n  Not PEFT's format?"
            continue
        name = name_of_today(key.removeprefix(PREFIX)) if config.method.peft_type == "MISS" else key.removeprefix(PREFIX)
        place = _parameter(name, known, config)
        if place is None:
            rest[key] = name
        else:
            modules.setdefault(place[0], {})[place[1]] = tensors[key]
    of_tables = parameter_keys(type(config.method), only_embedding=True) | {KEY}
    tables = {module for module, own in modules.items() if own.keys() & of_tables}
    for key, name in rest.items():
        kind = _other(name, config, tables)
        if kind is None:
            saved, bias = list(config.targets.modules_to_save or ()), config.housekeeping.get("bias", "none")
            strangers[key] = (
                f"{key!r} is no parameter of {type(config.method).__name__}, in no module of modules_to_save={saved},\n"
                f"  no bias (bias={bias!r}) and no embedding. Remove it, or name its module in modules_to_save."
            )
            continue
        getattr(found, kind)[key] = tensors[key]
    return found._replace(modules=modules, shared=shared), strangers


def _sorted_prompt(config: AdapterConfig, method: Prompt, tensors: Mapping[str, Tensor]) -> Sorted:
    found = Sorted({}, {}, {}, {}, {}, {})
    for key in sorted(tensors):
        kind = "prompt" if key in method.file_keys else _beside_prompt(key, config)
        if kind is None:
            raise KeyMismatchError(
                f"{key!r} is no tensor of {type(method).__name__}, which saves {', '.join(sorted(method.file_keys))}, is in no module of\n"
                f"  modules_to_save={list(config.targets.modules_to_save or ())}, and no embedding."
                f" Remove it, or name its module in modules_to_save: {PROMPT_PREFIX}<module>.weight."
            )
        getattr(found, kind)[key] = tensors[key]
    if missing := sorted(method.file_keys - found.prompt.keys()):
        raise KeyMismatchError(
            f"{', '.join(missing)} missing, which {type(method).__name__} saves.\n"
            f"  Came: {', '.join(sorted(tensors)) or 'nothing'}. The file belongs to another method, or to a checkpoint of the whole model."
        )
    return found


def _beside_prompt(key: str, config: AdapterConfig) -> str | None:
    name = key.removeprefix(PROMPT_PREFIX)
    if name == key:
        return None
    if _is_saved(name, config):
        return "modules_to_save"
    return "embeddings" if name.endswith(".weight") and name.split(".")[-2] in EMBEDDINGS else None


@cache
def parameter_keys(cls: type[Method], only_embedding: bool = False) -> frozenset[str]:
    """Every key a parameter of this method can have, or those that only an embedding has."""
    if not issubclass(cls, WeightMethod | AttentionMethod):
        return frozenset()
    hints = get_type_hints(cls.params_type, include_extras=True).values()
    keys = [extra for hint in hints for extra in get_args(hint)[1:] if isinstance(extra, Key)]
    return frozenset(key.key for key in keys if not only_embedding or key.kinds == {"embedding"})


def shared_keys(cls: type[Method]) -> frozenset[str]:
    """The keys of what the layers of this method share; of several groups' the part before the group."""
    if not issubclass(cls, WeightMethod):
        return frozenset()
    return frozenset(key.key for _, keys in declared(cls.params_type).values() for key in keys if key.shared)


def _is_shared(key: str, common: frozenset[str]) -> bool:
    name = key.removeprefix(SHARED_PREFIX)
    return name != key and (name in common or any(name.startswith(f"{own}.") for own in common))


def parameter_name(key: str, prefix: str = PREFIX) -> str:
    """The model's own name for what a key of `modules_to_save`, `biases` or `embeddings` holds; beside a prompt give PROMPT_PREFIX."""
    *path, last = key.removeprefix(prefix).split(".")
    wrappers = next((n for n in (2, 1) if path[-n:] == [WRAPPER, "base_layer"][-n:]), 0)
    return ".".join([*path[: len(path) - wrappers], last])


def with_adapter_name(key: str, adapter: str, tuner_prefix: str) -> str:
    """A file's key of an adapter tensor as PEFT has it in memory."""
    check_adapter_name(adapter)
    parts = key.split(".")
    if parts[-1] == MAGNITUDE:
        return f"{key}.{adapter}.weight"
    at = next((at for at in range(len(parts), 0, -1) if parts[at - 1].startswith(tuner_prefix)), len(parts) - 1)
    return ".".join([*parts[:at], adapter, *parts[at:]])


def without_adapter_name(key: str, adapter: str, tuner_prefix: str) -> str:
    """Undoes `with_adapter_name`; a key that holds no adapter name there stays as it is."""
    parts = key.removesuffix(".weight").split(".") if key.endswith(f".{MAGNITUDE}.{adapter}.weight") else key.split(".")
    for back in (1, 2, 3):
        at = len(parts) - back
        if back == 3 and not parts[-2].isdigit():  # one of a list: peanut_encoders.<adapter>.0.weight
            break
        if at > 0 and parts[at] == adapter and parts[at - 1].startswith(tuner_prefix):
            return ".".join([*parts[:at], *parts[at + 1 :]])
    return key


def check_adapter_name(adapter: str) -> None:
    if not adapter or adapter in (".", "..") or set(adapter) & {".", "/", "\\", "\0"}:
        raise ConfigError(f"an adapter cannot be called {adapter!r}: the name is a part of keys and a folder.\n  Use no dots or slashes.")


def _parameter(name: str, known: frozenset[str], config: AdapterConfig) -> tuple[str, str] | None:
    """(module path, parameter key), if the last one to three parts of the name are a parameter of the method, or look like one."""
    parts = name.split(".")
    ends = [(".".join(parts[:-n]), ".".join(parts[-n:])) for n in (1, 2, 3) if len(parts) > n]
    looks = [end for end in ends if end[1].startswith(config.method.tuner_prefix) and not _is_saved(name, config)]
    return next((end for end in ends if end[1] in known), looks[0] if looks else None)


def _is_saved(name: str, config: AdapterConfig) -> bool:
    """Whether a module above it is in modules_to_save, which may be called lora_head; PEFT asks for no dot before the name."""
    path, saved = name.split(".")[:-1], tuple(config.targets.modules_to_save or ())
    return any(".".join(path[: n + 1]).endswith(saved) for n in range(len(path)))


def _other(name: str, config: AdapterConfig, tables: Collection[str]) -> str | None:
    if _is_saved(name, config):
        return "modules_to_save"
    if name.endswith(".bias") and config.housekeeping.get("bias", "none") != "none":
        return "biases"
    module, _, last = parameter_name(name).rpartition(".")
    adapted = name in (f"{module}.base_layer.{last}", f"{module}.{WRAPPER}.base_layer.{last}")
    if last in ("weight", "bias") and (module.rpartition(".")[2] in EMBEDDINGS or (adapted and module in tables)):
        return "embeddings"
    return None
