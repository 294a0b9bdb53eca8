"""One torch layer under PEFT with random numbers, for the tests of quirks."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
from torch import nn


def model(layer: Any, *configs: Any) -> Any:
    """HF's model of one layer `l` with active adapters in float64, none of whose numbers is at its start."""
    base = nn.Sequential()
    base.add_module("l", layer.double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(base, configs[0], adapter_name="a0", autocast_adapter_dtype=False)
        for i, config in enumerate(configs[1:], start=1):
            made.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
    made.base_model.set_adapter([f"a{i}" for i in range(len(configs))])
    for p in made.parameters():
        if p.requires_grad:
            p.data = torch.rand_like(p) + 0.5
    return made.double().eval()


def wrapped(made: Any) -> Any:
    return made.base_model.model.l


def disagreement(made: Any, x: Any) -> float:
    """How far the merged layer is from the forward pass."""
    y = made(x)
    made.merge_adapter()
    return float((made(x) - y).abs().max())


def keys(made: Any, name: str = "a0") -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's saved tensors, under their keys after the layer's name."""
    return {
        k.removeprefix("base_model.model.l."): tuple(v.shape) for k, v in peft.get_peft_model_state_dict(made, adapter_name=name).items()
    }
