"""A prompt under PEFT on a tiny transformers model, beside the same prompt here: what the live comparisons of prompts compare."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import peft
import torch

from peft_ref.prompts import Prompt
from tests.hf.tiny_models import tiny

Host = np.ndarray[Any, Any]
CONFIGS = {
    "CARTRIDGE": peft.CartridgeConfig,
    "CPT": peft.CPTConfig,
    "PROMPT_TUNING": peft.PromptTuningConfig,
    "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig,
    "P_TUNING": peft.PromptEncoderConfig,
    "PREFIX_TUNING": peft.PrefixTuningConfig,
}


class Pair(NamedTuple):
    model: Any  # PEFT's
    method: Prompt  # with every size that the model's configuration gives
    tensors: dict[str, Host]

    @property
    def encoder(self) -> Any:
        return self.model.prompt_encoder["default"]

    @property
    def gradients(self) -> dict[str, Host]:
        """What PEFT does not train has none, which is a gradient of zero."""
        return {name: np.zeros(tuple(p.shape)) if p.grad is None else p.grad.numpy() for name, p in self.encoder.named_parameters()}


def pair(method: Prompt, task: str, rng: np.random.Generator, model: str = "") -> Pair:
    """Every trained number random, the same on both sides, in float64."""
    made = prompted(method, task, model)
    sized = method.sized(made.get_base_model().config.to_dict(), task)
    tensors = {name: rng.normal(size=shape) for name, shape in sized.shapes().items()}
    encoder = made.prompt_encoder["default"].double()
    encoder.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()}, strict=True)
    return Pair(made, sized, tensors)


def prompted(method: Prompt, task: str, model: str = "") -> Any:
    """PEFT's model of the method on a fresh tiny model of the task, in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.get_peft_model(tiny(model or task), config(method, task)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def config(method: Prompt, task: str) -> Any:
    own: Mapping[str, Any] = {f.name: getattr(method, f.name) for f in fields(method)}  # type: ignore[arg-type]  # a dataclass
    return CONFIGS[method.peft_type](task_type=task, **own)
