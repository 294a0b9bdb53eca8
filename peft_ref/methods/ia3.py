"""IA3: rescale what a layer puts out or, in a feed-forward block, what it takes in.

    W' = l W,  b' = l b        row i of W and entry i of b times l_i         l (out,)
    W' = W l,  b' = b          feed-forward: column j of W times l_j         l (in,)

For a gradient G of W' and g of b':   dl_i = sum_j (G W)_ij + g_i b_i,   feed-forward  dl_j = sum_i (G W)_ij.
l starts at one, so a fresh adapter changes nothing.

Paper   Liu et al. 2022, arXiv:2205.05638
HF      peft.IA3Config; `is_feedforward` is set where `feedforward_modules` match. On a convolution a feed-forward l has one entry per
        channel. HF's unmerge divides by l + 1e-8, this one by l.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, column, namespace, to
from peft_ref.contracts import Key, Reweight, Scaled, Start, Turned, WeightGradients, conv_key
from peft_ref.layers import Layer


class Params(NamedTuple):
    l: Annotated[Array, "n", Key("ia3_l", "rows columns"), conv_key("ia3_l", "1 n *1")]


@final
@dataclass(frozen=True, kw_only=True)
class IA3(Reweight[Params]):
    is_feedforward: bool = False
    init_ia3_weights: bool = True

    peft_type: ClassVar[str] = "IA3"
    tuner_prefix: ClassVar[str] = "ia3_"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed_linear", "conv2d", "conv3d"})
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def dims(self, layer: Layer) -> dict[str, int]:
        n = layer.channels if self.is_feedforward else layer.shape[0]
        return {"n": n, "rows": 1 if self.is_feedforward else n, "columns": n if self.is_feedforward else 1}

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        n = self.dims(layer)["n"]
        start = np.ones(n) if self.init_ia3_weights else rng.normal(size=n)
        return Start(Params(to(start, W)), W)

    def weight(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        if self.is_feedforward:
            return W * self._columns(layer, p.l), b
        return column(p.l) * W, None if b is None else p.l * b

    def weight_vjp(
        self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array, dW: Array, db: Array | None
    ) -> WeightGradients[Params]:
        xp = namespace(dW)
        if self.is_feedforward:
            return WeightGradients(Params(self._columns_vjp(layer, dW * W)), dW * self._columns(layer, p.l), db)
        dl = xp.sum(dW * W, axis=1)
        if b is not None and db is not None:
            dl = dl + db * b
        return WeightGradients(Params(dl), column(p.l) * dW, None if db is None else p.l * db)

    def product(self, layer: Layer, p: Params) -> Scaled | Turned:
        return Turned(column(column(p.l))) if self.is_feedforward else Scaled(p.l, bias=True)

    def product_vjp(self, layer: Layer, p: Params, d: Scaled | Turned) -> Params:
        return Params(d.rows if isinstance(d, Scaled) else d.blocks[:, 0, 0])

    def unmerge(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        if self.is_feedforward:
            return W / self._columns(layer, p.l), b
        return W / column(p.l), None if b is None else b / p.l

    def _columns(self, layer: Layer, l: Array) -> Array:
        """l, one entry per input channel, as the factor of every entry of W (out, in)."""
        xp, (out, n_in), g = namespace(l), layer.shape, layer.groups
        grid = (g, out // g, layer.channels // g, math.prod(layer.kernel_size))
        return xp.reshape(xp.broadcast_to(xp.reshape(l, (g, 1, -1, 1)), grid), (out, n_in))

    def _columns_vjp(self, layer: Layer, d: Array) -> Array:
        xp, out, g = namespace(d), layer.shape[0], layer.groups
        grid = xp.reshape(d, (g, out // g, layer.channels // g, math.prod(layer.kernel_size)))
        return xp.reshape(xp.sum(xp.sum(grid, axis=3), axis=1), (-1,))
