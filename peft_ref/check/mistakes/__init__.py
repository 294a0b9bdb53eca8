"""Every method's suite: what is asked about it, and its known mistakes. One module each; `register_suite` adds other packages'."""

from __future__ import annotations

import peft_ref.check.mistakes.adalora as adalora
import peft_ref.check.mistakes.adaption_prompt as adaption_prompt
import peft_ref.check.mistakes.cartridge as cartridge
import peft_ref.check.mistakes.cpt as cpt
import peft_ref.check.mistakes.dora as dora
import peft_ref.check.mistakes.hra as hra
import peft_ref.check.mistakes.ia3 as ia3
import peft_ref.check.mistakes.loha as loha
import peft_ref.check.mistakes.lora as lora
import peft_ref.check.mistakes.multitask_prompt_tuning as multitask_prompt_tuning
import peft_ref.check.mistakes.oft as oft
import peft_ref.check.mistakes.p_tuning as p_tuning
import peft_ref.check.mistakes.prefix_tuning as prefix_tuning
import peft_ref.check.mistakes.prompt_tuning as prompt_tuning
import peft_ref.check.mistakes.road as road
from peft_ref.check.mistake import Suite
from peft_ref.check.suites import Suites

_BUILT: dict[str, Suite] = {
    "adalora": adalora.SUITE,
    "adaption_prompt": adaption_prompt.SUITE,
    "cartridge": cartridge.SUITE,
    "cpt": cpt.SUITE,
    "dora": dora.SUITE,
    "hra": hra.SUITE,
    "ia3": ia3.SUITE,
    "loha": loha.SUITE,
    "lora": lora.SUITE,
    "multitask_prompt_tuning": multitask_prompt_tuning.SUITE,
    "oft": oft.SUITE,
    "p_tuning": p_tuning.SUITE,
    "prefix_tuning": prefix_tuning.SUITE,
    "prompt_tuning": prompt_tuning.SUITE,
    "road": road.SUITE,
}

SUITES = Suites(_BUILT)  # an ordinary mapping to whoever reads it
register_suite = SUITES.register
