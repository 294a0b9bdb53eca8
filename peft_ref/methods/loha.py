"""LoHa: add the element-wise product of two low-rank matrices.

    W' = W + s (W1a W1b) * (W2a W2b)      s = alpha / r

    W1a, W2a (out, r)    W1b, W2b (r, in)

For a gradient G of W', with H1 = s G * (W2a W2b) and H2 = s G * (W1a W1b):
    dW1a = H1 W1b^T    dW1b = W1a^T H1    dW2a = H2 W2b^T    dW2b = W2a^T H2.
A fresh W2b is zero, so a fresh adapter changes nothing.  The rank of the delta is up to r^2.

Paper   FedPara: Hyeon-Woo et al. 2021, arXiv:2108.06098; the name and the form are LyCORIS's
HF      peft.LoHaConfig, on linear layers and 1-d and 2-d convolutions. The start differs from LyCORIS on purpose: all four
        uniform within 1/sqrt(columns), but for W2b. With use_effective_conv2d it is LoHaEffective.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, namespace, to, zeros_like
from peft_ref.contracts import Additive, Delta, Key, Start
from peft_ref.layers import Layer
from peft_ref.ranges import positive

KINDS = frozenset({"linear", "conv1d", "conv2d"})


class Params(NamedTuple):
    w1_a: Annotated[Array, "out r", Key("hada_w1_a", kinds=KINDS)]
    w1_b: Annotated[Array, "r in", Key("hada_w1_b", kinds=KINDS)]
    w2_a: Annotated[Array, "out r", Key("hada_w2_a", kinds=KINDS)]
    w2_b: Annotated[Array, "r in", Key("hada_w2_b", kinds=KINDS)]


@final
@dataclass(frozen=True, kw_only=True)
class LoHa(Additive[Params]):
    r: int = 8
    alpha: float = 8
    init_weights: bool = True

    peft_type: ClassVar[str] = "LOHA"
    tuner_prefix: ClassVar[str] = "hada_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    by_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive(self, "r")

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r}

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        def uniform(rows: int, columns: int) -> Array:
            bound = 1 / math.sqrt(columns)
            return to(rng.uniform(-bound, bound, (rows, columns)), W)

        out, n_in = layer.shape
        w1_a, w1_b, w2_a = uniform(out, self.r), uniform(self.r, n_in), uniform(out, self.r)
        w2_b = zeros_like((self.r, n_in), W) if self.init_weights else uniform(self.r, n_in)
        return Start(Params(w1_a, w1_b, w2_a, w2_b), W)

    def delta(self, layer: Layer, p: Params) -> Delta:
        return Delta(self.scale * ((p.w1_a @ p.w1_b) * (p.w2_a @ p.w2_b)))

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        mT = namespace(d.W).matrix_transpose
        h1 = self.scale * (d.W * (p.w2_a @ p.w2_b))
        h2 = self.scale * (d.W * (p.w1_a @ p.w1_b))
        return Params(h1 @ mT(p.w1_b), mT(p.w1_a) @ h1, h2 @ mT(p.w2_b), mT(p.w2_a) @ h2)
