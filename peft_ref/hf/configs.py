"""The configuration of every method that is built: PEFT's fields, names and defaults.

HF      peft.LoraConfig and its like. DoRA is LoraConfig(use_dora=True). A field of a method that is not built may only say that it is off.
        What a map within a LoraConfig says is one of its class, as in PEFT; here that is a value, and a key that it has not is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from peft_ref.errors import ConfigError
from peft_ref.hf.config import (
    MultitaskPromptTuningInit,
    PeftConfig,
    PromptEncoderReparameterizationType,
    PromptLearningConfig,
    PromptTuningInit,
    plain,
    registered,
)
from peft_ref.methods import METHODS
from peft_ref.methods.bdlora import BdLoraConfig
from peft_ref.methods.kasa import KasaConfig
from peft_ref.methods.monteclora import MontecloraConfig
from peft_ref.methods.submap import as_submap
from peft_ref.methods.velora import VeloraConfig
from peft_ref.registry import PeftType, TaskType


@registered
@dataclass(kw_only=True)
class LoraConfig(PeftConfig):
    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Any] | None = field(default_factory=dict)
    alpha_pattern: dict[str, Any] | None = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] | None = field(default_factory=dict)
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    use_dora: bool = False
    velora_config: VeloraConfig | dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: MontecloraConfig | dict[str, Any] | None = None
    layer_replication: list[list[int]] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: BdLoraConfig | dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: KasaConfig | dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    kind: ClassVar[PeftType | None] = PeftType.LORA
    unused: ClassVar[tuple[str, ...]] = (
        "megatron_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    )

    def __post_init__(self) -> None:
        said = vars(self)
        for method in METHODS.siblings("LORA"):
            if isinstance(method.flag_value, type) and method.flag in said:
                setattr(self, method.flag, _within(method.flag_value, method.flag, said[method.flag]))
        super().__post_init__()


def _within(cls: type[Any], name: str, value: Any) -> Any:
    """A map as one of its class; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    known = [f.name for f in fields(cls)]
    if unknown := sorted(str(key) for key in value if key not in known):
        raise ConfigError(f"LoraConfig: {name} has no {', '.join(unknown)}.\n  A {cls.__name__} has {', '.join(known)}.")
    try:
        return as_submap(cls, name, {key: plain(given) for key, given in value.items()})
    except ConfigError as error:
        raise ConfigError(f"LoraConfig: {error}") from error


@registered
@dataclass(kw_only=True)
class AdaLoraConfig(LoraConfig):
    rank_pattern: dict[str, Any] | None = None
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    kind: ClassVar[PeftType | None] = PeftType.ADALORA


@registered
@dataclass(kw_only=True)
class IA3Config(PeftConfig):
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    kind: ClassVar[PeftType | None] = PeftType.IA3


@registered
@dataclass(kw_only=True)
class LoHaConfig(PeftConfig):
    rank_pattern: dict[str, Any] | None = field(default_factory=dict)
    alpha_pattern: dict[str, Any] | None = field(default_factory=dict)
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    kind: ClassVar[PeftType | None] = PeftType.LOHA


@registered
@dataclass(kw_only=True)
class AdaptionPromptConfig(PeftConfig):
    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None

    kind: ClassVar[PeftType | None] = PeftType.ADAPTION_PROMPT

    @property
    def is_adaption_prompt(self) -> bool:
        return True


@registered
@dataclass(kw_only=True)
class PromptTuningConfig(PromptLearningConfig):
    prompt_tuning_init: PromptTuningInit | MultitaskPromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    kind: ClassVar[PeftType | None] = PeftType.PROMPT_TUNING


@registered
@dataclass(kw_only=True)
class MultitaskPromptTuningConfig(PromptTuningConfig):
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int = 1
    num_tasks: int = 1

    kind: ClassVar[PeftType | None] = PeftType.MULTITASK_PROMPT_TUNING


@registered
@dataclass(kw_only=True)
class PrefixTuningConfig(PromptLearningConfig):
    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    kind: ClassVar[PeftType | None] = PeftType.PREFIX_TUNING


@registered
@dataclass(kw_only=True)
class CartridgeConfig(PromptLearningConfig):
    num_frozen_tokens: int = 1

    kind: ClassVar[PeftType | None] = PeftType.CARTRIDGE


@registered
@dataclass(kw_only=True)
class CPTConfig(PromptLearningConfig):
    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: str | None = "none"
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    tokenizer_name_or_path: str | None = None

    kind: ClassVar[PeftType | None] = PeftType.CPT

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type != TaskType.CAUSAL_LM:
            raise ConfigError(f"CPTConfig with task_type={self.task_type!r}: it is for CAUSAL_LM alone (HF PEFT refuses it too).")
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        self.num_virtual_tokens = len(self.cpt_token_ids)
        self.num_transformer_submodules = 1
        ones = [1] * len(self.cpt_token_ids)
        self.cpt_mask = ones if self.cpt_mask is None else self.cpt_mask
        self.cpt_tokens_type_mask = ones if self.cpt_tokens_type_mask is None else self.cpt_tokens_type_mask


@registered
@dataclass(kw_only=True)
class PromptEncoderConfig(PromptLearningConfig):
    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    kind: ClassVar[PeftType | None] = PeftType.P_TUNING
