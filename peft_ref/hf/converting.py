"""PEFT's conversion of an adapter of any method that changes weights to a LoRA."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from peft_ref.files.adapter import DEFAULT, all_tensors, save_adapter
from peft_ref.files.safetensors import Tensor
from peft_ref.hf.base import BaseModel
from peft_ref.hf.config import PeftConfig, of
from peft_ref.hf.mapping import adapted_of
from peft_ref.hf.peft_model import PeftModel
from peft_ref.hf.wrapped import refuse
from peft_ref.model.converting import Conversion, as_lora


def convert_to_lora(
    model: PeftModel | BaseModel,
    rank: float,
    adapter_name: str = DEFAULT,
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The adapter as a LoRA's configuration and tensors. A whole number is the largest rank, a float the share of energy that is kept."""
    file = _converted(model, rank, adapter_name, progressbar, compile_kwargs).file
    return of(file.config), all_tensors(file)


def save_as_lora(
    path: str | os.PathLike[str],
    model: PeftModel | BaseModel,
    rank: float,
    adapter_name: str = DEFAULT,
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapter as a LoRA into the folder `path`."""
    save_adapter(path, _converted(model, rank, adapter_name, progressbar, compile_kwargs).file)


def _converted(model: PeftModel | BaseModel, rank: float, name: str, progressbar: bool, compile_kwargs: Any) -> Conversion:
    refuse({"progressbar": progressbar, "compile_kwargs": compile_kwargs})
    adapted = adapted_of(model)
    return as_lora(adapted, name, energy=rank) if isinstance(rank, float) else as_lora(adapted, name, rank=rank)
