"""Every method, one file each, and the table of them."""

from __future__ import annotations

from typing import Any

from peft_ref.contracts import Method
from peft_ref.methods.adalora import AdaLoRA
from peft_ref.methods.dora import DoRA
from peft_ref.methods.ia3 import IA3
from peft_ref.methods.loha import LoHa
from peft_ref.methods.lora import LoRA

METHODS: dict[str, type[Method[Any]]] = {
    "adalora": AdaLoRA,
    "dora": DoRA,
    "ia3": IA3,
    "loha": LoHa,
    "lora": LoRA,
}

__all__ = ["IA3", "METHODS", "AdaLoRA", "DoRA", "LoHa", "LoRA"]
