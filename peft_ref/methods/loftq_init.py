"""LoftQ: a frozen weight in four or eight bits, and a LoRA that starts as the best correction of what that loses.

    R_0 = W;    Q_t = q(R_(t-1)),   B_t A_t = the best rank-r part of W - Q_t,   R_t = W - B_t A_t          t = 1 ... loftq_iter
    A = sqrt(S) V^T,  B = U sqrt(S)  of the last W - Q_t;  the frozen weight becomes Q_t

    nf4(W)   blocks of 64 numbers in stored order, each over its largest absolute value m;  x / m goes to the nearest of 16 LEVELS, times m.
             A level is a quantile of the normal distribution over the largest one, eight of them for x <= 0 and nine for x >= 0
    int8(W)  in half precision, each row of the stored matrix over its largest magnitude m;  127 x / m goes to the nearest integer k,
             which stands for k m / 127

Paper   Li et al. 2023, arXiv:2310.08659; the levels: Dettmers et al. 2023, arXiv:2305.14314; int8: Dettmers et al. 2022, arXiv:2208.07339
HF      LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}), by bitsandbytes, in float32; needs a GPU.
        replace_lora_weights_loftq is `correct`, for a weight that is quantised already. Followed: the scale is not divided out, so that
        Q + s B A is near W for s = 1 alone; 127 / m is rounded before it meets x, so that m / 2 becomes 63 or 64 by m.
        Refused: a convolution and an embedding, where HF breaks; in eight bits a number beyond half precision, where HF's are NaN
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
BINADES = range(-13, 16)  # the powers of two at which half precision gets coarser
BEYOND_HALF = 65520.0  # what is rounded to 65536, the first number that is none there


@final
@dataclass(frozen=True, kw_only=True)
class LoftQ:
    """The keys of loftq_config."""

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits not in (4, 8):
            raise ConfigError(f"loftq_bits={self.loftq_bits!r:.60}: there are 4, which is nf4, and 8, rows of int8.")
        positive(self, "loftq_iter")


def loftq_of(keys: Mapping[str, Any] | None) -> LoftQ:
    """What a configuration's loftq_config says."""
    try:
        return LoftQ(**(keys or {}))
    except TypeError as error:
        raise ConfigError(f"loftq_config={dict(keys or {})}: {error}.\n  It has loftq_bits and loftq_iter.") from None


def loftq(method: Factored, layer: Layer, W: Array, config: LoftQ) -> Start[Params]:
    """The corrections of W (out, in) in few bits, and W in few bits."""
    rest, Q, params = W, W, None
    quantised = nf4 if config.loftq_bits == 4 else int8
    for _ in range(config.loftq_iter):
        Q = layer.fold(quantised(layer.unfold(rest)))
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


def int8(W: Array) -> Array:
    """W, each row rounded to the 255 multiples of its largest magnitude / 127."""
    xp = namespace(W)
    if not bool(xp.all(xp.abs(W) < BEYOND_HALF)):
        raise ConfigError(
            "loftq_bits=8 of a weight with numbers of 65520 and more, or none at all: half precision cannot hold them. Use 4 bits."
        )
    x = half(xp.astype(W, xp.float32))
    largest = xp.max(xp.abs(x), axis=1, keepdims=True)
    nearest = xp.round(x * (1 / xp.where(largest == 0, xp.ones_like(largest), largest) * 127))  # in this order: it decides where m / 2 goes
    return xp.astype(nearest * largest, W.dtype) / 127


def half(x: Array) -> Array:
    """Numbers as half precision holds them, in x's own dtype: eleven bits of each, and nothing finer than 2^-24."""
    xp = namespace(x)
    step = xp.zeros_like(x) + 2.0**-24
    for k in BINADES:
        step = xp.where(xp.abs(x) >= 2.0**k, 2 * step, step)
    return xp.round(x / step) * step
