"""MiSS mini: MiSS with a block that is repeated over the rows of the frozen weight too.

    W'_ij = W_ij + D_(j mod r),(i mod q)      b' = b

    D (r, q), q = mini_r, which divides out; the last copy is cut off where r does not divide in

With q = out it is MiSS. For a gradient G of W':   dD_kl = sum of G_ij over the j with j mod r = k and the i with i mod q = l.
A fresh D is zero, so a fresh adapter changes nothing.

Paper   Kang and Yin 2024, arXiv:2409.15371
HF      peft.MissConfig(init_weights="mini"), on linear layers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, namespace, tile, tile_vjp, zeros_like
from peft_ref.contracts import Additive, Delta, Key, Start
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.methods.miss import KEY, KINDS, check_block, check_fits
from peft_ref.ranges import positive


class Params(NamedTuple):
    D: Annotated[Array, "r q", Key(KEY, kinds=KINDS)]


@final
@dataclass(frozen=True, kw_only=True)
class MiSSMini(Additive[Params]):
    r: int = 64
    mini_r: int = 1
    miss_dropout: float = 0.0

    peft_type: ClassVar[str] = "MISS"
    flag: ClassVar[str | None] = "init_weights"
    flag_value: ClassVar[bool | str | type] = "mini"
    tuner_prefix: ClassVar[str] = "miss_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    dropout: ClassVar[str | None] = "miss_dropout"

    def __post_init__(self) -> None:
        check_block(self)
        positive(self, "mini_r")

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r, "q": self.mini_r}

    def check_geometry(self, layer: Layer) -> None:
        check_fits(self.r, layer)
        if layer.shape[0] % self.mini_r:
            raise UnsupportedLayerError(
                f"mini_r={self.mini_r} on a layer with {layer.shape[0]} outputs: it must divide them (HF PEFT refuses it too)."
            )

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        return Linear(in_features=self.r, out_features=self.mini_r)

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        return Start(Params(zeros_like((self.r, self.mini_r), W)), W)

    def delta(self, layer: Layer, p: Params) -> Delta:
        return Delta(tile(namespace(p.D).matrix_transpose(p.D), layer.shape))

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        return Params(namespace(d.W).matrix_transpose(tile_vjp(d.W, (self.mini_r, self.r))))
