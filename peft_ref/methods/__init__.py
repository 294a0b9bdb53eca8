"""Every method, one file each, and the table of them, which `register_method` opens to methods of other packages (peft_ref/registry)."""

from __future__ import annotations

from peft_ref.contracts import Method
from peft_ref.methods.adalora import AdaLoRA
from peft_ref.methods.adaption_prompt import AdaptionPrompt
from peft_ref.methods.cartridge import Cartridge
from peft_ref.methods.cpt import CPT
from peft_ref.methods.dora import DoRA
from peft_ref.methods.hra import HRA
from peft_ref.methods.ia3 import IA3
from peft_ref.methods.loha import LoHa
from peft_ref.methods.lora import LoRA
from peft_ref.methods.multitask_prompt_tuning import MultitaskPromptTuning
from peft_ref.methods.oft import OFT
from peft_ref.methods.p_tuning import PTuning
from peft_ref.methods.prefix_tuning import PrefixTuning
from peft_ref.methods.prompt_tuning import PromptTuning
from peft_ref.methods.road import RoAd
from peft_ref.registry import Registry

_BUILT: dict[str, type[Method]] = {
    "adalora": AdaLoRA,
    "adaption_prompt": AdaptionPrompt,
    "cartridge": Cartridge,
    "cpt": CPT,
    "dora": DoRA,
    "hra": HRA,
    "ia3": IA3,
    "loha": LoHa,
    "lora": LoRA,
    "multitask_prompt_tuning": MultitaskPromptTuning,
    "oft": OFT,
    "p_tuning": PTuning,
    "prefix_tuning": PrefixTuning,
    "prompt_tuning": PromptTuning,
    "road": RoAd,
}

METHODS = Registry(_BUILT)  # an ordinary mapping to whoever reads it
register_method, method_class = METHODS.register, METHODS.method_class

__all__ = [
    "CPT",
    "HRA",
    "IA3",
    "METHODS",
    "OFT",
    "AdaLoRA",
    "AdaptionPrompt",
    "Cartridge",
    "DoRA",
    "LoHa",
    "LoRA",
    "MultitaskPromptTuning",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "RoAd",
]
