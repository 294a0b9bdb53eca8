"""A training from files: a model's folder, a text and a configuration, made ready for `run`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_ref.attending import AttentionMethod
from peft_ref.errors import ConfigError
from peft_ref.files.config import DERIVED, flatten, from_dict
from peft_ref.files.rules import field_names
from peft_ref.graph.targets import Targets
from peft_ref.methods import METHODS
from peft_ref.nn import Decoder, load
from peft_ref.nn.tree import leaves
from peft_ref.train.begin import Training, start
from peft_ref.train.data import Tokens, check_tokens, read_tokens
from peft_ref.train.run import Plan
from peft_ref.train.tiny import write_tiny

TASK = "CAUSAL_LM"
BESIDE = ("bias", "feedforward_modules")


class Session(NamedTuple):
    training: Training
    tokens: Tokens
    settings: dict[str, Any]  # what a training that is resumed must have had
    told: str  # a line about it


def method_keys() -> list[str]:
    """The keys of adapter_config.json that choose what a method does and where, of all methods."""
    own = {name for cls in METHODS.values() for name in field_names(cls)}
    return sorted((own | {*field_names(Targets), *BESIDE}) - DERIVED - {"target_parameters"})


def named_config(name: str, given: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The flat configuration of the method `name` with these keys; a schedule that needs a length gets that of the training."""
    cls = METHODS[name]
    known = {*field_names(cls), *field_names(Targets), *BESIDE} - DERIVED
    if unknown := sorted(given.keys() - known):
        raise ConfigError(f"{name} has no {unknown[0]}.\n  It has {', '.join(sorted(known))}.")
    targets = given.get("target_modules")
    if issubclass(cls, AttentionMethod) and isinstance(targets, list) and len(targets) == 1:
        given = {**given, "target_modules": targets[0]}  # the last part of a name, and no list
    length = {"total_step": steps} if "total_step" in field_names(cls) else {}
    return {"peft_type": cls.peft_type, **cls.switched_on(), **length, **given}


def prepared(model: Path | None, data: Path, config: Mapping[str, Any], plan: Plan, out: Path, *, ids: bool = False) -> Session:
    """The training of a fresh adapter on the model in the folder `model`, or without one on a tiny one that is made in `out`/base."""
    tokens = read_tokens(data, ids=ids)
    if model is None:
        model = out / "base"
        write_tiny(model, plan.seed)
    loaded = load(model)
    if not isinstance(loaded.model, Decoder):
        raise ConfigError(f"{model} is a {type(loaded.model).__name__}, which predicts no next token.\n  Take a causal language model.")
    check_tokens(tokens, plan.length, int(loaded.graph.config["vocab_size"]))
    said = {"task_type": TASK, **config, "base_model_name_or_path": os.fspath(model), "inference_mode": False}
    if said["task_type"] != TASK:
        raise ConfigError(f"task_type={said['task_type']!r}, and what is trained here is a language model: {TASK}.")
    read = from_dict(said)
    training = start(loaded.model, loaded.graph, read, np.random.default_rng([plan.seed, 0]))
    count = sum(int(np.prod(array.shape)) for _, array in leaves(training.params))
    settings = {
        "model": os.fspath(model),
        "data": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "config": flatten(read),
    }
    told = f"{type(read.method).__name__} on {model}: {count:,} numbers trained, {plan.steps} steps of {plan.tokens:,} tokens"
    return Session(training, tokens, settings, told)
