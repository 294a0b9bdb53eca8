"""LoftQ: a frozen weight in four bits, and a LoRA that starts as the best correction of what that loses.

    R_0 = W;    Q_t = nf4(R_(t-1)),   B_t A_t = the best rank-r part of W - Q_t,   R_t = W - B_t A_t          t = 1 ... loftq_iter
    A = sqrt(S) V^T,  B = U sqrt(S)  of the last W - Q_t;  the frozen weight becomes Q_t

    nf4(W)   blocks of 64 numbers in stored order, each over its largest absolute value m;  x / m goes to the nearest of 16 LEVELS, times m.
             A level is a quantile of the normal distribution over the largest one, eight of them for x <= 0 and nine for x >= 0

Paper   Li et al. 2023, arXiv:2310.08659; the levels: Dettmers et al. 2023, arXiv:2305.14314
HF      LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}), by bitsandbytes on a GPU, in float32.
        replace_lora_weights_loftq is `correct`, for a weight that is quantised already. Followed: the scale is not divided out, so that
        Q + s B A is near W for s = 1 alone. Refused: 8 bits; a convolution and an embedding, where HF breaks
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from peft_ref.arrays import Array, column, namespace, pad, thin_svd, to
from peft_ref.contracts import Start
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.methods.lora import Params
from peft_ref.methods.lora_init import Factored
from peft_ref.ranges import positive

BLOCK = 64
# fmt: off
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495,
    0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)
# fmt: on


@final
@dataclass(frozen=True, kw_only=True)
class LoftQ:
    """The keys of loftq_config."""

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits != 4:
            raise ConfigError(f"loftq_bits={self.loftq_bits}: only 4 bits are built here; HF PEFT has 8 too, bitsandbytes' rows of int8.")
        positive(self, "loftq_iter")


def loftq_of(keys: Mapping[str, Any] | None) -> LoftQ:
    """What a configuration's loftq_config says."""
    try:
        return LoftQ(**(keys or {}))
    except TypeError as error:
        raise ConfigError(f"loftq_config={dict(keys or {})}: {error}.\n  It has loftq_bits and loftq_iter.") from None


def loftq(method: Factored, layer: Layer, W: Array, config: LoftQ) -> Start[Params]:
    """The corrections of W (out, in) in four bits, and W in four bits."""
    rest, Q, params = W, W, None
    for _ in range(config.loftq_iter):
        Q = layer.fold(nf4(layer.unfold(rest)))
        params = correct(method, layer, W, Q)
        rest = W - params.B @ params.A
    if params is None:
        raise ConfigError("loftq_iter=0: at least one is needed.")
    return Start(params, Q)


def correct(method: Factored, layer: Layer, W: Array, Q: Array) -> Params:
    """A and B of the best rank-r part of W - Q, both (out, in)."""
    if not isinstance(layer, Linear):
        raise UnsupportedLayerError(f"init_lora_weights='loftq' on a {layer.kind} layer: HF PEFT breaks there.\n  Use a linear layer.")
    if method.r > min(layer.shape):
        raise UnsupportedLayerError(f"init_lora_weights='loftq' with r={method.r}: a weight {layer.shape} has {min(layer.shape)} ranks.")
    U, S, Vh = thin_svd(W - Q)
    root = S[: method.r] ** 0.5
    return Params(column(root) * Vh[: method.r, :], U[:, : method.r] * root)


def nf4(W: Array) -> Array:
    """W, whose numbers are read row by row, rounded to four bits."""
    xp, n = namespace(W), math.prod(W.shape)
    flat = xp.reshape(W, (n,))
    blocks = xp.reshape(pad(flat, 0, 0, -n % BLOCK), (-1, BLOCK))
    largest = xp.max(xp.abs(blocks), axis=1, keepdims=True)
    levels = to(np.asarray(LEVELS), W)
    unit = blocks / xp.where(largest == 0, xp.ones_like(largest), largest)
    nearest = xp.zeros_like(blocks) + levels[0]
    for k in range(1, len(LEVELS)):
        nearest = xp.where(unit > (levels[k - 1] + levels[k]) / 2, levels[k], nearest)
    return xp.reshape(xp.reshape(nearest * largest, (-1,))[:n], tuple(W.shape))
