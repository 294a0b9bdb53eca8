"""Every method's suite: what is asked about it, and its known mistakes. One module each; `register_suite` adds other packages'."""

from __future__ import annotations

import peft_ref.check.mistakes.adalora as adalora
import peft_ref.check.mistakes.dora as dora
import peft_ref.check.mistakes.gralora as gralora
import peft_ref.check.mistakes.hira as hira
import peft_ref.check.mistakes.ia3 as ia3
import peft_ref.check.mistakes.loha as loha
import peft_ref.check.mistakes.lokr as lokr
import peft_ref.check.mistakes.lora as lora
import peft_ref.check.mistakes.miss as miss
import peft_ref.check.mistakes.miss_bat as miss_bat
import peft_ref.check.mistakes.miss_mini as miss_mini
import peft_ref.check.mistakes.multitask_prompt_tuning as multitask_prompt_tuning
import peft_ref.check.mistakes.p_tuning as p_tuning
import peft_ref.check.mistakes.prefix_tuning as prefix_tuning
import peft_ref.check.mistakes.prompt_tuning as prompt_tuning
from peft_ref.check.mistake import Suite
from peft_ref.check.suites import Suites

_BUILT: dict[str, Suite] = {
    "adalora": adalora.SUITE,
    "dora": dora.SUITE,
    "gralora": gralora.SUITE,
    "hira": hira.SUITE,
    "ia3": ia3.SUITE,
    "loha": loha.SUITE,
    "lokr": lokr.SUITE,
    "lora": lora.SUITE,
    "miss": miss.SUITE,
    "miss_bat": miss_bat.SUITE,
    "miss_mini": miss_mini.SUITE,
    "multitask_prompt_tuning": multitask_prompt_tuning.SUITE,
    "p_tuning": p_tuning.SUITE,
    "prefix_tuning": prefix_tuning.SUITE,
    "prompt_tuning": prompt_tuning.SUITE,
}

SUITES = Suites(_BUILT)  # an ordinary mapping to whoever reads it
register_suite = SUITES.register
