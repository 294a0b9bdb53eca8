"""MiSS: add one small block to the frozen weight again and again, side by side over its columns.

    W' = W + [D^T D^T ... D^T]      b' = b        that is  W'_ij = W_ij + D_(j mod r),i

    D (r, out), the block; the last copy is cut off where r does not divide in

In the forward pass: the inputs j, j + r, j + 2r, ... are added up, which leaves r numbers, and D maps those to the output.
For a gradient G of W':   dD_ki = sum of G_ij over the j with j mod r = k.   A fresh D is zero, so a fresh adapter changes nothing.

Paper   Kang and Yin 2024, arXiv:2409.15371
HF      peft.MissConfig, on linear layers alone. `init_weights` is more than a start there: "mini" and "bat" are other methods, MiSSMini
        and MiSSBat here. There is no scale. BONE, which PEFT has no more, was this with another key: peft_ref.files.removed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, namespace, tile, tile_vjp, to, zeros_like
from peft_ref.contracts import Additive, Delta, Key, Start
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.ranges import one_of, positive, probability

KINDS = frozenset({"linear"})
KEY = "miss_block"


class Params(NamedTuple):
    D: Annotated[Array, "r out", Key(KEY, kinds=KINDS)]


@final
@dataclass(frozen=True, kw_only=True)
class MiSS(Additive[Params]):
    r: int = 64
    miss_dropout: float = 0.0
    init_weights: bool = True

    peft_type: ClassVar[str] = "MISS"
    tuner_prefix: ClassVar[str] = "miss_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    dropout: ClassVar[str | None] = "miss_dropout"

    def __post_init__(self) -> None:
        check_block(self)
        one_of(self, "init_weights", True, False)  # "bat" and "mini" are MiSSBat and MiSSMini

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r}

    def check_geometry(self, layer: Layer) -> None:
        check_fits(self.r, layer)

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        return Linear(in_features=self.r, out_features=shapes[KEY][1]) if KEY in shapes else None

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        shape, bound = (self.r, layer.shape[0]), 1 / math.sqrt(layer.shape[0])
        return Start(Params(zeros_like(shape, W) if self.init_weights else to(rng.uniform(-bound, bound, shape), W)), W)

    def delta(self, layer: Layer, p: Params) -> Delta:
        return Delta(tile(namespace(p.D).matrix_transpose(p.D), layer.shape))

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        return Params(namespace(d.W).matrix_transpose(tile_vjp(d.W, (layer.shape[0], self.r))))


def check_block(method: Any) -> None:
    positive(method, "r")
    probability(method, "miss_dropout")


def check_fits(r: int, layer: Layer) -> None:
    if r > layer.shape[1]:
        raise UnsupportedLayerError(f"r={r} on a layer with {layer.shape[1]} inputs: r may not be larger (HF PEFT refuses it too).")
