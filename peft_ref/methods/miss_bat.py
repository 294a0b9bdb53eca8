"""MiSS bat: cut the frozen weight into square blocks, and let every row of blocks be mapped by one of its own.

    W'_ac = W_ac (I + D_a) + D_a      b' = b

    W_ac (r, r), the block in row a and column c of blocks; D (out/r, r, r), one block D_a for each row; r divides in and out

For a gradient G of W':   dD_a = sum_c (W_ac^T G_ac + G_ac),   dW_ac = G_ac (I + D_a)^T.   A fresh D is zero, so a fresh adapter changes
nothing. Several adapters act one after the other: W is what the earlier one made. Unmerging needs I + D_a to be invertible:
W_ac = (W'_ac - D_a) (I + D_a)^-1.

Paper   Kang and Yin 2024, arXiv:2409.15371
HF      peft.MissConfig(init_weights="bat"), on linear layers alone. Its miss_dropout is not read there. It inverts in float32 always.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, device, namespace, regroup, right_divide, zeros_like
from peft_ref.contracts import Key, Reweight, Start, WeightGradients
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.methods.miss import KEY, KINDS, check_block, check_fits


class Params(NamedTuple):
    D: Annotated[Array, "out/r r r", Key(KEY, kinds=KINDS)]


@final
@dataclass(frozen=True, kw_only=True)
class MiSSBat(Reweight[Params]):
    r: int = 64
    miss_dropout: float = 0.0

    peft_type: ClassVar[str] = "MISS"
    flag: ClassVar[str | None] = "init_weights"
    flag_value: ClassVar[bool | str | type] = "bat"
    tuner_prefix: ClassVar[str] = "miss_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        check_block(self)

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r}

    def check_geometry(self, layer: Layer) -> None:
        check_fits(self.r, layer)
        if any(n % self.r for n in layer.shape):
            raise UnsupportedLayerError(
                f"r={self.r} on a weight {layer.shape}: it must divide both, for blocks of (r, r) (HF PEFT refuses it too)."
            )

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        return Linear(in_features=self.r, out_features=self.r * shapes[KEY][0]) if KEY in shapes else None

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        return Start(Params(zeros_like((layer.shape[0] // self.r, self.r, self.r), W)), W)

    def weight(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        blocks = self._blocks(W)
        return namespace(W).reshape(blocks + blocks @ p.D + self._along(p.D, layer), W.shape), b

    def weight_vjp(
        self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array, dW: Array, db: Array | None
    ) -> WeightGradients[Params]:
        xp, r, G = namespace(dW), self.r, self._blocks(dW)
        dD = xp.matrix_transpose(self._blocks(W)) @ G + xp.sum(regroup(G, (G.shape[0], r, -1, r)), axis=2)
        return WeightGradients(Params(dD), xp.reshape(G + G @ xp.matrix_transpose(p.D), dW.shape), db)

    def unmerge(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        xp = namespace(W)
        identity = xp.eye(self.r, dtype=p.D.dtype, device=device(p.D))
        return xp.reshape(right_divide(self._blocks(W) - self._along(p.D, layer), identity + p.D), W.shape), b

    def _blocks(self, W: Array) -> Array:
        """W (out, in) as (out/r, r * in/r, r): row i of every block W_ac of block row a, one block after the other, then row i + 1."""
        return regroup(W, (W.shape[0] // self.r, W.shape[1], self.r))

    def _along(self, D: Array, layer: Layer) -> Array:
        """Every D_a once for each column of blocks, in that order."""
        xp, (n, r, _), columns = namespace(D), D.shape, layer.shape[1] // self.r
        return regroup(xp.broadcast_to(xp.expand_dims(D, axis=2), (n, r, columns, r)), (n, r * columns, r))
