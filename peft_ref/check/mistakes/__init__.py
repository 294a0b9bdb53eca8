"""Every method's suite: what is asked about it, and its known mistakes. One module per method."""

from __future__ import annotations

import peft_ref.check.mistakes.adalora as adalora
import peft_ref.check.mistakes.dora as dora
import peft_ref.check.mistakes.ia3 as ia3
import peft_ref.check.mistakes.loha as loha
import peft_ref.check.mistakes.lora as lora
from peft_ref.check.mistake import Suite

SUITES: dict[str, Suite] = {
    "adalora": adalora.SUITE,
    "dora": dora.SUITE,
    "ia3": ia3.SUITE,
    "loha": loha.SUITE,
    "lora": lora.SUITE,
}
