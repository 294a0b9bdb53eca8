"""PSOFT: turn the largest singular directions of the frozen weight among themselves.

    W' = W + s B (R - I) A      R = diag(v_b) C diag(v_a)      s = alpha / r
    C = (I + Q) (I - Q)^-1                                   Q = T - T^T, T the strict upper triangle with the r (r - 1) / 2 numbers q
    C = I + 2 Q + 2 Q^2 + ... + 2 Q^(t-2) + Q^(t-1)          use_cayley_neumann: t terms of the same
    C: any matrix (r, r)                                     psoft_orth off
    A (r, in), B (out, r): s B A is the part of W with its r largest singular values, W = U diag(S) V^T:
        A = V_r^T, B = U_r diag(S_r) / s       or, ab_svd_init="pissa_init", each with the root of S_r / s

For a gradient G of W':  dR = s B^T G A^T,  dC = diag(v_b) dR diag(v_a),  dv_b = sum of the rows of dR * (C diag(v_a)),  dv_a of the
columns of dR * (diag(v_b) C);  from C to q as in `cayley`.  A and B have no gradient.  q starts at zero, C at I, both v at one, so a fresh
adapter changes nothing.
cayley_neumann_eps: where |Q| > e it is Q e / (|Q| + 1e-12), and the gradient goes through that.

Paper   PSOFT: openreview.net/forum?id=FSHrinMArK
HF      peft.PsoftConfig, on linear layers. No file holds A and B: they are worked out again from the frozen weight, in float32. The sign of
        a singular vector is the library's choice, and R takes its own from it: with another sign the same file is another adapter. So A
        and B are parameters here, that are not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, column, eye_like, namespace, thin_svd, to
from peft_ref.contracts import Factors, Key, LowRank, Start
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.methods.cayley import cayley, cayley_vjp, neumann, neumann_vjp, skew, skew_vjp
from peft_ref.ranges import one_of, positive, probability

STARTS = ("psoft_init", "pissa_init")
SOLVERS = ("full", "lowrank")
NO_ZERO = 1e-12


class Params(NamedTuple):
    q: Annotated[Array, "elements", Key("psoft_R.weight", when="psoft_orth")]
    C: Annotated[Array, "r r", Key("psoft_R.weight", when="free")]
    v_b: Annotated[Array, "r", Key("psoft_R.vector_b", when="psoft_mag_b")]
    v_a: Annotated[Array, "r", Key("psoft_R.vector_a", when="psoft_mag_a")]
    A: Annotated[Array, "r in", Key("_psoft_A_cache", trained=False, derived=True)]
    B: Annotated[Array, "out r", Key("_psoft_B_cache", trained=False, derived=True)]


@final
@dataclass(frozen=True, kw_only=True)
class PSOFT(LowRank[Params]):
    r: int = 32
    psoft_alpha: float = 32
    psoft_dropout: float = 0.0
    ab_svd_init: str = "psoft_init"
    psoft_svd: str = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True

    peft_type: ClassVar[str] = "PSOFT"
    tuner_prefix: ClassVar[str] = "psoft_"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    dropout: ClassVar[str | None] = "psoft_dropout"

    def __post_init__(self) -> None:
        positive(self, "r")
        probability(self, "psoft_dropout")
        one_of(self, "ab_svd_init", *STARTS)
        one_of(self, "psoft_svd", *SOLVERS)
        eps = self.cayley_neumann_eps
        if self.use_cayley_neumann and (self.num_cayley_neumann_terms <= 0 or (eps is not None and not 0 < eps < 1)):
            raise ConfigError(
                f"num_cayley_neumann_terms={self.num_cayley_neumann_terms}, cayley_neumann_eps={eps}: a positive number of terms, and null"
                " or a number between 0 and 1 (HF PEFT refuses it too)."
            )

    @property
    def free(self) -> bool:
        return not self.psoft_orth

    @property
    def scale(self) -> float:
        return self.psoft_alpha / self.r

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r, "elements": self.r * (self.r - 1) // 2}

    def check_geometry(self, layer: Layer) -> None:
        if self.r > min(layer.shape):
            raise UnsupportedLayerError(
                f"PSOFT: r={self.r}, and a weight {layer.shape} has only {min(layer.shape)} singular values (HF PEFT refuses it too)."
            )

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        return Linear(in_features=self.r, out_features=self.r)  # a file says no more

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        r = self.r
        noise = 0.0 if self.init_weights else 0.1
        C = np.eye(r) + noise * rng.normal(size=(r, r))
        q, one = to(noise * rng.normal(size=r * (r - 1) // 2), W), to(np.ones(r), W)
        A, B = self.parts(W)
        turn = {"q": q} if self.psoft_orth else {"C": to(C, W)}
        scales = {name: one for name, on in (("v_b", self.psoft_mag_b), ("v_a", self.psoft_mag_a)) if on}
        return Start(self.to_params(**turn, **scales, A=A, B=B), W)

    def parts(self, W: Array) -> tuple[Array, Array]:
        """A and B of a frozen weight, with the signs that its library gives."""
        xp = namespace(W)
        U, S, Vh = thin_svd(W)
        U, S, Vh = U[:, : self.r], S[: self.r] / self.scale, Vh[: self.r, :]
        if self.ab_svd_init == "psoft_init":
            return Vh, U * S
        return column(xp.sqrt(S)) * Vh, U * xp.sqrt(S)

    def factors(self, p: Params) -> Factors:
        return Factors(B=self.scale * (p.B @ (self.turn(p) - eye_like(self.r, p.B))), A=p.A)

    def factors_vjp(self, p: Params, d: Factors) -> Params:
        xp = namespace(d.B)
        dR = self.scale * (xp.matrix_transpose(p.B) @ d.B)
        C = self._core(p)
        dC, left, right = dR, C, C
        if p.v_b is not None:
            dC, left = column(p.v_b) * dC, column(p.v_b) * left
        if p.v_a is not None:
            dC, right = dC * p.v_a, right * p.v_a
        return self.to_params(
            **self._core_vjp(p, dC),
            v_b=None if p.v_b is None else xp.sum(dR * right, axis=1),
            v_a=None if p.v_a is None else xp.sum(dR * left, axis=0),
        )

    def turn(self, p: Params) -> Array:
        """R (r, r)."""
        R = self._core(p)
        R = R if p.v_b is None else column(p.v_b) * R
        return R if p.v_a is None else R * p.v_a

    def _core(self, p: Params) -> Array:
        """C (r, r)."""
        if not self.psoft_orth:
            return p.C
        Q = self._skew(p.q)
        return (neumann(Q, self.num_cayley_neumann_terms) if self.use_cayley_neumann else cayley(-Q))[0, ...]

    def _core_vjp(self, p: Params, dC: Array) -> dict[str, Array]:
        xp = namespace(dC)
        if not self.psoft_orth:
            return {"C": dC}
        Q, dC = self._skew(p.q), xp.expand_dims(dC, axis=0)
        dQ = neumann_vjp(Q, self.num_cayley_neumann_terms, dC) if self.use_cayley_neumann else -cayley_vjp(-Q, dC)
        return {"q": self._shortened_vjp(p.q, skew_vjp(dQ)[0, ...])}

    def _skew(self, q: Array) -> Array:
        """Q (1, r, r)."""
        return skew(namespace(q).expand_dims(self._shortened(q), axis=0), self.r)

    def _shortened(self, q: Array) -> Array:
        """The numbers of Q e / (|Q| + 1e-12) where |Q| > e."""
        if self._limit is None or self.r == 1:
            return q
        norm = self._norm(q)
        return q * namespace(q).where(norm > self._limit, self._limit / (norm + NO_ZERO), norm * 0.0 + 1.0)

    def _shortened_vjp(self, q: Array, d: Array) -> Array:
        if self._limit is None or self.r == 1:
            return d
        xp, norm = namespace(q), self._norm(q)
        larger, one = norm > self._limit, norm * 0.0 + 1.0
        shrink = self._limit / (norm + NO_ZERO)
        lost = xp.sum(d * q) * shrink / (norm + NO_ZERO) * (2.0 / xp.where(larger, norm, one))
        return d * xp.where(larger, shrink, one) - q * xp.where(larger, lost, norm * 0.0)

    @property
    def _limit(self) -> float | None:
        return self.cayley_neumann_eps if self.use_cayley_neumann else None

    def _norm(self, q: Array) -> Array:
        """|Q|: every number stands in it twice."""
        xp = namespace(q)
        return xp.sqrt(2.0 * xp.sum(q * q))
