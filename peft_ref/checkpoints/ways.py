"""How PEFT rounds when it merges: the one place where that is written down, method by method. spec/merging.md shows it as a table.

16-bit weights are added to in float32. Before that a delta may be rounded to the weight's dtype: in the default merge, in the safe one, in
both; on embeddings LoRA does so always. With 'kept' it is always, since PEFT then holds the adapter itself in the weight's dtype
(autocast_adapter_dtype=False); it still multiplies LoRA's factors in float32, and those of no other method.

A few methods take several steps in the weight's dtype and round after each: `OWN`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from peft_ref.arrays import column
from peft_ref.checkpoints.exact import product
from peft_ref.checkpoints.plan import NDArray, Rounding
from peft_ref.contracts import Additive, Delta, WeightMethod
from peft_ref.errors import ConfigError
from peft_ref.layers import Layer
from peft_ref.methods.glora import value
from peft_ref.methods.loha import LoHa


class Way(NamedTuple):
    default: bool  # whether the default merge rounds the delta before it adds it
    safe: bool  # and the safe one


ONCE, BOTH = Way(default=False, safe=False), Way(default=True, safe=True)
WAYS: Mapping[str, Way] = MappingProxyType(
    {
        **dict.fromkeys(("LoRA", "MonteCLoRA", "VeLoRA"), Way(default=False, safe=True)),
        **dict.fromkeys(("AdaMSS", "BDLoRA", "DEFT", "DeLoRA", "KaSA", "MiCA", "PEANuT", "SuperTuning"), BOTH),
        "RandLoRA": Way(default=True, safe=False),
    }
)  # all others round once
KEPT = "LoRA"
# Which of a layer's parameters a method changes, where it is not the weight alone. IA3 does so where it scales the output.
WITH_BIAS = frozenset({"AdaMSS", "GLoRA", "IA3", "RoAd"})
BIAS_ALONE = frozenset({"BEFT"})


def rounded_first(method: WeightMethod[Any], layer: Layer, rounding: Rounding) -> bool:
    """Whether a delta is rounded to the weight's dtype before it is added."""
    name = type(method).__name__
    if rounding == "kept":
        if name != KEPT:
            raise ConfigError(
                f"rounding='kept' with {name}: there PEFT computes all of the delta in the adapter's 16 bits, which is not followed here.\n"
                "  Use 'default' or 'safe'."
            )
        return True
    way = WAYS.get(name, ONCE)
    return (way.safe if rounding == "safe" else way.default) or (name == "LoRA" and layer.kind == "embedding")


class State(NamedTuple):
    """A layer's weight and bias as they are, and as they were under all adapters; in the dtype that is computed in."""

    W: NDArray
    b: NDArray | None
    W0: NDArray
    b0: NDArray | None


Rounded: TypeAlias = Callable[[NDArray], NDArray]  # to the stored dtype, and back to the one that is computed in
Own: TypeAlias = Callable[[Any, Layer, Any, State, Rounded], tuple[NDArray, NDArray | None]]


def _hira(method: Any, layer: Layer, p: Any, at: State, r: Rounded) -> tuple[NDArray, NDArray | None]:
    return at.W + r(at.W0 * r(p.B @ p.A)), at.b


def _c3a(method: Any, layer: Layer, p: Any, at: State, r: Rounded) -> tuple[NDArray, NDArray | None]:
    n_in = layer.shape[1]
    return at.W + r(r(method.delta(layer, p).W * n_in) / n_in), at.b


def _road(method: Any, layer: Layer, p: Any, at: State, r: Rounded) -> tuple[NDArray, NDArray | None]:
    c, s = (r(factor) for factor in method.factors(p))
    b = None if at.b is None else c * at.b + s * method.paired(at.b)
    return column(c) * at.W + column(s) * method.paired(at.W), b


def _glora(method: Any, layer: Layer, p: Any, at: State, r: Rounded) -> tuple[NDArray, NDArray | None]:
    A, B, C = (r(value(*three)) for three in ((p.Ad, p.Au, p.A), (p.Bd, p.Bu, p.B), (p.Cd, p.Cu, p.C)))
    W = at.W + r(r(at.W0 * A) + B)
    if at.b is None or at.b0 is None:
        return W, None
    return W, at.b + r(r(r(at.b0 * r(p.D)) + r(p.E)) + r(at.W0 @ C)[:, 0])


def _supertuning(method: Any, layer: Layer, p: Any, at: State, r: Rounded) -> tuple[NDArray, NDArray | None]:
    sparse = replace(method, r=None, lora_alpha=None).delta(layer, p._replace(A=None, B=None)).W
    W = at.W + r(sparse)
    return W if method.r is None else r(W) + r(method.low_rank_scale * (p.B @ p.A)), at.b


OWN: Mapping[str, Own] = MappingProxyType({"C3A": _c3a, "GLoRA": _glora, "HiRA": _hira, "RoAd": _road, "SuperTuning": _supertuning})


def exact_delta(method: WeightMethod[Any], layer: Layer, p: Any) -> Delta:
    """The delta of an additive method with the bits that torch gives it, where its matrices are multiplied in an order that is known."""
    if isinstance(method, LoHa):
        return Delta(np.float32(method.scale) * (product(p.w1_a, p.w1_b) * product(p.w2_a, p.w2_b)))
    assert isinstance(method, Additive)
    delta: Delta = method.delta(layer, p)
    return delta


# Inits that take a part off the frozen weight, and need nothing but the weight: PEFT runs them again when it loads an adapter. lora_ga it
# does not: its adapters belong to a base that was saved after the init.
CUTTING = ("pissa", "olora", "loftq")


def cuts(method: WeightMethod[Any]) -> bool:
    """Whether loading the adapter changes the frozen weight."""
    return method.cuts_weight or init_of(method).startswith(CUTTING)


def init_of(method: WeightMethod[Any]) -> str:
    """Its name, where it has one."""
    init = getattr(method, "init_lora_weights", None)
    return init.lower() if isinstance(init, str) else ""


def needs_bias(method: WeightMethod[Any]) -> bool:
    """Whether it has something to add to a bias that a layer has to have."""
    return type(method).__name__ in BIAS_ALONE or bool(getattr(method, "lora_bias", False))


def touches(method: WeightMethod[Any], part: str) -> bool:
    """Whether the method changes a layer's "weight", or its "bias" where it has one."""
    name = type(method).__name__
    if part == "weight":
        return name not in BIAS_ALONE
    if name == "IA3":
        return not getattr(method, "is_feedforward", False)
    return name in WITH_BIAS or needs_bias(method) or method.swaps
