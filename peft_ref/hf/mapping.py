"""PEFT's functions: a model wrapped, a model with adapters and no wrapper, and an adapter's tensors out and in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, overload

from peft_ref.errors import ConfigError
from peft_ref.files.adapter import DEFAULT, all_tensors, open_adapter
from peft_ref.files.safetensors import Tensor
from peft_ref.graph.protocol import Graph
from peft_ref.hf.base import BaseModel
from peft_ref.hf.config import PeftConfig
from peft_ref.hf.mixed import PeftMixedModel
from peft_ref.hf.peft_model import PeftModel, class_for
from peft_ref.hf.state import Layered
from peft_ref.hf.wrapped import Seed, Tokenize, refuse
from peft_ref.model import Adapted, LayerStatus, ModelStatus, layer_status, model_status
from peft_ref.model.ties import Ties
from peft_ref.nn import Loaded


@overload
def get_peft_model(
    model: Loaded | Graph | BaseModel,
    peft_config: PeftConfig,
    adapter_name: str = ...,
    mixed: Literal[False] = ...,
    autocast_adapter_dtype: bool = ...,
    revision: str | None = ...,
    low_cpu_mem_usage: bool = ...,
    *,
    rng: Seed = ...,
    ties: Ties = ...,
    tokenize: Tokenize | None = ...,
) -> PeftModel: ...


@overload
def get_peft_model(
    model: Loaded | Graph | BaseModel,
    peft_config: PeftConfig,
    adapter_name: str = ...,
    *,
    mixed: Literal[True],
    autocast_adapter_dtype: bool = ...,
    revision: str | None = ...,
    low_cpu_mem_usage: bool = ...,
    rng: Seed = ...,
    ties: Ties = ...,
    tokenize: Tokenize | None = ...,
) -> PeftMixedModel: ...


def get_peft_model(
    model: Loaded | Graph | BaseModel,
    peft_config: PeftConfig,
    adapter_name: str = DEFAULT,
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    rng: Seed = None,
    ties: Ties = "refuse",
    tokenize: Tokenize | None = None,
) -> PeftModel | PeftMixedModel:
    """`model` with a fresh adapter drawn from `rng` (seed 0 where none is given). `model` itself stays as it is."""
    if revision is not None:
        peft_config.revision = revision
    cls = PeftMixedModel if mixed else class_for(peft_config.task_type)
    return cls(
        model,
        peft_config,
        adapter_name,
        autocast_adapter_dtype,
        low_cpu_mem_usage,
        rng=rng,
        ties=ties,
        tokenize=tokenize,
    )


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: Loaded | Graph | BaseModel,
    adapter_name: str = DEFAULT,
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Any] | None = None,
    *,
    rng: Seed = None,
    ties: Ties = "refuse",
) -> BaseModel:
    """A model in whose layers a fresh adapter acts, with no PeftModel around it. `model` itself stays as it is."""
    refuse({"state_dict": state_dict})
    if peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
        raise ConfigError(f"{peft_config.peft_type} is in no layer (HF PEFT refuses it too).\n  Use get_peft_model.")
    made = PeftModel(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, rng=rng, ties=ties)
    return BaseModel(adapted_of(made))


def get_peft_model_state_dict(
    model: PeftModel | BaseModel,
    state_dict: Mapping[str, Any] | None = None,
    adapter_name: str = DEFAULT,
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """What the adapter's file holds, by key."""
    refuse({"state_dict": state_dict, "unwrap_compiled": unwrap_compiled})
    state = Layered(adapted=adapted_of(model)) if isinstance(model, BaseModel) else model.state
    return all_tensors(state.file(adapter_name, save_embedding_layers))


def set_peft_model_state_dict(
    model: PeftModel,
    peft_model_state_dict: Mapping[str, Any],
    adapter_name: str = DEFAULT,
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> None:
    """These numbers for the adapter. A tensor too few, too many or of another shape is an error."""
    refuse({"ignore_mismatched_sizes": ignore_mismatched_sizes, "low_cpu_mem_usage": low_cpu_mem_usage})
    model.renumber(adapter_name, peft_model_state_dict)


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    *,
    subfolder: str | None = None,
) -> dict[str, Tensor]:
    """The tensors in an adapter's folder, by key."""
    refuse({"device": None if device == "cpu" else device, "key_mapping": key_mapping})
    file = open_adapter(model_id, subfolder or DEFAULT)
    return {key: file.tensor(key) for key in file.entries}


def get_layer_status(model: PeftModel | BaseModel) -> list[LayerStatus]:
    return layer_status(adapted_of(model))


def get_model_status(model: PeftModel | BaseModel) -> ModelStatus:
    return model_status(adapted_of(model))


def adapted_of(model: PeftModel | BaseModel) -> Adapted:
    graph = model.graph if isinstance(model, BaseModel) else getattr(model.state, "adapted", None)
    if not isinstance(graph, Adapted):
        raise ConfigError(f"{model!r} has no adapters in its layers (HF PEFT refuses it too).")
    return graph
