"""How PEFT rounds when it merges: the one place where that is written down, method by method. spec/merging.md shows it as a table.

A delta is added to a weight of 16 bits in float32. Before that it is rounded to the weight's dtype, or not:

    rounding    float32 adapters on a 16-bit weight
    default     not rounded but where PEFT's layer casts it anyway: on embeddings, bare parameters, and in the methods of FIRST
    safe        rounded, but in the methods of NEVER
    kept        rounded: PEFT holds the adapter itself in the weight's dtype (autocast_adapter_dtype=False). LoRA alone computes in float32
                then all the same
"""

from __future__ import annotations

from typing import Any

from peft_ref.checkpoints.plan import Rounding
from peft_ref.contracts import WeightMethod
from peft_ref.errors import ConfigError
from peft_ref.layers import Layer

NEVER = frozenset({"AdaLoRA", "BDLoRA"})  # their safe merge adds what it has
FIRST = frozenset[str]()  # these round in every merge
KEPT = frozenset({"LoRA"})  # merged in float32 where the adapter has 16 bits


def rounded_first(method: WeightMethod[Any], layer: Layer, rounding: Rounding, weight: str) -> str | None:
    """The dtype that a delta is rounded to before it is added to a weight of dtype `weight`; None where it is not."""
    name = type(method).__name__
    if rounding == "kept":
        if name not in KEPT:
            raise ConfigError(
                f"rounding='kept' with {name}: there PEFT computes all of the delta in the adapter's 16 bits, which is not followed here.\n"
                "  Use 'default' or 'safe'."
            )
        return weight
    if layer.kind == "embedding" or name in FIRST:
        return weight
    return weight if rounding == "safe" and name not in NEVER else None
