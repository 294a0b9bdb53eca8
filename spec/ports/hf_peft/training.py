"""The operations about training: AdaLoRA's penalty, as its model adds it to a loss, and its allocator, asked after every step.

Nothing trains here: PEFT's parameters and their gradients are set to the case's numbers, and PEFT's own methods are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from model import NotInPeft, array, nested
from peft import AdaLoraConfig, get_peft_model
from text import Named
from torch import nn

Json = Mapping[str, Any]
KEYS = ("lora_A", "lora_E", "lora_B")


class Trained(Named):
    """Its loss is zero: what comes out of PEFT's model is PEFT's alone."""

    def forward(self, dtype: torch.dtype) -> SimpleNamespace:
        return SimpleNamespace(loss=torch.zeros((), dtype=dtype))


def aux_loss(case: Json, dtype: torch.dtype) -> dict[str, Any]:
    model = trained(case["adapter_config"], case["parameters"], dtype)
    fill(model, case["parameters"], dtype)
    loss = model(dtype).loss
    loss.backward()
    found = {name: {key: nested(gradient_of(p)) for key, p in own.items()} for name, own in parameters(model, case["parameters"])}
    return {"loss": loss.item(), "gradients": found}


def allocate(case: Json, dtype: torch.dtype) -> dict[str, Any]:
    first, steps, averages = case["steps"][0]["parameters"], {}, {}
    if case["adapter_config"]["init_r"] == case["adapter_config"]["target_r"]:
        raise NotInPeft("PEFT crashes at the first allocation where nothing is to be pruned (init_r == target_r)")
    model = trained(case["adapter_config"], first, dtype)
    for step in case["steps"]:
        fill(model, step["parameters"], dtype)
        for name, own in parameters(model, first):
            for key, parameter in own.items():
                parameter.grad = array(step["gradients"][name][key], dtype)
        model.update_and_allocate(step["step"])
        steps[str(step["step"])] = {name: {key: nested(p) for key, p in own.items()} for name, own in parameters(model, first)}
        if model.rankallocator.exp_avg_ipt:  # which it empties at the last allocation
            averages = {"sensitivity": dict(model.rankallocator.exp_avg_ipt), "uncertainty": dict(model.rankallocator.exp_avg_unc)}
    names = {name: {key: f"{name}.{key}.default" for key in KEYS} for name in first}
    told = {
        what: {name: {key: nested(found[full]) for key, full in own.items()} for name, own in names.items()}
        for what, found in averages.items()
    }
    return {"steps": steps, **told}


TRAINING_OPERATIONS: Mapping[str, Callable[[Json, torch.dtype], dict[str, Any]]] = {"aux_loss": aux_loss, "allocate": allocate}


def trained(config: Json, tensors: Json, dtype: torch.dtype) -> Any:
    """PEFT's AdaLoRA model over linear layers of the tensors' sizes."""
    layers = [(name, nn.Linear(len(own["lora_A"][0]), len(own["lora_B"]), bias=False)) for name, own in tensors.items()]
    given = {key: value for key, value in config.items() if key not in ("peft_type", "live_r")}
    peft_config = AdaLoraConfig(target_modules=list(tensors), **given)
    return get_peft_model(Trained(layers), peft_config, autocast_adapter_dtype=False).to(dtype).base_model


def parameters(model: Any, tensors: Json) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
    for name in tensors:
        layer = model.model.get_submodule(name)
        yield name, {key: getattr(layer, key)["default"] for key in KEYS}


def fill(model: Any, tensors: Json, dtype: torch.dtype) -> None:
    for name, own in parameters(model, tensors):
        for key, parameter in own.items():
            parameter.data = array(tensors[name][key], dtype)


def gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
