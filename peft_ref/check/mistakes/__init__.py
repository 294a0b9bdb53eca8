"""Every method's suite: what is asked about it, and its known mistakes. One module each; `register_suite` adds other packages'."""

from __future__ import annotations

import peft_ref.check.mistakes.adalora as adalora
import peft_ref.check.mistakes.dora as dora
import peft_ref.check.mistakes.ia3 as ia3
import peft_ref.check.mistakes.loha as loha
import peft_ref.check.mistakes.lora as lora
from peft_ref.check.mistake import Suite
from peft_ref.check.suites import Suites

_BUILT: dict[str, Suite] = {
    "adalora": adalora.SUITE,
    "dora": dora.SUITE,
    "ia3": ia3.SUITE,
    "loha": loha.SUITE,
    "lora": lora.SUITE,
}

SUITES = Suites(_BUILT)  # an ordinary mapping to whoever reads it
register_suite = SUITES.register
