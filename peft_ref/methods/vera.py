"""VeRA: add a random low-rank matrix that all layers share, and train two vectors of each layer.

    W' = W + diag(b) B_out diag(d) A_in

    b (out,)    d (r,)    A (r, widest in)    B (widest out, r)

A and B are drawn once, as large as the widest adapted layers need, and never trained; a layer sees the first `in` columns of A, A_in, and
the first `out` rows of B, B_out. For a gradient G of W', with H = (G A_in^T) * B_out (out, r):   db = H d    dd = H^T b.
A fresh b is zero, so a fresh adapter changes nothing.

Paper   VeRA: Kopiczko et al. 2023, arXiv:2310.11454
HF      peft.VeraConfig, on linear layers and Conv1D. No scale: neither alpha nor 1/r. With save_projection=False a file has neither A nor
        B, and the seed projection_prng_key makes them again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar, NamedTuple, Self, final

import numpy as np

from peft_ref.arrays import Array, column, namespace, to, zeros_like
from peft_ref.contracts import Additive, Delta, Key, Start
from peft_ref.layers import Layer
from peft_ref.methods.torch_draws import Generator, Host
from peft_ref.methods.widths import check_widths, widest
from peft_ref.ranges import positive, probability

KINDS = frozenset({"linear", "transposed_linear"})


class Params(NamedTuple):
    b: Annotated[Array, "out", Key("vera_lambda_b", kinds=KINDS)]
    d: Annotated[Array, "r", Key("vera_lambda_d", kinds=KINDS)]
    A: Annotated[Array, "r widest_in", Key("vera_A", kinds=KINDS, trained=False, shared=True, saved="save_projection")]
    B: Annotated[Array, "widest_out r", Key("vera_B", kinds=KINDS, trained=False, shared=True, saved="save_projection")]


@final
@dataclass(frozen=True, kw_only=True)
class VeRA(Additive[Params]):
    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    d_initial: float = 0.1
    init_weights: bool = True
    vera_dropout: float = 0.0
    widest_in: int | None = None  # of all adapted layers, as `spanning` finds them: no key of a configuration
    widest_out: int | None = None

    peft_type: ClassVar[str] = "VERA"
    tuner_prefix: ClassVar[str] = "vera_lambda_"
    dropout: ClassVar[str | None] = "vera_dropout"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        positive(self, "r")
        probability(self, "vera_dropout")

    def dims(self, layer: Layer) -> dict[str, int]:
        out, n_in = layer.shape
        return {"r": self.r, "widest_in": self.widest_in or n_in, "widest_out": self.widest_out or out}

    def check_geometry(self, layer: Layer) -> None:
        check_widths("VeRA", layer, self.widest_in, self.widest_out)

    def spanning(self, layers: Mapping[str, Layer]) -> Self:
        out, n_in = widest(layers)
        return replace(self, widest_in=n_in, widest_out=out)

    def spanned_by(self, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        A, B = shapes.get("vera_A", ()), shapes.get("vera_B", ())
        return replace(self, widest_in=A[1], widest_out=B[0]) if len(A) == len(B) == 2 else self

    def common(self, layers: Mapping[str, Layer], weights: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Params]:
        if not layers:
            return {}
        like = weights[next(iter(layers))]
        out, n_in = widest(layers)
        drawn = projections(self.projection_prng_key, self.r, self.r, self.widest_in or n_in, self.widest_out or out)
        A, B = (to(matrix, like) for matrix in drawn)
        return dict.fromkeys(layers, self.to_params(A=A, B=B))

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        return self.start_alone(layer, W, rng)

    def start(self, layer: Layer, W: Array, rng: np.random.Generator, common: Params | None) -> Start[Params]:
        assert common is not None
        b, d = zeros_like((layer.shape[0],), W), zeros_like((self.r,), W) + self.d_initial
        if not self.init_weights:
            b, d = b + 1, to(rng.normal(size=self.r), W)
        return Start(common._replace(b=b, d=d), W)

    def delta(self, layer: Layer, p: Params) -> Delta:
        out, n_in = layer.shape
        return Delta((column(p.b) * p.B[:out, :]) @ (column(p.d) * p.A[:, :n_in]))

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        xp = namespace(d.W)
        out, n_in = layer.shape
        G = (d.W @ xp.matrix_transpose(p.A[:, :n_in])) * p.B[:out, :]
        return self.to_params(b=xp.sum(G * p.d, axis=1), d=xp.sum(G * column(p.b), axis=0))


@lru_cache(maxsize=4)
def projections(seed: int, rows: int, r: int, n_in: int, out: int) -> tuple[Host, Host]:
    """A (rows, in) and then B (out, r), each uniform within sqrt(6 / its columns), from one generator. Do not write into them."""
    generator = Generator(seed)
    A, B = (generator.uniform(shape, -bound(shape[1]), bound(shape[1])) for shape in ((rows, n_in), (out, r)))
    return A, B


def bound(columns: int) -> float:
    """torch's kaiming_uniform_ with a gain of sqrt 2, in its order of roundings."""
    return math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
