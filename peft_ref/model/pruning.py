"""Tensors thinned out and brought to one: what HF's merge_utils do, each as a function of all it uses.

    kept by magnitude    the k = floor(density * n) entries largest in size; of equals the first
    kept at random       those where a mask is 1, divided by the density: DARE
    majority sign        at every entry the sign of the sum ("total") or of the sum of signs ("frequency"); of zero it is +1
    disjoint mean        at every entry the sum of the weighted tensors whose sign is the majority's, over their number, at least 1

    TIES          by magnitude, majority sign of what is left, disjoint mean of w_i times it
    DARE          at random, then the weighted sum, or as TIES

The number a TIES mean divides by ignores the weights, and its signs are those before the weights: with a negative one they are not what
is added. So it is in HF; a density of 1 or more keeps everything.

Paper   TIES: Yadav et al. 2023, arXiv:2306.01708;  DARE: Yu et al. 2023, arXiv:2311.03099
HF      peft.utils.merge_utils. torch's topk takes any of equal entries; torch draws the mask itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

from peft_ref.arrays import Array, namespace
from peft_ref.errors import ConfigError, ShapeError

Majority: TypeAlias = Literal["total", "frequency"]


def keep_largest(x: Array, density: float) -> Array:
    """`x` with only its floor(density * n) entries largest in size."""
    if _check_density(density) >= 1:
        return x
    xp = namespace(x)
    order = xp.argsort(-xp.abs(xp.reshape(x, (-1,))), stable=True)
    place = xp.argsort(order, stable=True)  # of an entry among all, the largest first
    keep = xp.reshape(place < int(density * math.prod(x.shape)), x.shape)
    return xp.where(keep, x, xp.zeros_like(x))


def keep_drawn(x: Array, density: float, mask: Array) -> Array:
    """`x` where `mask` is 1, divided by the density, so that the mean over all masks is `x`."""
    if _check_density(density) >= 1:
        return x
    if density == 0:
        raise ConfigError("density=0 keeps nothing that could be rescaled: HF PEFT computes 0 / 0 there.\n  Use a positive density.")
    if tuple(mask.shape) != tuple(x.shape):
        raise ShapeError(f"a mask is {tuple(mask.shape)}, expected {tuple(x.shape)}, the shape of the tensor it thins out.")
    return x * namespace(x).astype(mask, x.dtype) / density


def majority_sign(tensors: Sequence[Array], method: Majority = "total") -> Array:
    """At every entry +1 or -1."""
    if method not in ("total", "frequency"):
        raise ConfigError(f"majority_sign_method={method!r}: there are 'total' and 'frequency' (HF PEFT refuses it too).")
    xp = namespace(*tensors)
    total = weighted_sum(tensors if method == "total" else [xp.sign(t) for t in tensors], [1.0] * len(tensors))
    one = xp.ones_like(total)
    return xp.where(total >= 0, one, -one)


def disjoint_mean(tensors: Sequence[Array], weights: Sequence[float], sign: Array) -> Array:
    """The mean of the weighted tensors over those whose own sign is `sign`."""
    xp = namespace(sign)
    agree = [xp.astype(xp.sign(t) == sign, t.dtype) for t in tensors]
    count = weighted_sum(agree, [1.0] * len(agree))
    total = weighted_sum([t * a for t, a in zip(tensors, agree, strict=True)], weights)
    return total / xp.where(count < 1, xp.ones_like(count), count)


def weighted_sum(tensors: Sequence[Array], weights: Sequence[float]) -> Array:
    """sum_i w_i T_i: task arithmetic."""
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) != 1:
        raise ShapeError(f"tensors of shapes {', '.join(map(str, sorted(shapes))) or 'none'} cannot be added.")
    total = weights[0] * tensors[0]
    for w, t in zip(weights[1:], tensors[1:], strict=True):
        total = total + w * t
    return total


def magnitude_prune(tensors: Sequence[Array], weights: Sequence[float], density: float) -> Array:
    return weighted_sum([keep_largest(t, density) for t in tensors], weights)


def ties(tensors: Sequence[Array], weights: Sequence[float], density: float, method: Majority = "total") -> Array:
    kept = [keep_largest(t, density) for t in tensors]
    return disjoint_mean(kept, weights, majority_sign(kept, method))


def dare_linear(tensors: Sequence[Array], weights: Sequence[float], density: float, masks: Sequence[Array]) -> Array:
    return weighted_sum([keep_drawn(t, density, m) for t, m in zip(tensors, masks, strict=True)], weights)


def dare_ties(
    tensors: Sequence[Array], weights: Sequence[float], density: float, masks: Sequence[Array], method: Majority = "total"
) -> Array:
    kept = [keep_drawn(t, density, m) for t, m in zip(tensors, masks, strict=True)]
    return disjoint_mean(kept, weights, majority_sign(kept, method))


def quantile(x: Array, q: float) -> Array:
    """The q-quantile of all entries, between two of them in proportion."""
    if not 0 <= q <= 1:
        raise ConfigError(f"a quantile of {q} is none (HF PEFT refuses it too): from 0 to 1.")
    xp = namespace(x)
    ordered = xp.sort(xp.reshape(x, (-1,)))
    at = q * (math.prod(x.shape) - 1)
    low = math.floor(at)
    high = min(low + 1, math.prod(x.shape) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def _check_density(density: float | None) -> float:
    if density is None or not density >= 0:
        raise ConfigError(f"density={density}: the part of the entries that is kept, from 0 to 1 (HF PEFT refuses it too).")
    return density
