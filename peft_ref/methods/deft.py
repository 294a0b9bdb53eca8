"""DEFT: take out of a frozen weight what lies in a few output directions, and put something learned there.

    W' = W + Q (s R - V^T W)        b' = b        s = alpha / r, or 1 where alpha is None or 0

    P (out, r)    R (r, in)    r is at most out
    Q = V = the Q of P = Q U, U upper triangular       decomposition_method "qr": W' = (I - Q Q^T) W + s Q R, without a rest of W in Q
    Q = P,  V = relu(P)                                "relu"
    W' = W - Q V^T W                                   with para, which has no R

For a gradient G of W', with T = s R - V^T W and H = Q^T G:  dQ = G T^T,  dR = s H,  dV = -W H^T;  then dP = dQ + relu'(P) * dV, or that
of Gram and Schmidt for dQ + dV.  The signs of Q's columns are LAPACK's: a column and the row of R beside it may not change sign alone.
P is drawn, and R starts as V^T W / s, so that a fresh adapter changes nothing; with para it takes away from the start.
All is computed from the frozen W: several adapters add up.

Paper   none is named; para is PaRa
HF      peft.DeftConfig, on linear layers and Conv1D. It computes in float32 whatever the weight is. Its dropout reaches x R^T alone, not
        what is taken out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.activations import relu, relu_vjp
from peft_ref.arrays import Array, namespace, to
from peft_ref.conditioned import Conditioned
from peft_ref.contracts import Delta, Key, Start
from peft_ref.layers import Layer
from peft_ref.methods.normals import columns, diagonal_signs, orthonormal, orthonormal_vjp
from peft_ref.ranges import one_of, positive

KINDS = frozenset({"linear", "transposed_linear"})
DEVIATION = 0.02


class Params(NamedTuple):
    P: Annotated[Array, "out r", Key("deft_P", kinds=KINDS)]
    R: Annotated[Array, "r in", Key("deft_R", kinds=KINDS, when="not para")]


@final
@dataclass(frozen=True, kw_only=True)
class DEFT(Conditioned[Params]):
    r: int = 8
    decomposition_method: str = "relu"
    init_scale: float = 1.0
    alpha: float | None = None
    para: bool = False
    init_weights: bool = True

    peft_type: ClassVar[str] = "DEFT"
    tuner_prefix: ClassVar[str] = "deft_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        positive(self, "r")
        one_of(self, "decomposition_method", "relu", "qr")

    def scale(self, r: int) -> float:
        return self.alpha / r if self.alpha else 1.0

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": min(self.r, layer.shape[0]), "not para": int(not self.para)}

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        (out, n_in), r = layer.shape, self.dims(layer)["r"]
        P = to(rng.normal(0.0, DEVIATION, (out, r)), W)
        if self.para:
            return Start(self.to_params(P=P), W)
        if not self.init_weights:
            return Start(Params(P, to(rng.normal(0.0, DEVIATION * self.init_scale, (r, n_in)), W)), W)
        _, V = self._projection(P)
        return Start(Params(P, namespace(W).matrix_transpose(V) @ W / self.scale(r)), W)

    def change(self, layer: Layer, p: Params, W0: Array, b0: Array | None) -> Delta:
        Q, V = self._projection(p.P)
        return Delta(Q @ self._exchanged(p, V, W0))

    def change_vjp(self, layer: Layer, p: Params, W0: Array, b0: Array | None, d: Delta) -> tuple[Params, Array | None]:
        mT, (Q, V) = namespace(W0).matrix_transpose, self._projection(p.P)
        H = mT(Q) @ d.W
        dQ, dV = d.W @ mT(self._exchanged(p, V, W0)), -(W0 @ mT(H))
        dP = self._projection_vjp(p.P, dQ, dV)
        return self.to_params(P=dP, R=None if self.para else self.scale(p.P.shape[1]) * H), None

    def _exchanged(self, p: Params, V: Array, W0: Array) -> Array:
        """What comes in less what goes out (r, in)."""
        out = namespace(W0).matrix_transpose(V) @ W0
        return -out if self.para else self.scale(p.P.shape[1]) * p.R - out

    def _projection(self, P: Array) -> tuple[Array, Array]:
        if self.decomposition_method == "relu":
            return P, relu(P)
        vectors = columns(P)
        Q = namespace(P).stack([n * s for n, s in zip(orthonormal(vectors), diagonal_signs(vectors), strict=True)], axis=1)
        return Q, Q

    def _projection_vjp(self, P: Array, dQ: Array, dV: Array) -> Array:
        if self.decomposition_method == "relu":
            return dQ + relu_vjp(P, dV)
        vectors, dnormals = columns(P), columns(dQ + dV)
        signed = [dn * s for dn, s in zip(dnormals, diagonal_signs(vectors), strict=True)]
        return namespace(P).stack(orthonormal_vjp(vectors, signed), axis=1)
