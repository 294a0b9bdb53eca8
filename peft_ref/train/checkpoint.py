"""A training on disk: stopped anywhere, by anything, it goes on with the same numbers.

    adapter_model.safetensors, adapter_config.json    the adapter so far, as PEFT reads it
    training.safetensors                              what is trained, what the optimiser and the allocator remember
    training.json                                     the step, the generator's state, the losses so far, the settings

The four are replaced together (peft_ref/files/atomic.py). Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_ref.arrays import Array, device, namespace
from peft_ref.errors import ConfigError, FileFormatError, KeyMismatchError, ShapeError
from peft_ref.files.adapter import CONFIG, WEIGHTS, all_tensors
from peft_ref.files.atomic import committed, replace_files
from peft_ref.files.config import render
from peft_ref.files.safetensors import SafetensorsFile, open_file, serialize
from peft_ref.methods.adalora_allocator import State as Allocation
from peft_ref.nn.tree import leaves, mapped
from peft_ref.reading.documents import read_object
from peft_ref.train.begin import Training, file_of
from peft_ref.train.step import State

NUMBERS, REST = "training.safetensors", "training.json"
FILES = (WEIGHTS, CONFIG, NUMBERS, REST)
VERSION = 1


class Saved(NamedTuple):
    state: State
    rng: np.random.Generator
    losses: list[float]


def save(folder: Path, training: Training, saved: Saved, settings: Mapping[str, Any]) -> None:
    adapter, state = file_of(training, saved.state), saved.state
    numbers = {where: np.asarray(array) for where, array in leaves(_arrays(state))}
    rest = {
        "version": VERSION,
        "step": state.step,
        "generator": saved.rng.bit_generator.state,
        "losses": saved.losses,
        "settings": settings,
    }
    replace_files(
        folder,
        {
            WEIGHTS: serialize(all_tensors(adapter), adapter.metadata),
            CONFIG: render(adapter.config).encode(),
            NUMBERS: serialize(numbers, {}),
            REST: json.dumps(rest, indent=1).encode(),
        },
    )


def exists(folder: Path) -> bool:
    return committed(folder, REST, FILES).is_file()


def read(folder: Path, start: State, settings: Mapping[str, Any]) -> Saved:
    """The training in `folder`, which began at `start`. Raises `ConfigError` where it had other settings."""
    path = committed(folder, REST, FILES)
    try:
        rest = read_object(path)
        step, losses = int(rest["step"]), [float(loss) for loss in rest["losses"]]
        rng = np.random.default_rng()
        rng.bit_generator.state = rest["generator"]
        before = dict(rest["settings"])
        version = rest["version"]
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise FileFormatError(
            f"{path} is no state of a training: {type(error).__name__}: {error}.\n  Begin anew in another folder."
        ) from None
    if version != VERSION or len(losses) != step:
        raise FileFormatError(
            f"{path}: version {version!r:.20}, {len(losses)} losses at step {step}.\n  Expected version {VERSION}, one each."
        )
    for name, value in json.loads(json.dumps(settings)).items():
        if before.get(name) != value:
            raise ConfigError(f"{folder} is a training with {name}={before.get(name)!r:.200}, asked for now: {value!r:.200}.")
    file = open_file(committed(folder, NUMBERS, FILES))
    return Saved(_read_state(file, start, step), rng, losses)


def _arrays(state: State) -> dict[str, Any]:
    """All of a state that is no count."""
    return {"params": state.params, "optimizer": state.optimizer._replace(step=None), "allocation": state.allocation}


def _read_state(file: SafetensorsFile, start: State, step: int) -> State:
    adapters = start.params.adapters
    like = next(array for _, array in leaves(start.params))
    kinds = {name.split("/")[1] for name in file.entries if name.startswith("allocation/")}
    kept = {name: np.zeros(p.A.shape[0], dtype=bool) for name, p in adapters.items()} if "kept" in kinds else None
    averages = (adapters if "sensitivity" in kinds else None, adapters if "uncertainty" in kinds else None)
    form = _arrays(start._replace(allocation=Allocation(*averages, kept)))
    names = {where for where, _ in leaves(form)}
    if names != file.entries.keys():
        raise KeyMismatchError(f"{file.path}: {min(names ^ file.entries.keys())!r} is missing, or too much.\n  It is another method's.")
    found = mapped(_reader(file, leaves(form), like), form)
    return State(step, found["params"], found["optimizer"]._replace(step=step), found["allocation"])


def _reader(file: SafetensorsFile, places: Iterator[tuple[str, Any]], like: Array) -> Any:
    """The array in the file for every leaf, which come in the order of `places`."""

    def read(expected: Array) -> Array:
        name = next(places)[0]
        array = file.read(name)
        if array.shape != tuple(expected.shape):
            raise ShapeError(f"{file.path}: {name} is {array.shape}, expected {tuple(expected.shape)}.\n  It is another configuration's.")
        xp = namespace(like)
        return array if xp is np else xp.asarray(array, device=device(like))

    return read
