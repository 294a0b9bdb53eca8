"""OSF: train the small singular directions of the frozen weight, and keep every step away from the large ones.

    W' = W + U diag(S) V - U_0 diag(S_0) V_0      so W' = W_high + U diag(S) V

    W = U_w diag(S_w) V_w, singular values from large to small: the first k of them are the high part, kept as they are; the rest,
    l = min(out, in) - k, are U_0 (out, n), S_0 (l,), V_0 (l, in), and the start of U, S and V.  So a fresh adapter changes nothing.

For a gradient G of W':  dS = column sums of U * (G V^T),  and of U and V the part that leaves the high subspace alone:
    dU = P (G V^T diag(S))        P = I - U_high U_high^T, where U_w is square as U_0 U_0^T, which is the same
    dV = (diag(S) U^T G) P'       P' = I - V_high^T V_high, where V_w is square as V_0^T V_0
On purpose that is not the derivative.

HF      peft.OSFConfig, which names no paper, on linear layers. No file holds the frozen parts: they are worked out again from the frozen
        weight, in float32. Its forward pass knows the first of several adapters only, and it cannot unmerge; here each adds what it adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, namespace, thin_svd, to
from peft_ref.contracts import Additive, Delta, Key, Start, WeightMap
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Layer
from peft_ref.ranges import positive


class Params(NamedTuple):
    U: Annotated[Array, "out low", Key("osf_svd_params.U_low")]
    S: Annotated[Array, "low", Key("osf_svd_params.S_low")]
    V: Annotated[Array, "low in", Key("osf_svd_params.V_low")]
    U_0: Annotated[Array, "out low", Key("_osf_U_low_init", trained=False, derived=True)]
    S_0: Annotated[Array, "low", Key("_osf_S_low_init", trained=False, derived=True)]
    V_0: Annotated[Array, "low in", Key("_osf_V_low_init", trained=False, derived=True)]
    U_high: Annotated[Array, "out high", Key("_osf_U_high", when="tall", trained=False, derived=True)]
    V_high: Annotated[Array, "high in", Key("_osf_V_high", when="wide", trained=False, derived=True)]


@final
@dataclass(frozen=True, kw_only=True)
class OSF(Additive[Params]):
    effective_rank: int | float | None = None
    init_weights: bool = True

    peft_type: ClassVar[str] = "OSF"
    tuner_prefix: ClassVar[str] = "osf_"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        k = self.effective_rank
        if isinstance(k, bool) or not isinstance(k, int | float | None):
            raise ConfigError(f"effective_rank={k!r} is of type {type(k).__name__}, expected int, float or null.")
        positive(self, "effective_rank")

    def high(self, layer: Layer) -> int:
        """How many singular directions are kept: a number of them, a share of the smaller side, or half of it."""
        smaller, k = min(layer.shape), self.effective_rank
        if k is None:
            return smaller // 2
        return min(int(smaller * k) if isinstance(k, float) and k <= 1 else int(k), smaller)

    def check_geometry(self, layer: Layer) -> None:
        if self.high(layer) <= 0:
            raise UnsupportedLayerError(
                f"OSF: effective_rank={self.effective_rank} keeps none of the {min(layer.shape)} singular directions of a weight"
                f" {layer.shape} (HF PEFT refuses it too).\n  Keep at least one."
            )

    def dims(self, layer: Layer) -> dict[str, int]:
        out, n_in = layer.shape
        high = self.high(layer)
        return {"high": high, "low": min(out, n_in) - high, "tall": int(out > n_in), "wide": int(out < n_in)}

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        (out, n_in), k = layer.shape, self.high(layer)
        U, S, V = thin_svd(W)
        low, n = (U[:, k:], S[k:], V[k:, :]), S.shape[0] - k
        if not self.init_weights:
            drawn = rng.normal(size=(out, n)), rng.normal(size=n), rng.normal(size=(n, n_in))
            low = to(drawn[0], W), to(drawn[1], W), to(drawn[2], W)
        frozen = {"U_0": U[:, k:], "S_0": S[k:], "V_0": V[k:, :]}
        beside = {"U_high": U[:, :k]} if out > n_in else {"V_high": V[:k, :]} if out < n_in else {}
        return Start(self.to_params(U=low[0], S=low[1], V=low[2], **frozen, **beside), W)

    def delta(self, layer: Layer, p: Params) -> Delta:
        return Delta((p.U * p.S) @ p.V - (p.U_0 * p.S_0) @ p.V_0)

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        xp = namespace(d.W)
        dUS, dV = d.W @ xp.matrix_transpose(p.V), xp.matrix_transpose(p.U * p.S) @ d.W
        return self.to_params(U=self._left(p, dUS * p.S), S=xp.sum(dUS * p.U, axis=0), V=self._right(p, dV))

    def differentiated(self, layer: Layer, p: Params, W0: Array) -> WeightMap[Params]:
        def moved(q: Params) -> Params:
            return q._replace(U=p.U + self._left(p, q.U - p.U), V=p.V + self._right(p, q.V - p.V))

        return lambda q, W, b: self.weight(layer, moved(q), W, b, W0)

    def _left(self, p: Params, d: Array) -> Array:
        """P d."""
        mT = namespace(d).matrix_transpose
        return p.U_0 @ (mT(p.U_0) @ d) if p.U_high is None else d - p.U_high @ (mT(p.U_high) @ d)

    def _right(self, p: Params, d: Array) -> Array:
        """d P'."""
        mT = namespace(d).matrix_transpose
        return (d @ mT(p.V_0)) @ p.V_0 if p.V_high is None else d - (d @ mT(p.V_high)) @ p.V_high
