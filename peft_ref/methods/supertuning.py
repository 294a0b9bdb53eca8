"""Super-Tuning: add numbers at the places where the frozen weight is largest; Supra adds a low-rank matrix beside.

    W' = W + D + s B A      D has v_k at place p_k, counted row by row, zero elsewhere      s = lora_alpha / r

    v, p (n,), n = int(out in (1 - sparsity))      A (r, in)    B (out, r), both only with r

For a gradient G of W':   dv_k = G at p_k    dA = s B^T G    dB = s G A^T.   The places are those of the n largest |W|, or of the smallest
with select_top=False, in order of size; they are saved and not trained. Fresh v and B are zero, so a fresh adapter changes nothing.

Paper   Super-Tuning: arXiv:2607.09287
HF      peft.SupertuningConfig, on linear layers. A lora_alpha that is missing is 2 r, where LoRA's is 8. Dropout reaches the low-rank part
        alone.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, namespace, scattered, to, zeros_like
from peft_ref.contracts import Additive, Delta, Key, Start
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.ranges import positive, probability

KINDS = frozenset({"linear"})


class Params(NamedTuple):
    v: Annotated[Array, "n", Key("supertuning_values", kinds=KINDS)]
    indices: Annotated[Array, "n", Key("supertuning_indices", kinds=KINDS, trained=False, saved="save_precomputed_indices")]
    A: Annotated[Array | None, "r in", Key("supertuning_lora_A.weight", kinds=KINDS, when="r")] = None
    B: Annotated[Array | None, "out r", Key("supertuning_lora_B.weight", kinds=KINDS, when="r")] = None


@final
@dataclass(frozen=True, kw_only=True)
class SuperTuning(Additive[Params]):
    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    peft_type: ClassVar[str] = "SUPERTUNING"
    tuner_prefix: ClassVar[str] = "supertuning_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    dropout: ClassVar[str | None] = "lora_dropout"

    def __post_init__(self) -> None:
        probability(self, "sparsity")
        positive(self, "r")
        if self.r is None and self.lora_alpha is not None:
            raise ConfigError(f"lora_alpha={self.lora_alpha} without r: there is no low-rank part to scale (HF PEFT refuses it too).")
        probability(self, "lora_dropout")

    @property
    def low_rank_scale(self) -> float:
        """s; a missing lora_alpha is 2 r."""
        return 0.0 if self.r is None else 2.0 if self.lora_alpha is None else self.lora_alpha / self.r

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"n": self.count(math.prod(layer.shape)), "r": self.r or 0}

    def count(self, entries: int) -> int:
        """How many of them are tuned."""
        return int(entries * (1 - self.sparsity))

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        """n tells how many entries a weight has, up to a few, and nothing of its sides: with a low-rank part that tells them."""
        (n,) = shapes.get("supertuning_values", (0,))
        if n == 0 or self.r is not None:
            return None
        return Linear(in_features=bisect_left(range(sys.maxsize), n, key=self.count), out_features=1)

    def check_geometry(self, layer: Layer) -> None:
        if self.dims(layer)["n"] < 1:
            raise UnsupportedLayerError(
                f"SuperTuning: sparsity={self.sparsity} leaves no entry of a weight of {layer.shape[0]} x {layer.shape[1]}"
                " (HF PEFT refuses it too).\n  Use less."
            )

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        n, (out, n_in) = self.dims(layer)["n"], layer.shape
        v = zeros_like((n,), W) if self.init_weights else to(rng.normal(size=n), W)
        p = Params(v, self.places(layer, W))
        if self.r is None:
            return Start(p, W)
        A = to(rng.uniform(-1 / math.sqrt(n_in), 1 / math.sqrt(n_in), (self.r, n_in)), W)
        bound = 0.0 if self.init_weights else 1 / math.sqrt(self.r)
        return Start(p._replace(A=A, B=to(rng.uniform(-bound, bound, (out, self.r)), W)), W)

    def common(self, layers: Mapping[str, Layer], weights: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Params]:
        """The places, which a file may leave out: the frozen weight has them."""
        return {name: Params(None, self.places(layer, weights[name])) for name, layer in layers.items()}

    def places(self, layer: Layer, W: Array) -> Array:
        """Where the largest |W| are, or the smallest, in that order."""
        xp = namespace(W)
        size = xp.reshape(abs(W), (-1,))
        order = xp.argsort(-size if self.select_top else size, stable=True)
        return xp.astype(order[: self.dims(layer)["n"]], xp.int32)

    def apart(self, params: Params) -> tuple[Params, Params]:
        """The sparse part, which has no dropout, and the low-rank one."""
        return params._replace(A=None, B=None), params._replace(v=zeros_like(params.v.shape, params.v))

    def together(self, kept: Params, dropped: Params) -> Params:
        return dropped._replace(v=kept.v)

    def delta(self, layer: Layer, p: Params) -> Delta:
        xp = namespace(p.v)
        D = xp.reshape(scattered(p.v, xp.astype(p.indices, xp.int64), math.prod(layer.shape)), layer.shape)
        return Delta(D if p.A is None or p.B is None else D + self.low_rank_scale * (p.B @ p.A))

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        xp, s = namespace(d.W), self.low_rank_scale
        dv = xp.take(xp.reshape(d.W, (-1,)), xp.astype(p.indices, xp.int64))
        if p.A is None or p.B is None:
            return Params(dv, None)
        G = s * d.W
        return Params(dv, None, xp.matrix_transpose(p.B) @ G, G @ xp.matrix_transpose(p.A))
