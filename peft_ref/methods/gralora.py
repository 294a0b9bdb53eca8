"""GraLoRA: cut the weight into k x k blocks and give each one a LoRA of rank r / k, whose factors lie side by side in 2 k small matrices.

    W'_jn = W_jn + s B_j[n]^T A_n[j]^T      and with hybrid_r all over the weight  W' = ... + s Bg Ag      b' = b
    s = alpha / (r + hybrid_r)

    A (k, in/k, r)    B (k, r, out/k)    Ag (hybrid_r, in)    Bg (out, hybrid_r)
    A_n[j] (in/k, r/k), the j-th part of A_n's columns    B_j[n] (r/k, out/k), the n-th part of B_j's rows    W_jn (out/k, in/k)

For a gradient G of W':   dB_j[n] = s A_n[j]^T G_jn^T    dA_n[j] = s G_jn^T B_j[n]^T    dAg = s Bg^T G    dBg = s G Ag^T.
A fresh B and Bg are zero, so a fresh adapter changes nothing. The delta has rank up to k r from as many numbers as LoRA's of rank r.

Paper   Jung et al. 2025, arXiv:2505.20355
HF      peft.GraloraConfig, on linear layers and Conv1D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, namespace, to, zeros_like
from peft_ref.contracts import Additive, Delta, Key, Start
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.ranges import not_negative, positive, probability

KINDS = frozenset({"linear", "transposed_linear"})


class Params(NamedTuple):
    A: Annotated[Array, "k in/k r", Key("gralora_A", kinds=KINDS)]
    B: Annotated[Array, "k r out/k", Key("gralora_B", kinds=KINDS)]
    Ag: Annotated[Array | None, "h in", Key("gralora_A_general.weight", kinds=KINDS, when="hybrid_r")] = None
    Bg: Annotated[Array | None, "out h", Key("gralora_B_general.weight", kinds=KINDS, when="hybrid_r")] = None


@final
@dataclass(frozen=True, kw_only=True)
class GraLoRA(Additive[Params]):
    r: int = 32
    hybrid_r: int = 0
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    init_weights: bool = True

    peft_type: ClassVar[str] = "GRALORA"
    tuner_prefix: ClassVar[str] = "gralora_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    dropout: ClassVar[str | None] = "gralora_dropout"

    def __post_init__(self) -> None:
        positive(self, "r", "gralora_k")
        not_negative(self, "hybrid_r")
        if self.r % self.gralora_k:
            raise ConfigError(f"gralora_k={self.gralora_k} does not divide r={self.r}.")
        probability(self, "gralora_dropout")

    @property
    def scale(self) -> float:
        return self.alpha / (self.r + self.hybrid_r)

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r, "k": self.gralora_k, "h": self.hybrid_r}

    def check_geometry(self, layer: Layer) -> None:
        if any(n % self.gralora_k for n in layer.shape):
            raise UnsupportedLayerError(
                f"gralora_k={self.gralora_k} on a weight {layer.shape}: it must divide both sizes (HF PEFT refuses it too)."
            )

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        if not {"gralora_A", "gralora_B"} <= shapes.keys():
            return None
        A, B = shapes["gralora_A"], shapes["gralora_B"]
        return Linear(in_features=A[0] * A[1], out_features=B[0] * B[-1])

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        (out, n_in), r, k, h = layer.shape, self.r, self.gralora_k, self.hybrid_r

        def uniform(*shape: int) -> Array:
            return to(rng.uniform(-1, 1, shape) / math.sqrt(shape[1]), W)  # the fan in stands there in all four

        def upper(*shape: int) -> Array:
            return zeros_like(shape, W) if self.init_weights else uniform(*shape)

        A, B = uniform(k, n_in // k, r), upper(k, r, out // k)
        return Start(Params(A, B, *((uniform(h, n_in), upper(out, h)) if h else ())), W)

    def delta(self, layer: Layer, p: Params) -> Delta:
        A, B = self._blocks(p)
        D = self._laid_out(B @ A)
        return Delta(self.scale * (D if p.Ag is None else D + p.Bg @ p.Ag))

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        xp, k = namespace(d.W), self.gralora_k
        mT, G = xp.matrix_transpose, self.scale * d.W
        A, B = self._blocks(p)
        blocks = xp.permute_dims(xp.reshape(G, (k, G.shape[0] // k, k, G.shape[1] // k)), (0, 2, 1, 3))
        dA = xp.reshape(xp.permute_dims(mT(B) @ blocks, (1, 3, 0, 2)), p.A.shape)
        dB = xp.reshape(xp.permute_dims(blocks @ mT(A), (0, 1, 3, 2)), p.B.shape)
        return Params(dA, dB) if p.Ag is None else Params(dA, dB, mT(p.Bg) @ G, G @ mT(p.Ag))

    def _blocks(self, p: Params) -> tuple[Array, Array]:
        """A_n[j]^T as (j, n, r/k, in/k) and B_j[n]^T as (j, n, out/k, r/k)."""
        xp, k, t = namespace(p.A), self.gralora_k, self.r // self.gralora_k
        A = xp.permute_dims(xp.reshape(p.A, (k, p.A.shape[1], k, t)), (2, 0, 3, 1))
        return A, xp.permute_dims(xp.reshape(p.B, (k, k, t, p.B.shape[2])), (0, 1, 3, 2))

    def _laid_out(self, blocks: Array) -> Array:
        """Blocks (j, n, out/k, in/k) as one matrix (out, in)."""
        xp, (k, _, rows, columns) = namespace(blocks), blocks.shape
        return xp.reshape(xp.permute_dims(blocks, (0, 2, 1, 3)), (k * rows, k * columns))
