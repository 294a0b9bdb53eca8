"""What PEFT's configuration classes share: fields to write into, and the way to and from an `AdapterConfig`, which is the frozen one.

    PeftConfig  --frozen-->  AdapterConfig  --of-->  PeftConfig

A configuration is checked when it is made, as PEFT does, and again when it is put on a model: its fields may change in between.

HF      peft.PeftConfig. Fields are given by name here. A list of names stays a list, where PEFT makes a set of it, so that a file is the
        same each time. There is no Hub: a configuration is read from a folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from peft_ref.errors import ConfigError, naming
from peft_ref.files.adapter import CONFIG, DEFAULT, load_config
from peft_ref.files.atomic import replace_files
from peft_ref.files.config import AdapterConfig, flatten, from_dict, render
from peft_ref.registry import PeftType, TaskType

PEFT_VERSION = "0.21.2"  # whose files and behaviour these are

C = TypeVar("C", bound="PeftConfig")


@dataclass(kw_only=True)
class PeftConfig:
    """What every adapter_config.json says. Mutable, as PEFT's."""

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None  # PEFT_VERSION where none is said
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    kind: ClassVar[PeftType | None] = None  # the peft_type of the class
    unused: ClassVar[tuple[str, ...]] = ()  # fields that PEFT acts upon when it makes an adapter, and nothing here does

    def __post_init__(self) -> None:
        self.peft_version = self.peft_version or PEFT_VERSION
        if self.kind is not None:
            self.peft_type = self.kind
            self.frozen()

    def to_dict(self) -> dict[str, Any]:
        """Every field by its name."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write adapter_config.json alone."""
        replace_files(Path(save_directory), {CONFIG: render(self.frozen()).encode()})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None) -> PeftConfig:
        """The configuration in a folder, of the class that its peft_type names."""
        folder = _folder(pretrained_model_name_or_path, subfolder)
        with naming(folder):
            return of(load_config(folder, DEFAULT))

    @property
    def is_prompt_learning(self) -> bool:
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        return False

    def frozen(self) -> AdapterConfig:
        """The same as a value. Raises `ConfigError` where it cannot be, or asks for what is not built."""
        name = type(self).__name__
        if self.kind is None:
            raise ConfigError(f"{name} is no method.\n  There are {', '.join(cls.__name__ for cls in CLASSES.values())}.")
        return from_dict(_in_order(self.to_dict()), name)

    def fresh(self) -> AdapterConfig:
        """`frozen` for an adapter that is to be made, whose start and options have to be those that were asked for."""
        for key in self.unused:
            if value := getattr(self, key):
                raise ConfigError(
                    f"{type(self).__name__}: {key}={value!r:.60} is not built here, and would change nothing.\n  Leave it out."
                )
        init = getattr(self, "init_lora_weights", None)
        if isinstance(init, str) and init.lower().startswith(("eva", "lora_ga", "corda", "pissa_niter")):
            remedy = "Use 'pissa', which is exact." if init.startswith("pissa") else "It starts from data, which is not asked for here."
            raise ConfigError(f"{type(self).__name__}: init_lora_weights={init!r} makes no fresh adapter here.\n  {remedy}")
        return self.frozen()

    def settle(self, config: AdapterConfig) -> None:
        """Take over what a model added: sizes, targets, modules_to_save. PEFT writes it into the same object, too."""
        said = flatten(config)
        for f in fields(self):
            if f.name in said and plain(getattr(self, f.name)) != said[f.name]:
                setattr(self, f.name, said[f.name])


@dataclass(kw_only=True)
class PromptLearningConfig(PeftConfig):
    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    @property
    def is_prompt_learning(self) -> bool:
        return True


CLASSES: dict[str, type[PeftConfig]] = {}  # by peft_type


def registered(cls: type[C]) -> type[C]:
    """Let `cls` be what a peft_type is read as."""
    CLASSES[str(cls.kind)] = cls
    return cls


def of(config: AdapterConfig) -> PeftConfig:
    """A frozen configuration as one of PEFT's classes. What its class has no field for stays with the frozen one."""
    said = flatten(config)
    cls = _class(said["peft_type"])
    return cls(**{f.name: said[f.name] for f in fields(cls) if f.name in said})


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The configuration that a dict describes."""
    cls = _class(config_dict["peft_type"])
    if unknown := sorted(config_dict.keys() - {f.name for f in fields(cls)}):
        raise ConfigError(f"{cls.__name__} has no {', '.join(unknown)} (HF PEFT refuses it too).")
    return cls(**config_dict)


def as_kept(config: PeftConfig, attached: AdapterConfig) -> AdapterConfig:
    """`attached` with what was written into `config` since. Only what computes nothing can be."""
    before = of(attached)
    changed = {f.name: value for f in fields(before) if (value := plain(getattr(config, f.name))) != plain(getattr(before, f.name))}
    if fixed := sorted(changed.keys() - {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}):
        raise ConfigError(
            f"{fixed[0]} was changed to {changed[fixed[0]]!r:.60} after the adapter was made, which would belie its numbers.\n"
            "  Make another adapter with it."
        )
    return replace(attached, housekeeping={**attached.housekeeping, **{k: v for k, v in changed.items() if k != "inference_mode"}})


def _class(peft_type: Any) -> type[PeftConfig]:
    if (found := CLASSES.get(plain(peft_type))) is None:
        raise ConfigError(f"peft_type={plain(peft_type)!r:.60} has no configuration class here.\n  There are {', '.join(sorted(CLASSES))}.")
    return found


def _folder(path: str | os.PathLike[str], subfolder: str | None) -> Path:
    return Path(path) if subfolder is None else Path(path) / subfolder


def _in_order(said: Mapping[str, Any]) -> dict[str, Any]:
    """Sorted, and the maps within too, as PEFT writes them; but for patterns, of which the first that matches wins."""
    return {
        key: dict(sorted(value.items())) if isinstance(value, Mapping) and not key.endswith("_pattern") else value
        for key, value in sorted(said.items())
    }


def plain(value: Any) -> Any:
    """As JSON has it: an enumeration's word as text, PEFT's own too; a value of a class as a map."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


class PromptTuningInit(StrEnum):
    TEXT = "TEXT"
    RANDOM = "RANDOM"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"


class MultitaskPromptTuningInit(StrEnum):
    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


class PromptEncoderReparameterizationType(StrEnum):
    MLP = "MLP"
    LSTM = "LSTM"
