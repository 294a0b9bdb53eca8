"""The configurations of methods whose layers share something: PEFT's fields, names and defaults.

HF      the classes of these names in peft
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft_ref.hf.config import PeftConfig, registered
from peft_ref.registry import PeftType


@registered
@dataclass(kw_only=True)
class FrodConfig(PeftConfig):
    target_modules: list[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    sparse_rate: float = 0.01
    regularization_alpha: float = 1e-3
    progressbar: bool = True
    runtime_offload_base_weight: bool = False

    kind: ClassVar[PeftType | None] = PeftType.FROD


@registered
@dataclass(kw_only=True)
class PveraConfig(PeftConfig):
    r: int = 256
    target_modules: list[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    sample_at_inference: bool = False
    generator_seed: int | None = None

    kind: ClassVar[PeftType | None] = PeftType.PVERA


@registered
@dataclass(kw_only=True)
class RandLoraConfig(PeftConfig):
    r: int = 32
    target_modules: list[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: int = 640
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    kind: ClassVar[PeftType | None] = PeftType.RANDLORA


@registered
@dataclass(kw_only=True)
class TinyLoraConfig(PeftConfig):
    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    target_modules: list[str] | str | None = None
    tinylora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    kind: ClassVar[PeftType | None] = PeftType.TINYLORA


@registered
@dataclass(kw_only=True)
class UniLoraConfig(PeftConfig):
    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    target_modules: list[str] | str | None = None
    unilora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    kind: ClassVar[PeftType | None] = PeftType.UNILORA


@registered
@dataclass(kw_only=True)
class VBLoRAConfig(PeftConfig):
    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    kind: ClassVar[PeftType | None] = PeftType.VBLORA


@registered
@dataclass(kw_only=True)
class VeraConfig(PeftConfig):
    r: int = 256
    target_modules: list[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    kind: ClassVar[PeftType | None] = PeftType.VERA
