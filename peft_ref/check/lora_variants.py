"""What is asked of LoRA's variants alike, and the mistakes of its family that show on every one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_ref.check import lora_family as lora
from peft_ref.check.mistake import Mistake
from peft_ref.check.variants import RUN, Draw, Variant

DROPPED = ("dropout-missing", "dropout-not-rescaled", "dropout-divided-by-p", "dropout-on-base-too")


def variants(
    clause: str,
    config: Mapping[str, Any],
    layers: tuple[str, ...],
    *,
    rank: int = 4,
    draws: Mapping[str, Draw] | None = None,
    prefix: str = "",
    rounded: Mapping[str, Any] | None = None,
) -> tuple[Variant, ...]:
    """On the first of `layers` everything, on the others the plain question."""
    first, own = layers[0], dict(draws or {})
    plain, second = {**config, "r": rank, "lora_alpha": 6}, {**config, "r": 2, "lora_alpha": 8}

    def one(name: str, *configs: Mapping[str, Any], on: tuple[str, ...] = (first,), **more: Any) -> Variant:
        return Variant(name=prefix + name, clause=clause, configs=configs, layers=on, draws=own, **more)

    dropped = () if first.startswith("embedding") else (one("dropout", {**plain, "lora_dropout": 0.75}, dropout=0.75),)
    inexact = (
        ()
        if rounded is None
        else (one("rounded", {**config, "r": 9, "lora_alpha": 5, **rounded}, on=("linear-large",), numbers="rounded"),)
    )
    return (
        *inexact,
        one("plain", plain, on=layers),
        one("small", plain, numbers="small"),
        one("no-bias", plain, bias=False),
        one("vector", plain, operations=RUN, rows=()),
        one("rslora", {**plain, "use_rslora": True}),
        *dropped,
        one("two-adapters", plain, second),
    )


# Where B is not trained, what is missing from both gradients is missing from A's.
OF_ONE_FACTOR = ("grad-A-scale-missing", "grad-B-scale-missing")
FAMILY: tuple[Mistake, ...] = (
    *lora.SCALING,
    *lora.LAYOUT,
    *lora.GRADIENTS,
    *(m for m in lora.DROPOUT if m.name in DROPPED),
    *lora.MERGING,
)
