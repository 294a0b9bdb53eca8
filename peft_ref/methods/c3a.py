"""C3A: add a matrix of circulant blocks, each of which one row of numbers tells whole.

    W' = W + D      D[a b + t, c b + s] = K[a, c, (s - t) mod b] / in          K (out/b, in/b, b), b the block's size

so row t of block (a, c) is K[a, c] turned t places to the right. For a gradient G of W':
    dK[a, c, d] = sum_t G[a b + t, c b + (t + d) mod b] / in.
Both are gathers along the blocks' diagonals, so nothing rounds but the division; a Fourier transform gives the same sums.
The start is not zero: a fresh adapter changes the layer, but with init_weights=True.

Paper   arXiv:2407.19342
HF      peft.C3AConfig, on linear layers, computed in float32 by Fourier transforms, divided by `in` and not by b. Its gradient of x is
        another one, and of several adapters each reads what the one before it added: C3A-Q1 and C3A-Q2, dialects to the judge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, integers, namespace, to, zeros_like
from peft_ref.contracts import Additive, Delta, Key, Start
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.ranges import one_of, positive

KINDS = frozenset({"linear"})
INITS = (True, False, "gaussian", "kaiming_uniform", "xavier_uniform")


class Params(NamedTuple):
    K: Annotated[Array, "out/b in/b b", Key("c3a_kernel", kinds=KINDS)]


@final
@dataclass(frozen=True, kw_only=True)
class C3A(Additive[Params]):
    block_size: int = 256
    init_weights: bool | str = "xavier_uniform"

    peft_type: ClassVar[str] = "C3A"
    tuner_prefix: ClassVar[str] = "c3a_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        positive(self, "block_size")
        one_of(self, "init_weights", *INITS)

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"b": self.block_size}

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        K = shapes.get("c3a_kernel", ())
        return Linear(in_features=K[1] * K[2], out_features=K[0] * K[2]) if len(K) == 3 else None

    def check_geometry(self, layer: Layer) -> None:
        out, n_in = layer.shape
        if out % self.block_size or n_in % self.block_size:
            raise UnsupportedLayerError(
                f"C3A: block_size={self.block_size} does not divide both sizes of a layer of {n_in} inputs and {out} outputs"
                f" (HF PEFT refuses it too).\n  Use a divisor of {math.gcd(out, n_in)}, or block_size_pattern for this layer."
            )

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        (out, n_in), b = layer.shape, self.block_size
        shape = (out // b, n_in // b, b)
        if self.init_weights is True:
            return Start(Params(zeros_like(shape, W)), W)
        if self.init_weights == "gaussian":
            return Start(Params(to(rng.normal(size=shape), W)), W)
        bound = math.sqrt(1 / n_in) if self.init_weights == "kaiming_uniform" else math.sqrt(6 / (n_in + out))
        return Start(Params(to(rng.uniform(-bound, bound, shape), W)), W)

    def delta(self, layer: Layer, p: Params) -> Delta:
        xp, (m, n, b) = namespace(p.K), p.K.shape
        t, s = np.divmod(np.arange(b * b), b)  # row and column of every entry of a block
        blocks = xp.take(p.K, integers((s - t) % b, p.K), axis=2)
        dense = xp.permute_dims(xp.reshape(blocks, (m, n, b, b)), (0, 2, 1, 3))
        return Delta(xp.reshape(dense, layer.shape) / layer.shape[1])

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        xp, (m, n, b) = namespace(d.W), p.K.shape
        t, k = np.divmod(np.arange(b * b), b)  # row, and the diagonal that it meets
        blocks = xp.permute_dims(xp.reshape(d.W, (m, b, n, b)), (0, 2, 1, 3))
        diagonals = xp.take(xp.reshape(blocks, (m, n, b * b)), integers(t * b + (t + k) % b, d.W), axis=2)
        return Params(xp.sum(xp.reshape(diagonals, (m, n, b, b)), axis=2) / layer.shape[1])
