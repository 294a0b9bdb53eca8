"""What PEFT's layers tell of their configuration, by peft_type, in the words of the case: given the layer and PEFT's configuration.

The adapter is called "default".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Told: TypeAlias = dict[str, Any]


def rank_and_scale(layer: Any, config: Any) -> Told:
    return {"r": layer.r["default"], "scaling": layer.scaling["default"]}


def words(*names: str, prefix: str = "") -> Callable[[Any, Any], Told]:
    """What the layer keeps by adapter under these names."""
    return lambda layer, config: {name: getattr(layer, prefix + name)["default"] for name in names}


def _adalora(layer: Any, config: Any) -> Told:
    """Its `scaling` is not yet divided by the rank."""
    return {"r": layer.r["default"], "scaling": layer.scaling["default"] / (layer.ranknum["default"].item() + 1e-5)}


def _miss(layer: Any, config: Any) -> Told:
    """The height of a small block is not kept on a layer that has none."""
    return {"r": layer.miss_r["default"], "mini_r": config.mini_r}


def _oft(layer: Any, config: Any) -> Told:
    """The number and the size of blocks as they were asked for; the layer itself keeps what became of them."""
    rotation = layer.oft_R["default"]
    made = {name: getattr(rotation, name) for name in ("num_cayley_neumann_terms", "use_cayley_neumann", "coft", "block_share")}
    return {**made, "r": config.r, "oft_block_size": config.oft_block_size}


# What PEFT's layers call their dropout of the input.
DROPOUTS: Mapping[str, str] = {"GRALORA": "gralora_dropout", "HIRA": "hira_dropout", "MISS": "miss_dropout"}

TOLD: Mapping[str, Callable[[Any, Any], Told]] = {
    "ADALORA": _adalora,
    "HIRA": words("r"),
    "HRA": words("r", "apply_GS", prefix="hra_"),
    "IA3": lambda layer, config: {"is_feedforward": layer.is_feedforward},
    "MISS": _miss,
    "OFT": _oft,
    "ROAD": words("variant", "group_size"),
    "TRAINABLE_TOKENS": words("token_indices"),
}
