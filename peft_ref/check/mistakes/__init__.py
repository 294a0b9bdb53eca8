"""Every method's suite: what is asked about it, and its known mistakes. One module per method."""

from __future__ import annotations

from peft_ref.check.mistake import Suite
from peft_ref.check.mistakes import dora, ia3, loha, lora

SUITES: dict[str, Suite] = {
    "dora": dora.SUITE,
    "ia3": ia3.SUITE,
    "loha": loha.SUITE,
    "lora": lora.SUITE,
}
