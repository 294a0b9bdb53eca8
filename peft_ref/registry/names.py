"""HF PEFT 0.21.2's names: its methods, its tasks, what each method's configuration is called and its parameters begin with.

A member of these enums is its own name as text: it compares, prints and goes into JSON as that. tests/registry holds all against PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum, unique
from types import MappingProxyType


@unique
class PeftType(StrEnum):
    """Every method of PEFT, built here or not."""

    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    BEFT = "BEFT"
    BOFT = "BOFT"
    C3A = "C3A"
    CARTRIDGE = "CARTRIDGE"
    CPT = "CPT"
    DEFT = "DEFT"
    DELORA = "DELORA"
    FOURIERFT = "FOURIERFT"
    FROD = "FROD"
    GLORA = "GLORA"
    GRALORA = "GRALORA"
    HIRA = "HIRA"
    HRA = "HRA"
    IA3 = "IA3"
    LILY = "LILY"
    LN_TUNING = "LN_TUNING"
    LOHA = "LOHA"
    LOKR = "LOKR"
    LORA = "LORA"
    MISS = "MISS"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    OFT = "OFT"
    OSF = "OSF"
    PEANUT = "PEANUT"
    POLY = "POLY"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    PSOFT = "PSOFT"
    PVERA = "PVERA"
    P_TUNING = "P_TUNING"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    SHADOW = "SHADOW"
    SHIRA = "SHIRA"
    SUPERTUNING = "SUPERTUNING"
    TINYLORA = "TINYLORA"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    UNILORA = "UNILORA"
    VBLORA = "VBLORA"
    VERA = "VERA"
    WAVEFT = "WAVEFT"
    XLORA = "XLORA"


@unique
class TaskType(StrEnum):
    """What a model is for; PEFT wraps it accordingly, and some of these save its head too."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


_OTHERS = {"ADALORA": "lora_", "LOHA": "hada_", "PVERA": "pvera_lambda_", "VERA": "vera_lambda_"}
TUNER_PREFIXES: Mapping[str, str] = MappingProxyType({kind.value: _OTHERS.get(kind, f"{kind.value.lower()}_") for kind in PeftType})

# The class of each method's configuration, as `peft.LoraConfig`.
_SPELT = (
    *("AdaLora", "BOFT", "CPT", "FourierFT", "HRA", "IA3", "LoHa", "LoKr", "OFT", "OSF", "RandLora", "TinyLora", "UniLora"),
    *("VBLoRA", "WaveFT", "XLora"),
)
_CALLED = {"LN_TUNING": "LNTuning", "P_TUNING": "PromptEncoder", **{name.upper(): name for name in _SPELT}}
CONFIG_NAMES: Mapping[str, str] = MappingProxyType(
    {kind.value: f"{_CALLED.get(kind, kind.title().replace('_', ''))}Config" for kind in PeftType}
)

# What PEFT once had, and what became of it.
REMOVED: Mapping[str, str] = MappingProxyType(
    {"BONE": "PEFT replaced it by MISS, the same method under other names. An adapter's folder is read as one of MISS"}
)
