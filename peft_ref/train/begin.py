"""From a model and a configuration to what is trained, and back to a file.

    adapters on modules, or on attention blocks   learner_of(model, adapted, name)   `adapted` from peft_ref.model: fresh (`add`) or loaded
    a prompt                                      prompt_learner(model, graph, config, rng)

What is trained beside an adapter is in `Trainable.weights`: its biases, and the copies of modules_to_save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np

from peft_ref.arrays import Array
from peft_ref.contracts import WeightMethod
from peft_ref.errors import ConfigError
from peft_ref.files.adapter import AdapterFile, AdapterModule
from peft_ref.files.config import AdapterConfig
from peft_ref.files.keys import PROMPT_PREFIX
from peft_ref.graph.beside import saved_modules
from peft_ref.graph.protocol import Graph
from peft_ref.graph.rules import SAVED_BY_TASK
from peft_ref.methods.adalora import AdaLoRA
from peft_ref.methods.adalora_allocator import rank_pattern, sliced
from peft_ref.model import Adapted, adapt, adapter_file, add, update
from peft_ref.model.adapted import Attached
from peft_ref.model.attaching import parameters_below
from peft_ref.model.sharing import shared, unshared
from peft_ref.nn import Model, Net
from peft_ref.nn.prompted import word_table
from peft_ref.nn.tree import mapped
from peft_ref.prompts import NO_SOURCES, Prompt, Sources
from peft_ref.train.dropout import row_drops
from peft_ref.train.learner import Learner, Trainable
from peft_ref.train.step import State


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """What is trained, where it starts, and where it came from."""

    learner: Learner
    params: Trainable
    config: AdapterConfig
    adapted: Adapted | None = None  # of adapters on modules
    name: str = "default"


def net_of(model: Model, adapted: Adapted) -> Net:
    """The network of `model` as `adapted` has it now: merged weights, copies and active adapters."""
    net = model.net({name: adapted.weight(name) for name in adapted.parameters()})
    return replace(net, ties=adapted.tied(), adapters=adapted.injection(), attention=adapted.attention())


def start(model: Model, graph: Graph, config: AdapterConfig, rng: np.random.Generator, sources: Sources = NO_SOURCES) -> Training:
    """A fresh adapter or prompt on the model, ready to be trained."""
    if isinstance(config.method, Prompt):
        return prompt_learner(model, graph, config, rng, sources)
    return learner_of(model, add(adapt(graph), "default", config, rng))


def learner_of(model: Model, adapted: Adapted, name: str = "default") -> Training:
    """The training of the adapter `name`, which is the only one that acts."""
    adapter = adapted.attached(name)
    if adapted.active_names != (name,) or adapted.merged.names or not adapted.enabled or adapter.multiplier != 1.0:
        raise ConfigError(f"adapter {name!r} is to be trained: it has to be active alone, unmerged and at its own scale.")
    method = adapter.config.method
    references = method.shared_keys(tuple(adapter.modules)) if isinstance(method, WeightMethod) else {}
    learner = Learner(
        model=model,
        net=replace(net_of(model, adapted), adapters={}, attention={}),
        methods={module: found.method for module, found in adapter.modules.items()},
        references=references,
        attention={block: found.method for block, found in adapter.blocks.items()},
        mirrored=adapter.mirrored,
        following=adapter.following,
        task_type=adapter.config.housekeeping.get("task_type") or "",
        penalty=method if isinstance(method, AdaLoRA) else None,
        row_drops=row_drops(adapter.config),
    )
    own = {module: found for module, found in adapter.modules.items() if module not in adapter.following}
    params = Trainable(
        adapters={name: found.params for on in (unshared(own), adapter.blocks) for name, found in on.items()},
        weights={**_copies(adapted, adapter), **{key: adapted.weight(key) for key in sorted(adapted.trainable_biases)}},
        shared=shared(own),
    )
    return Training(learner=learner, params=params, config=adapter.config, adapted=adapted, name=name)


def prompt_learner(model: Model, graph: Graph, config: AdapterConfig, rng: np.random.Generator, sources: Sources = NO_SOURCES) -> Training:
    """The training of a fresh prompt."""
    task = config.housekeeping.get("task_type")
    if not isinstance(config.method, Prompt) or task is None:
        raise ConfigError(f"{type(config.method).__name__} with task_type={task!r}: a method of prompts and a task are needed.")
    method = config.method.sized(graph.config, task)
    weights = {name: graph.weight(name) for name in graph.parameters()}
    net = Net(weights=weights, layers=model.layers(), ties=graph.tied())
    like = next(iter(weights.values()))
    if sources.words is None:
        sources = sources._replace(words=graph.weight(f"{word_table(model)}.weight"))
    saved = (*(config.targets.modules_to_save or ()), *SAVED_BY_TASK.get(task, ()))
    whole = saved_modules(config.targets, graph, task, ())
    copies = {key: graph.weight(key) for module in whole for key in parameters_below(graph, module)}
    return Training(
        learner=Learner(model=model, net=net, prompt=method, task_type=task),
        params=Trainable(weights=copies, prompt=method.init(like, rng, sources)),
        config=replace(config, method=method, targets=replace(config.targets, modules_to_save=saved or None)),
    )


def file_of(training: Training, state: State) -> AdapterFile:
    """What a file holds of the training at `state`."""
    params = mapped(np.asarray, state.params)
    if training.adapted is None:
        return _prompt_file(training, params)
    adapted = put_back(training, params)
    file = adapter_file(adapted, training.name)
    return file if state.allocation.kept is None else _pruned(file, mapped(np.asarray, state.allocation.kept))


def put_back(training: Training, params: Trainable) -> Adapted:
    """The model with the trained numbers."""
    if training.adapted is None:
        raise ConfigError("a prompt is no adapter on a model: `file_of` says what a file holds of it.")
    copies = _copies(training.adapted, training.adapted.attached(training.name))
    saved = {key: value for key, value in params.weights.items() if key in copies}
    biases = {key: value for key, value in params.weights.items() if key not in copies}
    return update(training.adapted, training.name, training.learner.whole(params), saved=saved, biases=biases)


def _copies(adapted: Adapted, adapter: Attached) -> dict[str, Array]:
    """The parameters among the copies; a buffer that a file brought is none."""
    return {key: copy for key, copy in adapter.saved.items() if key in adapted.parameters()}


def _pruned(file: AdapterFile, kept: Mapping[str, Any]) -> AdapterFile:
    """An AdaLoRA without the triplets that its allocator took away, as PEFT saves it."""
    modules = {}
    for name, (method, layer, params) in file.modules.items():
        if not isinstance(method, AdaLoRA):  # tokens that are trained beside it
            modules[name] = file.modules[name]
            continue
        cut, left = sliced(method, params, [bool(keep) for keep in kept[name]])
        modules[name] = AdapterModule(cut, layer, left)
    config = replace(file.config, patterns=replace(file.config.patterns, rank_pattern=rank_pattern(kept)))
    return replace(file, config=config, modules=modules)


def _prompt_file(training: Training, params: Trainable) -> AdapterFile:
    method = training.learner.prompt
    assert method is not None
    config = replace(training.config, method=method.in_inference())
    whole = {f"{PROMPT_PREFIX}{key}": np.asarray(value) for key, value in params.weights.items()}
    return AdapterFile(config=config, prompt=method.loaded(method.saved(params.prompt)), modules_to_save=whole)
