"""The configurations of methods that add to the weight or replace some of it: PEFT's fields, names and defaults.

HF      the classes of these names in peft
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft_ref.hf.config import PeftConfig, registered
from peft_ref.registry import PeftType


@registered
@dataclass(kw_only=True)
class AdamssConfig(PeftConfig):
    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    target_modules: list[str] | str | None = None
    init_weights: str | None = "orthogonal"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0

    kind: ClassVar[PeftType | None] = PeftType.ADAMSS


@registered
@dataclass(kw_only=True)
class BeftConfig(PeftConfig):
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = True

    kind: ClassVar[PeftType | None] = PeftType.BEFT


@registered
@dataclass(kw_only=True)
class C3AConfig(PeftConfig):
    block_size: int = 256
    target_modules: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    block_size_pattern: dict[str, Any] | None = field(default_factory=dict)
    init_weights: str | None = "xavier_uniform"

    kind: ClassVar[PeftType | None] = PeftType.C3A


@registered
@dataclass(kw_only=True)
class DeloraConfig(PeftConfig):
    r: int = 8
    delora_lambda: int = 15
    module_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    bias: str = "none"
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Any] | None = field(default_factory=dict)
    lambda_pattern: dict[str, Any] | None = field(default_factory=dict)
    modules_to_save: list[str] | None = None

    kind: ClassVar[PeftType | None] = PeftType.DELORA


@registered
@dataclass(kw_only=True)
class FourierFTConfig(PeftConfig):
    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    fan_in_fan_out: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    n_frequency_pattern: dict[str, Any] | None = field(default_factory=dict)
    init_weights: bool = False

    kind: ClassVar[PeftType | None] = PeftType.FOURIERFT


@registered
@dataclass(kw_only=True)
class LNTuningConfig(PeftConfig):
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    kind: ClassVar[PeftType | None] = PeftType.LN_TUNING


@registered
@dataclass(kw_only=True)
class ShiraConfig(PeftConfig):
    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    target_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True
    modules_to_save: list[str] | None = None

    kind: ClassVar[PeftType | None] = PeftType.SHIRA


@registered
@dataclass(kw_only=True)
class SupertuningConfig(PeftConfig):
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    kind: ClassVar[PeftType | None] = PeftType.SUPERTUNING


@registered
@dataclass(kw_only=True)
class WaveFTConfig(PeftConfig):
    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    n_frequency_pattern: dict[str, Any] | None = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    kind: ClassVar[PeftType | None] = PeftType.WAVEFT


@registered
@dataclass(kw_only=True)
class TrainableTokensConfig(PeftConfig):
    token_indices: list[Any] | None = field(default_factory=list)
    target_modules: list[str] | str | None = None
    init_weights: bool = True

    kind: ClassVar[PeftType | None] = PeftType.TRAINABLE_TOKENS
