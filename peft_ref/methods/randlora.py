"""RandLoRA: a full-rank change from random bases that all layers share; each basis is scaled by a few numbers of the layer.

    W' = W + s P Q   if the layer is no wider than high (in <= out),   else  W' = W + s (P Q)^T        s = alpha / r

    n = ceil(small / r) bases,   small = min(in, out),  large = max(in, out)
    Q (r n, small)   row k n + b:      lambda_kb  A_k * gamma_b          A (r, 1, small)    lambda (r, n)    gamma (n, small)
    P (large, r n)   column b r + k:   B_:bk                              B (large, n, r)

Row j of Q meets column j of P, and the two are numbered in different orders: where n > 1 and r > 1, rank k of basis b meets another one.
A and B are drawn for the widest layers, as in VeRA, and a layer sees the first of everything.
For a gradient G of P Q (s G of W', or its transpose), with H = P^T G as (r, n, small):
    dlambda_kb = sum_m H_kbm A_km gamma_bm        dgamma_bm = sum_k H_kbm lambda_kb A_km.   A fresh lambda is zero.

Paper   RandLoRA: Albert et al. 2025, arXiv:2502.00987, where the orders are one
HF      peft.RandLoraConfig, on linear layers and Conv1D. A file holds A and B beside every layer too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar, NamedTuple, Self, final

import numpy as np

from peft_ref.arrays import Array, namespace, to, zeros_like
from peft_ref.contracts import Additive, Delta, Key, Start
from peft_ref.layers import Layer, Linear
from peft_ref.methods.torch_draws import Generator, Host, as_bfloat16
from peft_ref.methods.widths import check_widths, widest
from peft_ref.ranges import positive, probability

KINDS = frozenset({"linear", "transposed_linear"})


class Params(NamedTuple):
    lam: Annotated[Array, "r bases", Key("randlora_lambda", kinds=KINDS)]
    gamma: Annotated[Array, "bases small", Key("randlora_gamma", kinds=KINDS)]
    A: Annotated[
        Array, "r 1 widest_small", Key("randlora_A", kinds=KINDS, trained=False, shared=True, saved="save_projection", repeated=True)
    ]
    B: Annotated[
        Array,
        "widest_large widest_bases r",
        Key("randlora_B", kinds=KINDS, trained=False, shared=True, saved="save_projection", repeated=True),
    ]


@final
@dataclass(frozen=True, kw_only=True)
class RandLoRA(Additive[Params]):
    r: int = 32
    randlora_alpha: float = 640
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    init_weights: bool = True
    randlora_dropout: float = 0.0
    widest_in: int | None = None  # of all adapted layers, as `spanning` finds them: no key of a configuration
    widest_out: int | None = None

    peft_type: ClassVar[str] = "RANDLORA"
    tuner_prefix: ClassVar[str] = "randlora_"
    dropout: ClassVar[str | None] = "randlora_dropout"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        positive(self, "r")
        probability(self, "randlora_dropout")

    @property
    def scale(self) -> float:
        return self.randlora_alpha / self.r

    def dims(self, layer: Layer) -> dict[str, int]:
        out, n_in = layer.shape
        wide = self.widest_out or out, self.widest_in or n_in
        small = {"small": min(out, n_in), "widest_small": min(wide), "widest_large": max(wide)}
        return {"r": self.r, **small, "bases": -(-min(out, n_in) // self.r), "widest_bases": -(-min(wide) // self.r)}

    def check_geometry(self, layer: Layer) -> None:
        check_widths("RandLoRA", layer, self.widest_in, self.widest_out)

    def spanning(self, layers: Mapping[str, Layer]) -> Self:
        out, n_in = widest(layers)
        return replace(self, widest_in=n_in, widest_out=out)

    def spanned_by(self, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Which of in and out is the larger no file tells, and it does not matter to the sizes."""
        A, B = shapes.get("randlora_A", ()), shapes.get("randlora_B", ())
        return replace(self, widest_in=A[2], widest_out=B[0]) if len(A) == len(B) == 3 else self

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        """The smaller of its sizes is all that a layer's own tensors tell."""
        gamma = shapes.get("randlora_gamma")
        return Linear(in_features=gamma[1], out_features=gamma[1]) if gamma else None

    def common(self, layers: Mapping[str, Layer], weights: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Params]:
        if not layers:
            return {}
        like = weights[next(iter(layers))]
        out, n_in = widest(layers)
        wide = self.widest_out or out, self.widest_in or n_in
        sparsity = math.sqrt(min(wide)) if self.very_sparse else 3.0 if self.sparse else None
        A, B = (to(basis, like) for basis in bases(self.projection_prng_key, self.r, min(wide), max(wide), sparsity))
        return dict.fromkeys(layers, self.to_params(A=A, B=B))

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        return self.start_alone(layer, W, rng)

    def start(self, layer: Layer, W: Array, rng: np.random.Generator, common: Params | None) -> Start[Params]:
        assert common is not None
        n, small = (self.dims(layer)[letter] for letter in ("bases", "small"))
        lam, gamma = zeros_like((self.r, n), W), zeros_like((n, small), W) + 1 / max(n, small)
        if not self.init_weights:
            lam, gamma = to(rng.normal(size=(self.r, n)), W), gamma * 0 + 1 / max(layer.shape)
        return Start(common._replace(lam=lam, gamma=gamma), W)

    def delta(self, layer: Layer, p: Params) -> Delta:
        P, cube, xp = self._large(layer, p), self._small(layer, p), namespace(p.lam)
        cube = cube * xp.expand_dims(p.lam, axis=2)
        W = self.scale * (P @ xp.reshape(cube, (P.shape[1], cube.shape[2])))
        return Delta(W if layer.shape[1] <= layer.shape[0] else xp.matrix_transpose(W))

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        P, cube, xp = self._large(layer, p), self._small(layer, p), namespace(d.W)
        G = self.scale * (d.W if layer.shape[1] <= layer.shape[0] else xp.matrix_transpose(d.W))
        H = xp.reshape(xp.matrix_transpose(P) @ G, cube.shape)
        A = p.A[:, :, : cube.shape[2]]
        return self.to_params(lam=xp.sum(H * cube, axis=2), gamma=xp.sum(H * A * xp.expand_dims(p.lam, axis=2), axis=0))

    def _large(self, layer: Layer, p: Params) -> Array:
        """P: the columns in the order of B's numbers, basis by basis."""
        large, n = max(layer.shape), p.gamma.shape[0]
        return namespace(p.B).reshape(p.B[:large, :n, :], (large, n * self.r))

    def _small(self, layer: Layer, p: Params) -> Array:
        """A_k * gamma_b (r, n, small), whose flattening numbers the rows of Q rank by rank."""
        return p.A[:, :, : min(layer.shape)] * namespace(p.gamma).expand_dims(p.gamma, axis=0)


@lru_cache(maxsize=4)
def bases(seed: int, r: int, small: int, large: int, sparsity: float | None) -> tuple[Host, Host]:
    """A and B from one generator, each divided by its deviation. Do not write into them.

    Dense ones are uniform as kaiming_uniform_(a=sqrt 5) has it, in bfloat16, as on a machine that computes in it; sparse ones -1, 0 and 1.
    """
    generator, n = Generator(seed), -(-small // r)
    if sparsity is None:
        A = _dense(generator, (r, 1, small), small)
        B = np.concatenate([_dense(generator, (large, 1, r), r) for _ in range(n)], axis=1)
        return tuple(as_bfloat16(basis / as_bfloat16(_deviation(basis))) for basis in (A, B))  # type: ignore[return-value]
    A, B = (generator.uniform(shape, 0.0, 1.0) for shape in ((r, 1, small), (large, n, r)))
    signs = [(basis > 1 - 1 / (2 * sparsity)).astype(np.float32) - (basis < 1 / (2 * sparsity)) for basis in (A, B)]
    return tuple(s / np.float32(_deviation(s)) for s in signs)  # type: ignore[return-value]


def _deviation(basis: Host) -> float:
    return float(np.std(basis, ddof=1, dtype=np.float64))


def _dense(generator: Generator, shape: tuple[int, ...], columns: int) -> Host:
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(columns))
    return generator.uniform_bfloat16(shape, -bound, bound)
