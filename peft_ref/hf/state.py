"""What a PeftModel holds: a value, of one of two kinds. Every operation returns the next one.

Layered     adapters on layers and attention blocks, of whatever method: `peft_ref.model.Adapted`, and nothing beside it
Prompted    prompts before the inputs: `prompted.py`
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self, final

import numpy as np

from peft_ref.arrays import Array, namespace
from peft_ref.errors import ConfigError
from peft_ref.files.adapter import AdapterFile, from_state_dict
from peft_ref.files.config import AdapterConfig
from peft_ref.graph.protocol import Graph
from peft_ref.hf.base import Ready, model_in, net_of, run
from peft_ref.methods import AdaLoRA
from peft_ref.model import Adapted, Count, activate, adapter_file, add, attach, count, delete, disable, enable, load, update
from peft_ref.model.attaching import weight_name
from peft_ref.model.numbers import as_stored, brought
from peft_ref.model.running import acting_alone, run_rows
from peft_ref.model.sharing import brought_modules, worked_out
from peft_ref.model.storing import beside, brought_to, read_blocks
from peft_ref.model.ties import Ties
from peft_ref.nn import Inputs, Output
from peft_ref.nn.attention import positions_from

# Whose configuration says how the last module stores its weight.
FAN = frozenset(
    (
        "ADALORA",
        "DEFT",
        "FOURIERFT",
        "FROD",
        "GRALORA",
        "IA3",
        "LORA",
        "PVERA",
        "RANDLORA",
        "TINYLORA",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
    )
)


class Start(NamedTuple):
    """What a fresh adapter is made with."""

    rng: np.random.Generator
    ties: Ties = "refuse"  # what an init does that changes a tied weight
    tokenize: Callable[[str], Sequence[int]] | None = None  # for a prompt that starts from a text


class State(ABC):
    @property
    @abstractmethod
    def base(self) -> Graph: ...

    @property
    @abstractmethod
    def active(self) -> tuple[str, ...]: ...

    @property
    @abstractmethod
    def enabled(self) -> bool: ...

    @abstractmethod
    def names(self) -> tuple[str, ...]: ...

    @abstractmethod
    def config(self, name: str) -> AdapterConfig: ...

    @abstractmethod
    def added(self, name: str, config: AdapterConfig, start: Start) -> Self:
        """With a fresh adapter."""

    @abstractmethod
    def loaded(self, folder: str | os.PathLike[str], name: str, subfolder: str, trainable: bool, lazy: bool, ties: Ties) -> Self:
        """With the adapter in a folder."""

    @abstractmethod
    def attached(self, name: str, file: AdapterFile, trainable: bool, ties: Ties) -> Self:
        """With an adapter that was read."""

    @abstractmethod
    def activated(self, names: Sequence[str], inference: bool) -> Self: ...

    @abstractmethod
    def switched(self, on: bool) -> Self: ...

    @abstractmethod
    def deleted(self, name: str) -> Self: ...

    @abstractmethod
    def file(self, name: str, embeddings: bool | Literal["auto"]) -> AdapterFile: ...

    @abstractmethod
    def renumbered(self, name: str, tensors: Mapping[str, Any]) -> Self:
        """With the numbers of a file for the adapter `name`."""

    @abstractmethod
    def counted(self) -> Count: ...

    @abstractmethod
    def output(self, inputs: Inputs, task_ids: Array | None, rows: Sequence[str] | None) -> Output:
        """`rows` names an adapter for each row of a batch."""

    @abstractmethod
    def ready(self, batch: int, task_ids: Array | None) -> Ready:
        """What runs for a batch of that many rows."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Layered(State):
    adapted: Adapted

    @property
    def base(self) -> Graph:
        return self.adapted.base

    @property
    def active(self) -> tuple[str, ...]:
        return self.adapted.active_names

    @property
    def enabled(self) -> bool:
        return self.adapted.enabled

    def names(self) -> tuple[str, ...]:
        return tuple(self.adapted.adapters)

    def config(self, name: str) -> AdapterConfig:
        return self.adapted.attached(name).config

    def added(self, name: str, config: AdapterConfig, start: Start) -> Layered:
        return Layered(adapted=_said(add(self.adapted, name, config, start.rng, ties=start.ties), name))

    def loaded(self, folder: str | os.PathLike[str], name: str, subfolder: str, trainable: bool, lazy: bool, ties: Ties) -> Layered:
        return Layered(adapted=load(self.adapted, folder, name, subfolder=subfolder, trainable=trainable, lazy=lazy, ties=ties))

    def attached(self, name: str, file: AdapterFile, trainable: bool, ties: Ties) -> Layered:
        return Layered(adapted=_said(attach(self.adapted, name, file, trainable=trainable, ties=ties), name))

    def activated(self, names: Sequence[str], inference: bool) -> Layered:
        return Layered(adapted=activate(self.adapted, names, inference=inference))

    def switched(self, on: bool) -> Layered:
        return Layered(adapted=enable(self.adapted) if on else disable(self.adapted))

    def deleted(self, name: str) -> Layered:
        return Layered(adapted=delete(self.adapted, name))

    def file(self, name: str, embeddings: bool | Literal["auto"]) -> AdapterFile:
        return adapter_file(self.adapted, name, embeddings=embeddings)

    def renumbered(self, name: str, tensors: Mapping[str, Any]) -> Layered:
        adapter = self.adapted.attached(name)
        if adapter.blocks:
            blocks = read_blocks(adapter.config, tensors, adapter.blocks).attention
            return Layered(
                adapted=update(self.adapted, name, {b: brought_to(self.adapted, b, found).params for b, found in blocks.items()})
            )
        read = from_state_dict(adapter.config, tensors, {module: found.layer for module, found in adapter.modules.items()})
        likes = {module: self.adapted.frozen(weight_name(self.adapted, module)) for module in read.modules}
        params = {}
        for module, found in brought_modules(read.modules, likes).items():
            if module in adapter.following and found.params.D is None:
                continue  # it has the rows of another
            specs = found.method.spec(found.layer)
            kept = {s.field: getattr(adapter.modules[module].params, s.field) for s in specs if not s.saved}
            whole = found._replace(params=found.params._replace(**kept))
            params[module] = worked_out(self.adapted, module, whole, [s.field for s in specs if s.derived]).params
        saved, frozen = beside(read, adapter.tied)
        biases = {self.base.resolve(key): self._like(key, tensor) for key, tensor in frozen.items()}
        return Layered(adapted=update(self.adapted, name, params, saved={k: self._like(k, t) for k, t in saved.items()}, biases=biases))

    def _like(self, name: str, tensor: Any) -> Array:
        frozen = self.adapted.frozen(name)
        return as_stored(brought(tensor, frozen), frozen)

    def counted(self) -> Count:
        return count(self.adapted)

    def ready(self, batch: int, task_ids: Array | None) -> Ready:
        _refuse_tasks(task_ids)
        return Ready(model_in(self.adapted), net_of(self.adapted))

    def output(self, inputs: Inputs, task_ids: Array | None, rows: Sequence[str] | None) -> Output:
        _refuse_tasks(task_ids)
        if rows is not None:
            return _of_rows(self.adapted, inputs, rows)
        output = run(self.adapted, inputs)
        return output if output.loss is None else replace(output, loss=output.loss + self._penalty())

    def _penalty(self) -> Array | float:
        """What AdaLoRA adds to the loss for the adapter that is trained, whatever acts and whether any does, as in HF."""
        for adapter in self.adapted.adapters.values():
            method = adapter.config.method
            if isinstance(method, AdaLoRA) and not adapter.config.housekeeping.get("inference_mode"):
                own = {module: found.params for module, found in adapter.modules.items() if module not in adapter.config.beside}
                return method.orthogonality(own)
        return 0.0


def _refuse_tasks(task_ids: Array | None) -> None:
    if task_ids is not None:
        raise ConfigError("task_ids are for a multitask prompt, and this model has none.\n  Leave them out.")


def _of_rows(model: Adapted, inputs: Inputs, rows: Sequence[str]) -> Output:
    """The logits of a batch whose rows name their adapters."""
    given = {name: value for name, value in vars(inputs).items() if value is not None}
    if unable := sorted(given.keys() & {"labels", "start_positions", "end_positions", "past"}):
        raise ConfigError(f"{unable[0]} with adapter_names: rows run apart and give logits alone.\n  Compute the loss from those.")
    first = given.get("input_ids", given.get("inputs_embeds"))
    if first is None:
        raise ConfigError("adapter_names are given, and no input_ids or inputs_embeds.")
    xp, batch = namespace(first), first.shape[0]

    def logits(name: str, picked: Array) -> Array:
        taken = {key: value if value.shape[0] != batch else xp.take(value, picked, axis=0) for key, value in given.items()}
        return run(acting_alone(model, name), Inputs(**taken)).logits

    return Output(logits=run_rows(positions_from(0, batch, first)[0, :], rows, logits))


def _said(model: Adapted, name: str) -> Adapted:
    """`model` whose adapter's configuration says what PEFT's says once it is placed: fan_in_fan_out, by the last of its linear modules."""
    adapter = model.adapters[name]
    own = [module for module in adapter.modules if module not in adapter.config.beside]
    kinds = [kind for module in own if (kind := model.layer(module).kind) in ("linear", "transposed_linear")]
    if adapter.config.method.peft_type not in FAN or not kinds:
        return model
    housekeeping = {**adapter.config.housekeeping, "fan_in_fan_out": kinds[-1] == "transposed_linear"}
    said = replace(adapter, config=replace(adapter.config, housekeeping=housekeeping))
    return replace(model, adapters={**model.adapters, name: said})
