"""BEFT: add a learned vector to the layer's output, and so to its bias.

    W' = W      b' = b + c          c (out,)

For a gradient g of b':   dc = g, the sum of dy over all rows.   c starts at zero, so a fresh adapter changes nothing.
A layer without a bias acts as one whose bias is zero, but has no place to merge c into.

Paper   arXiv:2509.15974, which trains the bias of the value projection alone
HF      peft.BeftConfig, on linear layers. `beft_bias` is stored as one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, to, zeros_like
from peft_ref.contracts import Additive, Delta, Key, Start
from peft_ref.layers import Layer

KINDS = frozenset({"linear"})


class Params(NamedTuple):
    c: Annotated[Array, "out", Key("beft_bias", "1 out", kinds=KINDS)]


@final
@dataclass(frozen=True, kw_only=True)
class BEFT(Additive[Params]):
    init_weights: bool = True

    peft_type: ClassVar[str] = "BEFT"
    tuner_prefix: ClassVar[str] = "beft_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    adds_bias: ClassVar[bool] = True

    def dims(self, layer: Layer) -> dict[str, int]:
        return {}

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        out = layer.shape[0]
        return Start(Params(zeros_like((out,), W) if self.init_weights else to(rng.normal(size=out), W)), W)

    def delta(self, layer: Layer, p: Params) -> Delta:
        return Delta(zeros_like(layer.shape, p.c), p.c)

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        return Params(d.b)
