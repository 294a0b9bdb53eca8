"""The corpus by name: `ADAPTERS` and `CHECKPOINTS`, each a maker of a folder, and where what is hostile does not matter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.corpus import (
    CONFIG,
    INDEX,
    MODULES,
    RIGHT,
    SINGLE,
    TENSOR_FILES,
    THINGS,
    WEIGHTS,
    Maker,
    adapter,
    checkpoint,
    instead,
    lists,
    lora_tensors,
    sharded,
    spoilt,
)

NAN, INFINITY = float("nan"), float("inf")
ENDLESS = r"(?:[a-z]|[a-z.]|[a-z._0-9])*[!?]"  # three ways to read each letter

# ---- configurations


def config(**changes: Any) -> bytes:
    return json.dumps({**RIGHT, **changes}).encode()


def with_text(key: str, text: str) -> bytes:
    """The configuration in which the value of `key` is this JSON text."""
    return (json.dumps({k: v for k, v in RIGHT.items() if k != key})[:-1] + f', "{key}": {text}}}').encode()


CONFIGS: Mapping[str, bytes] = {
    "nothing": b"",
    "a number": b"3",
    "a list of it": json.dumps([RIGHT]).encode(),
    "no method": b"{}",
    "a method that is a list": config(peft_type=["LORA"]),
    "a method that is a path": config(peft_type="../../etc/passwd"),
    "a method of a megabyte": config(peft_type="L" * 2**20),
    "a method that steers a terminal": config(peft_type="\x1b[2JLORA"),
    "UTF-16": config().decode().encode("utf-16"),
    "Latin-1": with_text("revision", '"\xe4"').decode("utf-8").encode("latin-1"),
    "a byte-order mark": b"\xef\xbb\xbf" + config(),
    "half a surrogate": with_text("revision", '"\\ud800"'),
    "a key twice": with_text("r", '2, "r": 3'),
    "a key twice within": with_text("rank_pattern", '{"q_proj": 2, "q_proj": 3}'),
    "a comment": config() + b"// r is 2",
    "two of them": config() * 2,
    "100,000 deep": with_text("revision", "[" * 100_000 + "]" * 100_000),
    "900 deep": with_text("revision", "[" * 900 + "]" * 900),
    "100 deep": with_text("megatron_config", '{"a":' * 100 + "1" + "}" * 100),
    "17 MB": with_text("revision", '"' + "x" * (17 * 2**20) + '"'),
    "a hundred megabytes": with_text("revision", '"' + "x" * 100_000_000 + '"'),
    "15 MB of lists": with_text("revision", lists(15 * 2**20).decode()),
    "alpha is NaN": with_text("lora_alpha", "NaN"),
    "alpha is Infinity": with_text("lora_alpha", "Infinity"),
    "alpha is 1e999": with_text("lora_alpha", "1e999"),
    "alpha has 5,000 digits": with_text("lora_alpha", "9" * 5000),
    "alpha has 399 digits": with_text("lora_alpha", "9" * 399),
    "dropout is NaN": with_text("lora_dropout", "NaN"),
    "r is NaN": with_text("r", "NaN"),
    "r is true": with_text("r", "true"),
    "r is negative": with_text("r", "-2"),
    "r is 0": with_text("r", "0"),
    "r is a billion": with_text("r", "1000000000"),
    "r is 10^18": with_text("r", "1000000000000000000"),
    "r has 5,000 digits": with_text("r", "9" * 5000),
    "r is a fraction": with_text("r", "2.5"),
    "r is text": with_text("r", '"2"'),
    "r is null": with_text("r", "null"),
    "a pattern's rank is a billion": config(rank_pattern={"q_proj": 10**9}),
    "a pattern's rank is true": config(rank_pattern={"q_proj": True}),
    "a pattern's alpha is NaN": with_text("alpha_pattern", '{"q_proj": NaN}'),
    "a pattern's alpha is negative infinity": with_text("alpha_pattern", '{"q_proj": -Infinity}'),
    "a pattern that is no regex": config(rank_pattern={"(": 2}),
    "a pattern nested too deep": config(rank_pattern={"(" * 2000 + ")" * 2000: 2}),
    "a pattern of a megabyte": config(rank_pattern={"(a|b)" * 200_000: 2}),
    "as many values as are read": with_text("revision", lists(3 * 149_000).decode()),
    "as many keys as are read": with_text("loftq_config", "{" + ",".join(f'"{i:x}":0.5' for i in range(270_000)) + "}"),
    "100,000 patterns": config(rank_pattern={f"(a|b){i}": 2 for i in range(100_000)}),
    "260,000 names with a rank": config(rank_pattern={f"model.{i}": 2 for i in range(260_000)}),
    "targets of a megabyte": config(target_modules="(a|b)" * 200_000),
    "260,000 targets": config(target_modules=[f"m{i}" for i in range(260_000)]),
    "a target of a megabyte": config(target_modules=["q_proj", "a." * 2**19]),
    "a target that is a number": config(target_modules=[1]),
    "100,000 modules to save": config(modules_to_save=[f"m{i}" for i in range(100_000)]),
    "modules to save that are a text": config(modules_to_save="lm_head"),
}
# What a configuration says for the model alone: without one it is right.
OF_THE_MODEL: Mapping[str, bytes] = {
    "targets that never end": config(target_modules=ENDLESS),
    "exclusions that never end": config(exclude_modules=ENDLESS),
    "counts within counts": config(target_modules="(((a{1000}){1000}){1000}){1000}"),
    "an exclusion with counts within counts": config(exclude_modules="(((a{1000}){1000}){1000}){1000}"),
    "saved modules that never end": config(modules_to_save=[ENDLESS]),
    "a layers_pattern that never ends": config(layers_to_transform=[0], layers_pattern=ENDLESS),
}
OF_THE_MODULES: Mapping[str, bytes] = {"a rank pattern that never ends": config(rank_pattern={ENDLESS: 2})}


def without(tensors: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if key not in name}


def filled(value: float) -> dict[str, Any]:
    return {name: np.full_like(tensor, value) for name, tensor in lora_tensors().items()}


def _tensors(**more: Any) -> dict[str, Any]:
    return {**lora_tensors(), **{name.replace("__", "."): tensor for name, tensor in more.items()}}


OTHER_TENSORS: Mapping[str, dict[str, Any]] = {
    "another rank than the file's": lora_tensors(rank=3),
    "no tensors": {},
    "half of a pair": without(lora_tensors(), "lora_B"),
    "a tensor that nothing asks for": _tensors(base_model__model__evil=np.zeros(3)),
    "a tensor of no adapter": {"evil": np.zeros(3)},
    "a pair of no axes": {f"base_model.model.{m}.lora_{x}.weight": np.zeros(()) for m in MODULES for x in "AB"},
    "a pair of five axes": {f"base_model.model.{m}.lora_{x}.weight": np.zeros((1,) * 5) for m in MODULES for x in "AB"},
    "numbers that are NaN": filled(NAN),
    "numbers that are infinite": filled(INFINITY),
    "numbers that overflow": filled(3e38),
    "an adapter within an adapter": _tensors(base_model__model__x__base_layer__lora_A__weight=np.zeros((2, 8))),
}


def _written(**changes: Any) -> Maker:
    return lambda folder: adapter(folder, **changes)


def _configured(text: bytes) -> Maker:
    return spoilt(CONFIG, lambda data: text, adapter)


ADAPTERS: Mapping[str, Maker] = {
    **{f"tensors: {name}": spoilt(WEIGHTS, spoil, adapter) for name, spoil in TENSOR_FILES.items()},
    **{f"tensors: {name}": instead(WEIGHTS, put, adapter) for name, put in THINGS.items()},
    **{f"config: {name}": instead(CONFIG, put, adapter) for name, put in THINGS.items()},
    **{f"config: {name}": _configured(text) for name, text in {**CONFIGS, **OF_THE_MODEL, **OF_THE_MODULES}.items()},
    **{f"tensors: {name}": _written(tensors=tensors) for name, tensors in OTHER_TENSORS.items()},
}

# ---- checkpoints


def _mapped(file: Any) -> Maker:
    """Every tensor of the index in this file."""

    def maker(folder: Path) -> None:
        shards = sharded(folder)
        sharded(folder, dict.fromkeys(shards, file))

    return maker


def _indexed(text: bytes) -> Maker:
    return spoilt(INDEX, lambda data: text, lambda folder: (sharded(folder), None)[1])


def _many_shards(folder: Path) -> None:
    sharded(folder, {f"t{i}": f"s{i}.safetensors" for i in range(100_000)})


SHARDS: Mapping[str, Any] = {
    "a path out of it": "../../etc/passwd",
    "the folder above": "..",
    "the folder": ".",
    "nothing": "",
    "an absolute path": "/etc/passwd",
    "a device": "/dev/zero",
    "a drive": "C:evil.safetensors",
    "a path of the other kind": "..\\..\\evil.safetensors",
    "NUL": "a\0.safetensors",
    "a line end": "a\nb.safetensors",
    "a terminal's words": "\x1b[2J.safetensors",
    "a name of a megabyte": "a" * 2**20,
    "a number": 3,
    "a list": ["model-00001-of-00002.safetensors"],
    "null": None,
    "what is not there": "model-00009-of-00002.safetensors",
    "the index itself": INDEX,
    "the configuration": "config.json",
    "another shard": "model-00001-of-00002.safetensors",
}
INDICES: Mapping[str, bytes] = {
    "no object": b"[]",
    "nothing": b"",
    "no map": b"{}",
    "a map that is a list": b'{"weight_map": []}',
    "a tensor twice": b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"}}',
    "100,000 deep": b'{"weight_map": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "15 MB of lists": b'{"weight_map": ' + lists(15 * 2**20) + b"}",
    "33 MB": b'{"weight_map": "' + b"x" * (33 * 2**20) + b'"}',
}
SHARD = "model-00001-of-00002.safetensors"


def _two(folder: Path) -> None:
    sharded(folder)


MODEL_CONFIGS: Mapping[str, bytes] = {
    "a list": b"[]",
    "100,000 deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a key twice": b'{"model_type": "llama", "model_type": "gpt2"}',
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "17 MB": b'{"model_type": "' + b"x" * (17 * 2**20) + b'"}',
}
CHECKPOINTS: Mapping[str, Maker] = {
    **{f"tensors: {name}": spoilt(SINGLE, spoil, checkpoint) for name, spoil in TENSOR_FILES.items()},
    **{f"shard: {name}": instead(SHARD, put, _two) for name, put in THINGS.items()},
    **{f"every tensor in {name}": _mapped(file) for name, file in SHARDS.items()},
    **{f"index: {name}": _indexed(text) for name, text in INDICES.items()},
    **{f"index: {name}": instead(INDEX, put, _two) for name, put in THINGS.items()},
    "index: 100,000 shards": _many_shards,
    **{f"config: {name}": spoilt("config.json", lambda data, text=text: text, checkpoint) for name, text in MODEL_CONFIGS.items()},  # type: ignore[misc]
}
