"""A small torch model under live HF PEFT, and the same model and adapters here, on arrays that cannot be written to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra `hf` is not installed")
peft = pytest.importorskip("peft", reason="the extra `hf` is not installed")

from peft_ref.files.adapter import AdapterFile, from_state_dict  # noqa: E402
from peft_ref.files.config import AdapterConfig, from_dict  # noqa: E402
from peft_ref.graph import Graph, MappingGraph, TorchGraph  # noqa: E402
from peft_ref.model.adapted import Adapted, adapt  # noqa: E402
from peft_ref.model.placing import place  # noqa: E402
from peft_ref.model.storing import attach  # noqa: E402

nn = torch.nn
OWN = ("lora_", "ia3_", "hada_", "modules_to_save", "trainable_tokens_")  # the names after which an adapter's stands


class Net(nn.Module):  # type: ignore[misc]  # torch has no types here
    """One of each kind of layer, unequal sizes, numbers in the names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(6, 5), "up": nn.Linear(6, 4, bias=False)}) for _ in range(2)])
        self.conv = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1)
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Any) -> Any:
        return x


INPUTS: Mapping[str, Any] = {
    "layers.0.q": (3, 6),
    "layers.1.q": (3, 6),
    "layers.0.up": (2, 6),
    "layers.1.up": (2, 6),
    "conv": (2, 4, 5, 5),
    "table": None,
    "head": (2, 5),
}


def net(seed: int = 0, cls: Any = Net) -> Any:
    torch.manual_seed(seed)
    return cls().double().eval()


def frozen_graph(model: Any) -> Graph:
    """A copy of the model's arrays, none of which can be written to."""
    graph = TorchGraph(model)
    arrays = {name: graph.weight(name).numpy().copy() for name in graph.parameters()}
    for array in arrays.values():
        array.setflags(write=False)
    layers = {name: m.layer for name, m in graph.modules().items() if m.layer is not None}
    kept = {name: buffer.numpy().copy() for name, buffer in graph.buffers().items()}
    return MappingGraph(
        arrays=arrays, layers=layers, ties=dict(graph.tied()), kept=kept, model_config=dict(graph.config), head=graph.output_head
    )


def inputs(seed: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 7, (2, 3)) if shape is None else rng.normal(size=shape) for name, shape in INPUTS.items()}


def config_of(config: Any) -> AdapterConfig:
    """A configuration of PEFT's as ours, through its own dictionary."""
    data = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return from_dict(json.loads(json.dumps(data, default=lambda value: getattr(value, "value", None))))


def randomise(model: Any, name: str, seed: int, deviation: float = 0.3) -> None:
    """Other numbers for the PEFT adapter `name` and its copies; what starts at one stays near it."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        parts = key.split(".")
        owners = [after for part, after in pairwise(parts) if part.startswith(OWN)]
        if owners == [name]:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * deviation
            parameter.data = parameter.data + noise


def tensors_of(model: Any, name: str) -> dict[str, np.ndarray[Any, Any]]:
    """PEFT's own state dict of an adapter, as arrays of their own. Its keys must not be lost to another adapter's name: see keys.py."""
    return {key: value.detach().numpy().copy() for key, value in peft.get_peft_model_state_dict(model, adapter_name=name).items()}


def file_of(model: Any, name: str, graph: Graph) -> AdapterFile:
    config = config_of(model.peft_config[name])
    placed = place(adapt(graph), config)
    return from_state_dict(placed.config, tensors_of(model, name), placed.layers)


def mirrored(graph: Graph, model: Any, names: tuple[str, ...], mixed: bool = False) -> Adapted:
    """Our model with the same adapters, the first one active and trainable, as PEFT has them after `get_peft_model` and `add_adapter`."""
    ours = adapt(graph, mixed=mixed)
    for name in names:
        ours = attach(ours, name, file_of(model, name, graph), trainable=not ours.adapters)
    return ours


def layer_output(model: Any, module: str, x: Any) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        found = model.base_model.model.get_submodule(module)
        value: np.ndarray[Any, Any] = found(torch.from_numpy(np.array(x))).numpy()
    return value
