"""LoRA-GA: start along the gradient of the full weight.

    G = U S V^T, the gradient of W (out, in)         A = rows of V^T,   B = columns of U times their S,   W loses s B A

    direction   ArB2r  A: 1 ... r,     B: r+1 ... 2r            scale   stable       B times out^(1/4) / sqrt(gamma)
                A2rBr  A: r+1 ... 2r,  B: 1 ... r                       weight_svd   B times (the norm of W) / (the first S in B)
                ArBr   A: 2, 4 ... 2r, B: 1, 3 ... 2r-1                 gd_scale     A and B over s
                random both: r of 1 ... 2r, drawn                       unit         as they are

Paper   Wang et al. 2024, arXiv:2407.05000
HF      LoraConfig(init_lora_weights="lora_ga", lora_ga_config=...) after preprocess_loraga, which averages the gradient over calls; a
        randomised SVD of 4 r vectors; without a gradient the default start. Followed: of a Conv1D `out` is the weight's first size, which
        is what goes in. A row of A and a column of B have signs of their own, so `spectrum` is apart: another SVD is another start
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, integers, namespace, thin_svd
from peft_ref.contracts import Start
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.methods.lora import Params
from peft_ref.methods.lora_init import Factored
from peft_ref.ranges import one_of, positive

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@final
@dataclass(frozen=True, kw_only=True)
class LoraGA:
    """The keys of lora_ga_config."""

    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: float = 16

    def __post_init__(self) -> None:
        one_of(self, "direction", *DIRECTIONS)
        one_of(self, "scale", *SCALES)
        positive(self, "stable_gamma")


class Spectrum(NamedTuple):
    """G = U S V^T, or its first parts."""

    U: Array  # (out, k)
    S: Array  # (k,)
    Vh: Array  # (k, in)


def spectrum(G: Array) -> Spectrum:
    """The singular value decomposition of a gradient G (out, in)."""
    return Spectrum(*thin_svd(G))


def lora_ga(
    method: Factored, layer: Layer, W: Array, gradient: Spectrum, config: LoraGA, rng: np.random.Generator | None = None
) -> Start[Params]:
    """A and B along the gradient, and W (out, in) without them. `rng` is for the direction "random" alone."""
    if not isinstance(layer, Linear):
        raise UnsupportedLayerError(f"init_lora_weights='lora_ga' on a {layer.kind} layer: HF PEFT has no gradient there.")
    xp, r, (U, S, Vh) = namespace(W), method.r, gradient
    if S.shape[0] < 2 * r:
        raise UnsupportedLayerError(f"init_lora_weights='lora_ga' with r={r} takes {2 * r} directions of a gradient that has {S.shape[0]}.")
    a, b = (integers(np.asarray(places), U) for places in _chosen(r, config.direction, rng))
    A = xp.take(Vh, a, axis=0)
    S_b = xp.take(S, b)
    B = xp.take(U, b, axis=1) * S_b
    if config.scale == "stable":
        B = B * (layer.weight_shape[0] ** 0.25 / config.stable_gamma**0.5)
    elif config.scale == "weight_svd" and float(S_b[0]) > 0:
        B = B * (thin_svd(W)[1][0] / S_b[0])
    elif config.scale == "gd_scale":
        A, B = A / method.scale, B / method.scale
    return Start(Params(A, B), W - method.scale * (B @ A))


def _chosen(r: int, direction: str, rng: np.random.Generator | None) -> tuple[list[int], list[int]]:
    """Which of the first 2 r directions A takes, and which B."""
    if direction == "random":
        if rng is None:
            raise ConfigError("direction='random' draws r of 2 r directions: give `rng`.")
        drawn = [int(k) for k in rng.permutation(2 * r)[:r]]
        return drawn, drawn
    first, second = list(range(r)), list(range(r, 2 * r))
    if direction == "ArBr":
        return list(range(1, 2 * r, 2)), list(range(0, 2 * r, 2))
    return (first, second) if direction == "ArB2r" else (second, first)
