"""The configurations of methods that rotate or scale the weight: PEFT's fields, names and defaults.

HF      the classes of these names in peft
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peft_ref.hf.config import PeftConfig, registered
from peft_ref.registry import PeftType


@registered
@dataclass(kw_only=True)
class BOFTConfig(PeftConfig):
    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    kind: ClassVar[PeftType | None] = PeftType.BOFT


@registered
@dataclass(kw_only=True)
class HRAConfig(PeftConfig):
    r: int = 8
    apply_GS: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None

    kind: ClassVar[PeftType | None] = PeftType.HRA


@registered
@dataclass(kw_only=True)
class OFTConfig(PeftConfig):
    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    exclude_modules: list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    coft: bool = False
    eps: float = 6e-05
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    kind: ClassVar[PeftType | None] = PeftType.OFT


@registered
@dataclass(kw_only=True)
class PsoftConfig(PeftConfig):
    r: int = 32
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    psoft_alpha: int = 32
    psoft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    ab_svd_init: str = "psoft_init"
    psoft_svd: str = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    kind: ClassVar[PeftType | None] = PeftType.PSOFT


@registered
@dataclass(kw_only=True)
class RoadConfig(PeftConfig):
    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    kind: ClassVar[PeftType | None] = PeftType.ROAD


@registered
@dataclass(kw_only=True)
class OSFConfig(PeftConfig):
    effective_rank: int | None = None
    target_modules: list[str] | str | None = None
    rank_pattern: dict[str, Any] | None = None
    init_weights: bool | None = True
    modules_to_save: list[str] | None = None
    target_svd_config: Any = None

    kind: ClassVar[PeftType | None] = PeftType.OSF


@registered
@dataclass(kw_only=True)
class DeftConfig(PeftConfig):
    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    decomposition_method: str = "relu"
    init_scale: float = 1.0
    alpha: int | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None

    kind: ClassVar[PeftType | None] = PeftType.DEFT


@registered
@dataclass(kw_only=True)
class GloraConfig(PeftConfig):
    r: int = 8
    target_modules: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    config_A_B: str = "lora"
    config_C: str = "lora"
    config_D_E: str = "constant"
    init_weights: bool = True

    kind: ClassVar[PeftType | None] = PeftType.GLORA


@registered
@dataclass(kw_only=True)
class PeanutConfig(PeftConfig):
    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_weights: bool = True

    kind: ClassVar[PeftType | None] = PeftType.PEANUT
