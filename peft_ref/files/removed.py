"""Adapters of a method that PEFT once had: BONE, which is MiSS under another name.

    peft_type   BONE -> MISS      key   <module>.bone_block -> <module>.miss_block

Block, formula and words of the configuration are the same, so that is the whole conversion: MiSS, or with init_weights="bat" MiSSBat.
What was read as BONE is written as MISS, which a PEFT of today reads.

HF      0.21.2 does not know the type and raises KeyError('BONE'). PEFT's repository has a script that renames like this, scripts/
        convert-bone-to-miss.py. It lets init_weights="mini" through, which BONE took for true and MISS for another method: refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_ref.errors import ConfigError

BONE, KEY = "BONE", ".bone_block"


def is_removed(data: Any) -> bool:
    return isinstance(data, Mapping) and data.get("peft_type") == BONE


def as_of_today(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The configuration of the method that took its place."""
    if data.get("init_weights") == "mini":
        raise ConfigError(
            f"{where}: init_weights='mini' of BONE, which had no such method and took the text for true.\n  Write true, or 'bat'."
        )
    return {**data, "peft_type": "MISS"}


def name_of_today(name: str) -> str:
    """A parameter's name after its module as MISS has it."""
    return name.removesuffix(KEY) + ".miss_block" if name.endswith(KEY) else name
