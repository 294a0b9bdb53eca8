"""OFT: turn the inputs of a layer, block by block; of an embedding its outputs.

    W' = W M^T      M = blockdiag(R_1, ..., R_n), block size b,   n b = in      x M is what the layer then sees      b' = b
    W' = M^T W      on an embedding, n b = out

    Q_i = T_i - T_i^T, T_i the strict upper triangle with the b (b - 1) / 2 numbers of row i, in reading order
    R = (I - Q) (I + Q)^-1                                   use_cayley_neumann off: orthogonal
    R = I + 2 Q + 2 Q^2 + ... + 2 Q^(t-2) + Q^(t-1)          on, t terms: (I + Q) (I - Q)^-1 cut off, so nearly the other way round

With V the rows that are turned, V'_i = V_i F_i, F = R^T (embedding: R):  dF_i = V_i^T G_i,  dV_i = G_i F_i^T.  With A = (I + Q)^-1 the
first R is 2 A - I and dQ = -2 A^T dR A^T; the second by P_k = P_(k-1) Q from the last power down.  The gradient of entry ij of T is
dQ_ij - dQ_ji.  T starts at zero, so a fresh adapter changes nothing.
coft: a block with |Q| > e = eps / sqrt(rows) is Q e / |Q| before all else; no gradient goes through that.

Paper   Qiu et al. 2023, arXiv:2306.07280; in the form of OFTv2, arXiv:2506.19847
HF      peft.OFTConfig. Three terms give what four give. With coft the stored numbers are overwritten by what acts. On a convolution with a
        kernel larger than 1 HF turns overlapping patches and adds them up, which is no map of the weight: refused here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, namespace, to
from peft_ref.contracts import Key, Reweight, Scaled, Start, Turned, WeightGradients, WeightMap
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Conv, Embedding, Layer, Linear
from peft_ref.methods.cayley import cayley, cayley_vjp, inverse, neumann, neumann_vjp, skew, skew_vjp

TURNED = frozenset({"linear", "conv2d"})
TABLE = frozenset({"embedding"})


class Params(NamedTuple):
    R: Annotated[Array, "rows elements", Key("oft_R.weight", kinds=TURNED), Key("oft_embedding_R.weight", kinds=TABLE)]


@final
@dataclass(frozen=True, kw_only=True)
class OFT(Reweight[Params]):
    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    peft_type: ClassVar[str] = "OFT"
    tuner_prefix: ClassVar[str] = "oft_"
    kinds: ClassVar[frozenset[str]] = TURNED | TABLE
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        if min(self.r, self.oft_block_size) < 0 or (self.r == 0) == (self.oft_block_size == 0):
            raise ConfigError(
                f"r={self.r} and oft_block_size={self.oft_block_size}: one of them is positive and the other 0 (HF PEFT refuses it too).\n"
                "  Their product is the size of the layer, so the other one follows."
            )

    def blocks(self, layer: Layer) -> tuple[int, int]:
        """How many blocks, and of what size: what was asked for, or the divisor of the layer's size that is nearest, the lower of two."""
        n = layer.shape[0] if layer.kind == "embedding" else layer.shape[1]
        wanted = min(self.r or self.oft_block_size, n)
        for away in range(n):
            if near := next((d for d in (wanted - away, wanted + away) if 1 <= d <= n and n % d == 0), None):
                return (near, n // near) if self.r else (n // near, near)
        raise ConfigError(f"OFT: a layer of size {n} has no blocks.")

    def dims(self, layer: Layer) -> dict[str, int]:
        n, b = self.blocks(layer)
        return {"rows": 1 if self.block_share else n, "elements": b * (b - 1) // 2}

    def check_geometry(self, layer: Layer) -> None:
        if isinstance(layer, Conv) and (math.prod(layer.kernel_size) > 1 or layer.groups > 1 or any(d > 1 for d in layer.dilation)):
            raise UnsupportedLayerError(
                f"OFT on a convolution with kernel_size={layer.kernel_size}, groups={layer.groups}, dilation={layer.dilation}:"
                " only pointwise ones are turned, without groups.\n  HF PEFT adds up overlapping turned patches of a larger"
                " kernel, which no merged weight does, cannot merge groups, and refuses dilation."
            )

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        if len(shapes) != 1:
            return None
        ((key, (rows, elements)),) = shapes.items()
        n = (math.isqrt(2 * elements) + 1) * (self.r if self.block_share and self.r else rows)
        if key == "oft_embedding_R.weight":
            return Embedding(num_embeddings=1, embedding_dim=n)
        return Linear(in_features=n, out_features=1)

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        shape = tuple(self.dims(layer).values())
        return Start(Params(to(np.zeros(shape) if self.init_weights else rng.normal(0, 0.1, shape), W)), W)

    def weight(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return self._turned(layer, W, self._factor(layer, self.acting(p))), b

    def weight_vjp(
        self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array, dW: Array, db: Array | None
    ) -> WeightGradients[Params]:
        mT, acting = namespace(dW).matrix_transpose, self.acting(p)
        dF = mT(self._rows(layer, W)) @ self._rows(layer, dW)
        return WeightGradients(self._factor_vjp(layer, acting, dF), self._turned(layer, dW, mT(self._factor(layer, acting))), db)

    def product(self, layer: Layer, p: Params) -> Turned:
        F, (n, b) = self._factor(layer, self.acting(p)), self.blocks(layer)
        return Turned(namespace(F).broadcast_to(F, (n, b, b)))

    def product_vjp(self, layer: Layer, p: Params, d: Scaled | Turned) -> Params:
        assert isinstance(d, Turned)
        return self._factor_vjp(layer, self.acting(p), d.blocks)

    def unmerge(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        F = self._factor(layer, self.acting(p))
        back = namespace(F).matrix_transpose(F)
        if self.use_cayley_neumann:  # no longer orthogonal, but F and F^T commute
            back = +(inverse(+(F @ back)) @ back)
        return self._turned(layer, W, back), b

    def differentiated(self, layer: Layer, p: Params, W0: Array) -> WeightMap[Params]:
        moved = self.acting(p).R - p.R
        return lambda q, W, b: (self._turned(layer, W, self._factor(layer, Params(q.R + moved))), b)

    def acting(self, p: Params) -> Params:
        """The numbers that act: with coft, those of Q e / |Q| where |Q| is larger than e."""
        if not self.coft:
            return p
        xp, limit = namespace(p.R), self.eps / math.sqrt(p.R.shape[0])
        norm = xp.sqrt(2.0 * xp.sum(p.R * p.R, axis=1, keepdims=True))
        one, larger = norm * 0.0 + 1.0, norm > limit
        return Params(p.R * xp.where(larger, limit / xp.where(larger, norm, one), one))

    def _factor(self, layer: Layer, p: Params) -> Array:
        """F (rows, b, b)."""
        Q = skew(p.R, self.blocks(layer)[1])
        R = neumann(Q, self.num_cayley_neumann_terms) if self.use_cayley_neumann else cayley(Q)
        return R if layer.kind == "embedding" else namespace(R).matrix_transpose(R)

    def _factor_vjp(self, layer: Layer, p: Params, dF: Array) -> Params:
        """The gradient of p, given that of each of the n blocks on the diagonal."""
        xp, Q = namespace(dF), skew(p.R, self.blocks(layer)[1])
        dF = xp.sum(dF, axis=0, keepdims=True) if self.block_share else dF
        dR = dF if layer.kind == "embedding" else xp.matrix_transpose(dF)
        dQ = neumann_vjp(Q, self.num_cayley_neumann_terms, dR) if self.use_cayley_neumann else cayley_vjp(Q, dR)
        return Params(skew_vjp(dQ))

    def _rows(self, layer: Layer, W: Array) -> Array:
        """What is turned, as blocks (n, m, b)."""
        xp, (n, b) = namespace(W), self.blocks(layer)
        V = xp.matrix_transpose(W) if layer.kind == "embedding" else W
        return xp.permute_dims(xp.reshape(V, (V.shape[0], n, b)), (1, 0, 2))

    def _turned(self, layer: Layer, W: Array, F: Array) -> Array:
        xp, V = namespace(W), self._rows(layer, W) @ F
        flat = xp.reshape(xp.permute_dims(V, (1, 0, 2)), (V.shape[1], V.shape[0] * V.shape[2]))
        return xp.matrix_transpose(flat) if layer.kind == "embedding" else flat
