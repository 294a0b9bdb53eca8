"""Prompts on a model: each with its tensors and its copies of modules trained in full, one of them before the inputs.

    input_ids  --the model's own table-->  embeddings  --splice-->  inputs of the model

HF      PeftModel with a PromptLearningConfig. A prompt's tensors count as trained even where they were loaded, and those of every prompt.
not followed    PEFT names the head of a task twice among modules_to_save; drops token types and positions with a warning, and with
                decoder_input_ids a multitask prompt fails: the first is said once, the second refused, the last works
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

import numpy as np

from peft_ref.arrays import Array
from peft_ref.errors import ConfigError, KeyMismatchError, naming
from peft_ref.files.adapter import AdapterFile, from_state_dict, load_adapter
from peft_ref.files.config import AdapterConfig
from peft_ref.files.keys import PROMPT_PREFIX, check_adapter_name, parameter_name
from peft_ref.files.safetensors import open_file
from peft_ref.graph.beside import saved_modules
from peft_ref.graph.protocol import Graph
from peft_ref.graph.rules import SAVED_BY_TASK
from peft_ref.hf.base import Ready, model_in, net_of
from peft_ref.hf.state import Start, State
from peft_ref.methods import METHODS
from peft_ref.model import Count
from peft_ref.model.attaching import parameters_below
from peft_ref.model.numbers import as_stored, brought, wide
from peft_ref.model.ties import Ties
from peft_ref.nn import Inputs, Output
from peft_ref.nn.generate import Front
from peft_ref.nn.prompted import with_prompt, word_table
from peft_ref.prompts import Context, Prompt, Sources, Tensors
from peft_ref.splice import ANSWERING, TASKS, WITH_TOKEN_TYPES, key_values


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class PromptAdapter:
    config: AdapterConfig
    tensors: Tensors
    saved: Mapping[str, Array] = field(default_factory=dict)
    trainable: bool = False  # the copies; the tensors are always

    @property
    def method(self) -> Prompt:
        return prompt_of(self.config)

    @property
    def task(self) -> str:
        return str(self.config.housekeeping["task_type"])


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Prompted(State):
    graph: Graph
    adapters: Mapping[str, PromptAdapter] = field(default_factory=dict)
    active_names: tuple[str, ...] = ()
    on: bool = True

    @property
    def base(self) -> Graph:
        return self.graph

    @property
    def active(self) -> tuple[str, ...]:
        return self.active_names

    @property
    def enabled(self) -> bool:
        return self.on

    def names(self) -> tuple[str, ...]:
        return tuple(self.adapters)

    def config(self, name: str) -> AdapterConfig:
        return self._adapter(name).config

    def added(self, name: str, config: AdapterConfig, start: Start) -> Prompted:
        config = self._settled(config)
        method, like = prompt_of(config), wide(self._words())
        tensors = method.init(like, start.rng, Sources(words=like, tokenize=start.tokenize, tensors=_source(method)))
        return self._joined(name, PromptAdapter(config=config, tensors=tensors, saved=self._copies(config), trainable=True))

    def loaded(self, folder: str | os.PathLike[str], name: str, subfolder: str, trainable: bool, lazy: bool, ties: Ties) -> Prompted:
        file = load_adapter(folder, subfolder)
        with naming(folder):
            return self.attached(name, file, trainable, ties)

    def attached(self, name: str, file: AdapterFile, trainable: bool, ties: Ties) -> Prompted:
        if trainable:
            raise ConfigError("a prompt that was saved has lost its encoder and is not trained on (HF PEFT refuses it too).")
        if file.embeddings:
            raise ConfigError(f"{min(file.embeddings)}: an embedding beside a prompt is not put into the model here.\n  Save without it.")
        config = replace(file.config, method=prompt_of(file.config).in_inference())
        config = self._settled(config)
        saved = self._copies(config)
        came = {parameter_name(key, PROMPT_PREFIX): tensor for key, tensor in file.modules_to_save.items()}
        if wrong := sorted(saved.keys() ^ came.keys()):
            raise KeyMismatchError(f"{PROMPT_PREFIX}{wrong[0]}: the model and the file do not both have it.\n  Made for another model?")
        like = wide(self._words())
        tensors = {key: brought(tensor, like) for key, tensor in prompt_of(config).check(file.prompt).items()}
        saved = {key: as_stored(brought(came[key], copy), copy) for key, copy in saved.items()}
        return self._joined(name, PromptAdapter(config=config, tensors=tensors, saved=saved))

    def activated(self, names: Sequence[str], inference: bool) -> Prompted:
        if len(names) != 1:
            raise ConfigError(f"{len(names)} prompts at once: one stands before the inputs (HF PEFT refuses it too).\n  Name one.")
        self._adapter(names[0])
        adapters = {n: replace(a, trainable=n in names and not inference) for n, a in self.adapters.items()}
        return replace(self, adapters=adapters, active_names=tuple(names))

    def switched(self, on: bool) -> Prompted:
        return replace(self, on=on)

    def deleted(self, name: str) -> Prompted:
        self._adapter(name)
        left = {other: adapter for other, adapter in self.adapters.items() if other != name}
        active = tuple(left)[:1] if name in self.active_names else self.active_names
        return replace(self, adapters=left, active_names=active)

    def file(self, name: str, embeddings: bool | Literal["auto"]) -> AdapterFile:
        if embeddings is True:
            raise ConfigError("save_embedding_layers=True beside a prompt is not built here.\n  'auto' saves none of them, as PEFT's does.")
        adapter = self._adapter(name)
        bare = adapter.method.in_inference()
        saved = {key: np.asarray(value) for key, value in adapter.method.saved(adapter.tensors).items()}
        return AdapterFile(
            config=replace(adapter.config, method=bare),
            prompt=bare.loaded(saved),
            modules_to_save={f"{PROMPT_PREFIX}{key}": np.asarray(copy) for key, copy in adapter.saved.items()},
        )

    def renumbered(self, name: str, tensors: Mapping[str, Any]) -> Prompted:
        adapter = self._adapter(name)
        bare = adapter.method.in_inference()
        if adapter.method.shapes() != bare.shapes():
            raise ConfigError(
                f"{name!r} has an encoder, which a file's tensors know nothing of; PEFT would put the table through it.\n"
                "  Load the folder with load_adapter."
            )
        read = Prompted(graph=self.graph).attached(name, from_state_dict(replace(adapter.config, method=bare), tensors), False, "refuse")
        new = read.adapters[name]
        return replace(self, adapters={**self.adapters, name: replace(adapter, tensors=new.tensors, saved=new.saved)})

    def counted(self) -> Count:
        total = sum(math.prod(p.shape) for p in self.graph.parameters().values())
        trainable = 0
        for adapter in self.adapters.values():
            own = {name: math.prod(t.shape) for name, t in adapter.tensors.items()}
            copies = sum(math.prod(t.shape) for t in adapter.saved.values())
            total += sum(own.values()) + copies
            trainable += sum(n for name, n in own.items() if name not in adapter.method.held) + (copies if adapter.trainable else 0)
        return Count(trainable, total)

    def rows(self, name: str, batch: int, task_ids: Array | None) -> Array:
        """What the prompt `name` is for a batch."""
        adapter = self._adapter(name)
        prompt = adapter.method.prompt(adapter.tensors, Context(batch=batch, task_ids=task_ids))
        return key_values(adapter.method, prompt) if adapter.method.place == "cache" else prompt

    def output(self, inputs: Inputs, task_ids: Array | None, rows: Sequence[str] | None) -> Output:
        if rows is not None:
            raise ConfigError("adapter_names with prompts: one prompt stands before all rows (HF PEFT ignores the names).")
        given = inputs.inputs_embeds if inputs.input_ids is None else inputs.input_ids
        if given is None:
            raise ConfigError("a prompt needs input_ids or inputs_embeds, before which it goes.")
        model, net, front = self.ready(given.shape[0], task_ids)
        if front is None:
            return model.forward(net, inputs)
        task = self.adapters[self.active_names[0]].task
        _refuse_dropped(front.method, task, inputs)
        return model.forward(net, with_prompt(model, net, front.method, front.prompt, inputs, task))

    def ready(self, batch: int, task_ids: Array | None) -> Ready:
        model, net = model_in(self.graph), net_of(self.graph)
        if not self.on or not self.active_names:
            return Ready(model, net, None)
        adapter = self.adapters[self.active_names[0]]
        prompt = adapter.method.prompt(adapter.tensors, Context(batch=batch, task_ids=task_ids))
        net = replace(net, weights={**net.weights, **adapter.saved})
        return Ready(model, net, Front(adapter.method, as_stored(prompt, wide(self._words()))))

    def _adapter(self, name: str) -> PromptAdapter:
        if name not in self.adapters:
            raise ConfigError(f"there is no adapter {name!r} (HF PEFT refuses it too).\n  There are {', '.join(self.adapters) or 'none'}.")
        return self.adapters[name]

    def _joined(self, name: str, adapter: PromptAdapter) -> Prompted:
        check_adapter_name(name)
        kinds = {other.method.peft_type for other in self.adapters.values()} - {adapter.method.peft_type}
        if name in self.adapters or kinds:
            what = f"one is called {name!r} already" if name in self.adapters else f"those there are {', '.join(kinds)}"
            raise ConfigError(f"adapter {name!r}, {adapter.method.peft_type}: {what} (HF PEFT refuses it too).")
        first = not self.adapters
        adapters = {**self.adapters, name: replace(adapter, trainable=adapter.trainable and first)}
        return replace(self, adapters=adapters, active_names=(name,) if first else self.active_names)

    def _settled(self, config: AdapterConfig) -> AdapterConfig:
        """`config` with the sizes that it leaves to the model, and the head of its task."""
        task = config.housekeeping.get("task_type")
        if task not in TASKS:
            raise ConfigError(f"task_type={task!r}: a prompt is put before the inputs of a task.\n  There are {', '.join(TASKS)}.")
        said, head = config.targets.modules_to_save or (), SAVED_BY_TASK.get(task, ())
        whole = (*said, *(name for name in head if name not in said))
        targets = replace(config.targets, modules_to_save=whole) if whole else config.targets
        return replace(config, method=prompt_of(config).sized(self.graph.config, task), targets=targets)

    def _copies(self, config: AdapterConfig) -> dict[str, Array]:
        modules = saved_modules(config.targets, self.graph, config.housekeeping.get("task_type"), ())
        return {key: self.graph.weight(key) for module in modules for key in parameters_below(self.graph, module)}

    def _words(self) -> Array:
        return self.graph.weight(f"{word_table(model_in(self.graph))}.weight")


def _refuse_dropped(method: Prompt, task: str, inputs: Inputs) -> None:
    """Raise `ConfigError` for what PEFT drops before a prompt."""
    dropped = {
        "past_key_values": inputs.past is not None,
        "position_ids": inputs.position_ids is not None and (method.place == "embeddings" or task == ANSWERING),
        "token_type_ids": inputs.token_type_ids is not None and task not in WITH_TOKEN_TYPES,
    }
    if lost := [name for name, value in dropped.items() if value]:
        raise ConfigError(f"{lost[0]} with a {type(method).__name__} for {task}: HF PEFT drops it.\n  Leave it out.")


def prompt_of(config: AdapterConfig) -> Prompt:
    if not isinstance(config.method, Prompt):
        raise ConfigError(
            f"{config.method.peft_type} is no prompt, and this model has prompts (HF PEFT refuses it too)."
            f"\n  Prompts: {', '.join(cls.peft_type for cls in METHODS.prompts.values())}."
        )
    return config.method


def _source(method: Prompt) -> Tensors | None:
    """The other adapter's file that a multitask prompt starts from."""
    path = getattr(method, "prompt_tuning_init_state_dict_path", None)
    if path is None or method.in_inference() == method:
        return None
    file = open_file(path)
    return {key: file.tensor(key) for key in file.entries}
