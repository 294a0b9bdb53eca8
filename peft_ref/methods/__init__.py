"""Every method, one file each, and the table of them, which `register_method` opens to methods of other packages (peft_ref/registry).

A method's file is imported when it is first asked for: 45 of them would make every import slow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_ref.registry import Registry

if TYPE_CHECKING:  # the same rows once more: a type checker reads no table
    from peft_ref.methods.adalora import AdaLoRA as AdaLoRA
    from peft_ref.methods.adamss import AdaMSS as AdaMSS
    from peft_ref.methods.adaption_prompt import AdaptionPrompt as AdaptionPrompt
    from peft_ref.methods.bdlora import BDLoRA as BDLoRA
    from peft_ref.methods.beft import BEFT as BEFT
    from peft_ref.methods.boft import BOFT as BOFT
    from peft_ref.methods.c3a import C3A as C3A
    from peft_ref.methods.cartridge import Cartridge as Cartridge
    from peft_ref.methods.cpt import CPT as CPT
    from peft_ref.methods.deft import DEFT as DEFT
    from peft_ref.methods.delora import DeLoRA as DeLoRA
    from peft_ref.methods.dora import DoRA as DoRA
    from peft_ref.methods.fourierft import FourierFT as FourierFT
    from peft_ref.methods.frod import FRoD as FRoD
    from peft_ref.methods.glora import GLoRA as GLoRA
    from peft_ref.methods.gralora import GraLoRA as GraLoRA
    from peft_ref.methods.hira import HiRA as HiRA
    from peft_ref.methods.hra import HRA as HRA
    from peft_ref.methods.ia3 import IA3 as IA3
    from peft_ref.methods.kasa import KaSA as KaSA
    from peft_ref.methods.ln_tuning import LNTuning as LNTuning
    from peft_ref.methods.loha import LoHa as LoHa
    from peft_ref.methods.loha_effective import LoHaEffective as LoHaEffective
    from peft_ref.methods.lokr import LoKr as LoKr
    from peft_ref.methods.lora import LoRA as LoRA
    from peft_ref.methods.mica import MiCA as MiCA
    from peft_ref.methods.miss import MiSS as MiSS
    from peft_ref.methods.miss_bat import MiSSBat as MiSSBat
    from peft_ref.methods.miss_mini import MiSSMini as MiSSMini
    from peft_ref.methods.monteclora import MonteCLoRA as MonteCLoRA
    from peft_ref.methods.multitask_prompt_tuning import MultitaskPromptTuning as MultitaskPromptTuning
    from peft_ref.methods.oft import OFT as OFT
    from peft_ref.methods.osf import OSF as OSF
    from peft_ref.methods.p_tuning import PTuning as PTuning
    from peft_ref.methods.peanut import PEANuT as PEANuT
    from peft_ref.methods.prefix_tuning import PrefixTuning as PrefixTuning
    from peft_ref.methods.prompt_tuning import PromptTuning as PromptTuning
    from peft_ref.methods.psoft import PSOFT as PSOFT
    from peft_ref.methods.pvera import PVeRA as PVeRA
    from peft_ref.methods.qalora import QALoRA as QALoRA
    from peft_ref.methods.randlora import RandLoRA as RandLoRA
    from peft_ref.methods.road import RoAd as RoAd
    from peft_ref.methods.shira import SHiRA as SHiRA
    from peft_ref.methods.supertuning import SuperTuning as SuperTuning
    from peft_ref.methods.tinylora import TinyLoRA as TinyLoRA
    from peft_ref.methods.trainable_tokens import TrainableTokens as TrainableTokens
    from peft_ref.methods.unilora import UniLoRA as UniLoRA
    from peft_ref.methods.vblora import VBLoRA as VBLoRA
    from peft_ref.methods.velora import VeLoRA as VeLoRA
    from peft_ref.methods.vera import VeRA as VeRA
    from peft_ref.methods.waveft import WaveFT as WaveFT

METHODS = Registry(  # an ordinary mapping to whoever reads it
    {
        "adalora": ("AdaLoRA", "ADALORA"),
        "adamss": ("AdaMSS", "ADAMSS"),
        "adaption_prompt": ("AdaptionPrompt", "ADAPTION_PROMPT"),
        "bdlora": ("BDLoRA", "LORA"),
        "beft": ("BEFT", "BEFT"),
        "boft": ("BOFT", "BOFT"),
        "c3a": ("C3A", "C3A"),
        "cartridge": ("Cartridge", "CARTRIDGE"),
        "cpt": ("CPT", "CPT"),
        "deft": ("DEFT", "DEFT"),
        "delora": ("DeLoRA", "DELORA"),
        "dora": ("DoRA", "LORA"),
        "fourierft": ("FourierFT", "FOURIERFT"),
        "frod": ("FRoD", "FROD"),
        "glora": ("GLoRA", "GLORA"),
        "gralora": ("GraLoRA", "GRALORA"),
        "hira": ("HiRA", "HIRA"),
        "hra": ("HRA", "HRA"),
        "ia3": ("IA3", "IA3"),
        "kasa": ("KaSA", "LORA"),
        "ln_tuning": ("LNTuning", "LN_TUNING"),
        "loha": ("LoHa", "LOHA"),
        "loha_effective": ("LoHaEffective", "LOHA"),
        "lokr": ("LoKr", "LOKR"),
        "lora": ("LoRA", "LORA"),
        "mica": ("MiCA", "LORA"),
        "miss": ("MiSS", "MISS"),
        "miss_bat": ("MiSSBat", "MISS"),
        "miss_mini": ("MiSSMini", "MISS"),
        "monteclora": ("MonteCLoRA", "LORA"),
        "multitask_prompt_tuning": ("MultitaskPromptTuning", "MULTITASK_PROMPT_TUNING"),
        "oft": ("OFT", "OFT"),
        "osf": ("OSF", "OSF"),
        "p_tuning": ("PTuning", "P_TUNING"),
        "peanut": ("PEANuT", "PEANUT"),
        "prefix_tuning": ("PrefixTuning", "PREFIX_TUNING"),
        "prompt_tuning": ("PromptTuning", "PROMPT_TUNING"),
        "psoft": ("PSOFT", "PSOFT"),
        "pvera": ("PVeRA", "PVERA"),
        "qalora": ("QALoRA", "LORA"),
        "randlora": ("RandLoRA", "RANDLORA"),
        "road": ("RoAd", "ROAD"),
        "shira": ("SHiRA", "SHIRA"),
        "supertuning": ("SuperTuning", "SUPERTUNING"),
        "tinylora": ("TinyLoRA", "TINYLORA"),
        "trainable_tokens": ("TrainableTokens", "TRAINABLE_TOKENS"),
        "unilora": ("UniLoRA", "UNILORA"),
        "vblora": ("VBLoRA", "VBLORA"),
        "velora": ("VeLoRA", "LORA"),
        "vera": ("VeRA", "VERA"),
        "waveft": ("WaveFT", "WAVEFT"),
    }
)
register_method, method_class = METHODS.register, METHODS.method_class


def _load(name: str) -> Any:
    if name == "__all__":
        return ["METHODS", *METHODS.class_names]
    if (cls := METHODS.class_called(name)) is None:
        raise AttributeError(f"module 'peft_ref.methods' has no attribute {name!r}. Methods: {', '.join(METHODS.class_names)}.")
    return cls


if not TYPE_CHECKING:  # a type checker that saw it would take every misspelt name for a method
    __getattr__ = _load
