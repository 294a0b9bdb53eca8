"""A low-rank method's delta as the product that PEFT forms, and the numbers that it multiplies and divides it by afterwards.

LoRA and its kin    (B A) * s            s = alpha / r rounded to the dtype it is computed in, once for every number of the product
AdaLoRA             (B (E A)) * alpha / (r + 1e-5)
the others          as `factors` says, the scale in a factor
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np

from peft_ref.checkpoints.lowrank import Product
from peft_ref.contracts import LowRank
from peft_ref.methods.adalora import EPSILON, AdaLoRA


def product_of(method: LowRank[Any], params: Any, weight: float) -> Product:
    """`weight` times the delta."""
    plain, times, over = _unscaled(method)
    B, A, _ = plain.factors(params)
    if plain is method and weight != 1:
        return Product(B * B.dtype.type(weight), A)
    return Product(B, A, tuple(t * weight for t in times), over)


def bias_of(method: LowRank[Any], params: Any, weight: float) -> Any:
    """What is added to the bias, multiplied as PEFT does it."""
    plain, times, _ = _unscaled(method)
    b: Any = plain.factors(params).b
    for factor in times:
        b = b * b.dtype.type(factor * weight)
    return b


def _unscaled(method: LowRank[Any]) -> tuple[LowRank[Any], tuple[float, ...], tuple[float, ...]]:
    """The method with a scale of one, and its scale."""
    if isinstance(method, AdaLoRA):
        divisor = np.float32(method.init_r) + np.float32(EPSILON)
        alpha = method.lora_alpha if method.lora_alpha > 0 else method.init_r
        return replace(method, lora_alpha=method.init_r + EPSILON), (float(alpha),), (float(divisor),)
    known: dict[str, Any] = {f.name: getattr(method, f.name) for f in fields(method)}  # type: ignore[arg-type]  # each is a dataclass
    if {"r", "lora_alpha"} <= known.keys() and hasattr(type(method), "scale"):
        plain: Any = replace(method, lora_alpha=known["r"], **({"use_rslora": False} if "use_rslora" in known else {}))  # type: ignore[type-var]
        scale: float = method.scale  # type: ignore[attr-defined]
        if plain.scale == 1.0:
            return plain, (scale,), ()
    return method, (), ()
