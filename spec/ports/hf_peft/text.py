"""The operations about names: which modules a configuration targets, what it gives each of them, under which keys an adapter is saved.

The model is made of the case's names alone; its layers are as small as can be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from model import CONVOLUTIONS, NotInPeft, array, nested, norm
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, get_peft_model, get_peft_model_state_dict
from told import TOLD, rank_and_scale
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

Json = Mapping[str, Any]


class Named(PreTrainedModel):
    """A model of the given modules. PEFT asks it for its architecture, and for its output head where all linear layers are targeted."""

    def __init__(self, modules: Sequence[tuple[str, nn.Module]], model_type: str | None = None, output_head: str | None = None) -> None:
        super().__init__(type("Config", (PretrainedConfig,), {"model_type": model_type or "custom"})())
        self.output_head = output_head
        for name, module in modules:
            parent: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, module)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.get_submodule(self.output_head) if self.output_head else None


def targets(case: Json) -> dict[str, Any]:
    modules = [(m["name"], small(m["kind"])) for m in case["modules"]]
    model = Named(modules, case["model"].get("model_type"), case["model"].get("output_head"))
    own = {key: value for key, value in case["config"].items() if key != "peft_type"}
    try:
        tuner: Any = get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[case["config"].get("peft_type", "LORA")](**own)).base_model
    except (ValueError, TypeError) as refusal:
        return {"error": f"{type(refusal).__name__}: {refusal}"}
    return {"modules": list(tuner.targeted_module_names)}


def config(case: Json) -> dict[str, Any]:
    side = 256 if case["adapter_config"]["peft_type"] in ("C3A", "FOURIERFT", "SHIRA", "WAVEFT") else 64  # what their defaults fit on
    model = adapted([(name, nn.Linear(side, side)) for name in case["modules"]], case["adapter_config"], "default")
    adalora = case["adapter_config"]["peft_type"] == "ADALORA"
    if adalora and (pattern := case["adapter_config"].get("rank_pattern")):
        model.base_model.resize_modules_by_rank_pattern(pattern, "default")  # what loading does
    tell = TOLD.get(case["adapter_config"]["peft_type"], rank_and_scale)
    answer: dict[str, Any] = {}
    for name in case["modules"]:
        layer: Any = model.get_base_model().get_submodule(name)
        answer[name] = tell(layer, model.peft_config["default"])
    return {"modules": answer}


def state_dict(case: Json) -> dict[str, Any]:
    """The tensors are put straight into PEFT's parameters, so that their keys come from PEFT alone."""
    adapter = case["adapter_name"]
    if case["adapter_config"].get("use_qalora"):
        raise NotInPeft("PEFT makes QA-LoRA on GPTQ's layers alone")
    if case["adapter_config"]["peft_type"] == "TINYLORA" and adapter == "0":
        raise NotInPeft("PEFT cuts the number of a group out of its key where the adapter is called by that number")
    model = adapted([(m["name"], sized(m["layer"])) for m in case["modules"]], case["adapter_config"], adapter)
    for module in case["modules"]:
        layer = model.get_base_model().get_submodule(module["name"])
        for key, value in module["tensors"].items():
            parameter = parameter_of(layer, key, adapter)
            if not parameter.is_floating_point():  # places, which are no parameter there
                parameter.copy_(array(value, parameter.dtype))
                continue
            tensor = array(value, parameter.dtype)
            found_by_chance = case["adapter_config"]["peft_type"] == "ADAMSS"  # clusters of a random weight, and their sizes
            if tensor.shape != parameter.shape and not found_by_chance:
                raise ValueError(f"{key} is {tuple(tensor.shape)}, PEFT has {tuple(parameter.shape)}")
            parameter.data = tensor
    tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {"tensors": {key: nested(value) for key, value in tensors.items()}}


TEXT_OPERATIONS: Mapping[str, Callable[[Json], dict[str, Any]]] = {"targets": targets, "config": config, "state_dict": state_dict}


def adapted(modules: Sequence[tuple[str, nn.Module]], given: Json, adapter: str) -> Any:
    """A model of the modules under a PEFT configuration; one that names no targets gets all of them."""
    if given.get("init_lora_weights") == "mica" and torch.get_default_dtype() == torch.float64:
        raise NotInPeft("PEFT refuses MiCA on float64: ask with --dtype float32")
    own = {"target_modules": [name for name, _ in modules], **{k: v for k, v in given.items() if k != "peft_type"}}
    peft_config: PeftConfig = PEFT_TYPE_TO_CONFIG_MAPPING[given["peft_type"]](**own)
    model = Named(modules).float() if given["peft_type"] == "PSOFT" else Named(modules)  # which refuses float64
    return get_peft_model(model, peft_config, adapter_name=adapter, autocast_adapter_dtype=False)


def parameter_of(layer: Any, key: str, adapter: str) -> nn.Parameter:
    attribute, *rest = key.split(".")
    holder = getattr(layer, attribute)[adapter]
    if isinstance(holder, torch.Tensor):
        return holder
    if attribute == "tinylora_v":  # the vectors of all groups
        return holder[layer._tinylora_v_key[adapter]]
    for word in rest or ["weight"]:
        holder = holder[int(word)] if word.isdigit() else getattr(holder, word)
    return holder


def small(kind: str) -> nn.Module:
    if kind == "linear":
        return nn.Linear(2, 2)
    if kind == "transposed_linear":
        return Conv1D(2, 2)
    if kind == "embedding":
        return nn.Embedding(2, 2)
    return CONVOLUTIONS[kind](2, 2, 1) if kind in CONVOLUTIONS else nn.Identity()


def sized(layer: Json) -> nn.Module:
    """A layer of the case's sizes with any numbers."""
    if layer["kind"] == "linear":
        return nn.Linear(layer["in_features"], layer["out_features"])
    if layer["kind"] in CONVOLUTIONS:
        return CONVOLUTIONS[layer["kind"]](layer["in_channels"], layer["out_channels"], tuple(layer["kernel_size"]), groups=layer["groups"])
    if layer["kind"] == "embedding":
        return nn.Embedding(layer["num_embeddings"], layer["embedding_dim"])
    if layer["kind"] == "norm":
        return norm(layer, bias=layer["centred"])
    raise ValueError(f"state_dict on a {layer['kind']} layer is not asked yet")
