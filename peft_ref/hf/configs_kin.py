"""The configurations of LoKr, HiRA, GraLoRA and MiSS: PEFT's fields, names and defaults.

HF      peft.LoKrConfig and its like. MiSS mini and MiSS bat are MissConfig with init_weights="mini" and "bat".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft_ref.hf.config import PeftConfig, registered
from peft_ref.registry import PeftType


@registered
@dataclass(kw_only=True)
class LoKrConfig(PeftConfig):
    rank_pattern: dict[str, Any] | None = field(default_factory=dict)
    alpha_pattern: dict[str, Any] | None = field(default_factory=dict)
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    kind: ClassVar[PeftType | None] = PeftType.LOKR


@registered
@dataclass(kw_only=True)
class HiraConfig(PeftConfig):
    r: int = 32
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_weights: bool | str | None = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Any] | None = field(default_factory=dict)

    kind: ClassVar[PeftType | None] = PeftType.HIRA


@registered
@dataclass(kw_only=True)
class GraloraConfig(PeftConfig):
    r: int = 32
    hybrid_r: int = 0
    target_modules: list[str] | str | None = None
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: str | None = None

    kind: ClassVar[PeftType | None] = PeftType.GRALORA


@registered
@dataclass(kw_only=True)
class MissConfig(PeftConfig):
    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None

    kind: ClassVar[PeftType | None] = PeftType.MISS
