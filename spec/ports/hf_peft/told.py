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


def _oft(layer: Any, config: Any) -> Told:
    """The number and the size of blocks as they were asked for; the layer itself keeps what became of them."""
    rotation = layer.oft_R["default"]
    made = {name: getattr(rotation, name) for name in ("num_cayley_neumann_terms", "use_cayley_neumann", "coft", "block_share")}
    return {**made, "r": config.r, "oft_block_size": config.oft_block_size}


def _boft(layer: Any, config: Any) -> Told:
    """Blocks as they were asked for, and how many factors became of what was asked."""
    return {
        "boft_block_size": config.boft_block_size,
        "boft_block_num": config.boft_block_num,
        "boft_n_butterfly_factor": layer.boft_R["default"].shape[0],
    }


def _psoft(layer: Any, config: Any) -> Told:
    turn = layer.psoft_R["default"]
    told = {"psoft_orth": turn.orth, "psoft_mag_a": turn.mag_a, "psoft_mag_b": turn.mag_b}
    series = {name: getattr(turn, name) for name in ("use_cayley_neumann", "num_cayley_neumann_terms", "cayley_neumann_eps")}
    return {**rank_and_scale(layer, config), **told, **series}


# What PEFT's layers call their dropout of the input.
NAMED = ("DELORA", "FROD", "GRALORA", "HIRA", "MISS", "PSOFT", "PVERA", "RANDLORA", "TINYLORA", "UNILORA", "VBLORA", "VERA")
DROPOUTS: Mapping[str, str] = {name: f"{name.lower()}_dropout" for name in NAMED} | {"SUPERTUNING": "supertuning_lora_dropout"}

TOLD: Mapping[str, Callable[[Any, Any], Told]] = {
    "ADALORA": _adalora,
    "VERA": words("r"),
    "VBLORA": words("r", "topk"),
    "UNILORA": words("r"),
    "PVERA": words("r"),
    "BEFT": lambda layer, config: {},
    "ADAMSS": words("num_subspaces"),
    "BOFT": _boft,
    "C3A": words("block_size"),
    "FOURIERFT": words("n_frequency", "scaling", prefix="fourierft_"),
    "DELORA": lambda layer, config: {"r": layer.r["default"], "delora_lambda": layer.delora_lambda["default"].item()},
    "DEFT": lambda layer, config: {"decomposition_method": layer.deft_decomposition["default"], "para": layer.deft_para["default"]},
    "FROD": lambda layer, config: {},
    "GLORA": words("r"),
    "HIRA": words("r"),
    "HRA": words("r", "apply_GS", prefix="hra_"),
    "IA3": lambda layer, config: {"is_feedforward": layer.is_feedforward},
    "LN_TUNING": lambda layer, config: {},
    "MISS": words("r", prefix="miss_"),
    "OFT": _oft,
    "OSF": words("effective_rank"),
    "PEANUT": words("r", "depth", "scaling", "act_fn"),
    "PSOFT": _psoft,
    "ROAD": words("variant", "group_size"),
    "SHIRA": words("r"),
    "SUPERTUNING": lambda layer, config: {"r": config.r, "scaling": config.lora_alpha / config.r if config.r else 0.0},
    "TINYLORA": words("r", "u"),
    "TRAINABLE_TOKENS": words("token_indices"),
    "WAVEFT": lambda layer, config: {
        name: getattr(layer, f"waveft_{name}")["default"] for name in ("n_frequency", "scaling", "wavelet_family", "use_idwt")
    },
}
