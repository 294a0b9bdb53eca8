"""Every method's suite: what is asked about it, and its known mistakes. One module each; `register_suite` adds other packages'."""

from __future__ import annotations

import peft_ref.check.mistakes.adalora as adalora
import peft_ref.check.mistakes.beft as beft
import peft_ref.check.mistakes.c3a as c3a
import peft_ref.check.mistakes.dora as dora
import peft_ref.check.mistakes.fourierft as fourierft
import peft_ref.check.mistakes.ia3 as ia3
import peft_ref.check.mistakes.loha as loha
import peft_ref.check.mistakes.lora as lora
import peft_ref.check.mistakes.multitask_prompt_tuning as multitask_prompt_tuning
import peft_ref.check.mistakes.p_tuning as p_tuning
import peft_ref.check.mistakes.prefix_tuning as prefix_tuning
import peft_ref.check.mistakes.prompt_tuning as prompt_tuning
import peft_ref.check.mistakes.shira as shira
from peft_ref.check.mistake import Suite
from peft_ref.check.suites import Suites

_BUILT: dict[str, Suite] = {
    "adalora": adalora.SUITE,
    "beft": beft.SUITE,
    "c3a": c3a.SUITE,
    "dora": dora.SUITE,
    "fourierft": fourierft.SUITE,
    "ia3": ia3.SUITE,
    "loha": loha.SUITE,
    "lora": lora.SUITE,
    "multitask_prompt_tuning": multitask_prompt_tuning.SUITE,
    "p_tuning": p_tuning.SUITE,
    "prefix_tuning": prefix_tuning.SUITE,
    "prompt_tuning": prompt_tuning.SUITE,
    "shira": shira.SUITE,
}

SUITES = Suites(_BUILT)  # an ordinary mapping to whoever reads it
register_suite = SUITES.register
