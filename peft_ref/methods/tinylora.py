"""TinyLoRA: one small vector mixes fixed random matrices, and those act between the largest singular directions of the frozen weight.

    M' = M + B R A        R = v_1 P_1 + ... + v_u P_u

    M   the weight as its layer stores it: W (out, in); of an embedding the table, a row per token
    v (u,), trained, one for a group of layers         P (u, r, r), random, every layer's own        r is at most M's rows and columns
    A (r, columns of M)   B (rows of M, r)   of the frozen M = U diag(S) V^T:  A = diag(S_r)^1/2 V_r^T,  B = U_r diag(S_r)^1/2

For a gradient G of M':   dR = B^T G A^T,   dv_k = the sum of P_k * dR.   P, A and B are not trained, and a group's dv is the sum over its
layers. A fresh v is zero, so a fresh adapter changes nothing. The n layers make max(1, round(n (1 - weight_tying))) groups, of
neighbours, as large as they go into n whole; what is left over is in the last one.

Paper   Learning to Reason in 13 Parameters: arXiv:2602.04118
HF      peft.TinyLoraConfig, on linear layers, Conv1D and embeddings. No scale. P is drawn by torch from projection_seed plus the layer's
        place among the adapted ones, and is in a file only with save_projection; A and B always are, so the signs of singular
        vectors, which every library has others of, travel with it. In training its dropout reaches B's rows on an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, column, namespace, thin_svd, to, zeros_like
from peft_ref.contracts import Additive, Delta, Key, Start
from peft_ref.layers import Layer
from peft_ref.methods.torch_draws import Generator, Host
from peft_ref.ranges import one_of, positive, probability, share

KINDS = frozenset({"linear", "transposed_linear", "embedding"})


class Params(NamedTuple):
    v: Annotated[Array, "u", Key("tinylora_v", kinds=KINDS, shared=True)]
    P: Annotated[Array, "u r r", Key("tinylora_P", kinds=KINDS, trained=False, saved="save_projection")]
    A: Annotated[Array, "r columns", Key("tinylora_A", kinds=KINDS, trained=False)]
    B: Annotated[Array, "rows r", Key("tinylora_B", kinds=KINDS, trained=False)]


@final
@dataclass(frozen=True, kw_only=True)
class TinyLoRA(Additive[Params]):
    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    init_weights: bool | str = True

    peft_type: ClassVar[str] = "TINYLORA"
    tuner_prefix: ClassVar[str] = "tinylora_"
    dropout: ClassVar[str | None] = "tinylora_dropout"
    kinds: ClassVar[frozenset[str]] = KINDS
    counts_layers: ClassVar[bool] = True
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        positive(self, "r", "u")
        share(self, "weight_tying")
        probability(self, "tinylora_dropout")
        one_of(self, "init_weights", True, False, "uniform")

    def dims(self, layer: Layer) -> dict[str, int]:
        rows, columns = layer.shape[::-1] if layer.kind == "embedding" else layer.shape
        return {"r": min(self.r, rows, columns), "u": self.u, "rows": rows, "columns": columns}

    def shared_keys(self, modules: Sequence[str]) -> dict[str, dict[str, str]]:
        return {name: {"v": f"tinylora_v.{group}"} for name, group in zip(modules, self.groups(len(modules)), strict=True)}

    def groups(self, n: int) -> list[int]:
        """Which vector each of n layers has."""
        count = max(1, round(n * (1.0 - self.weight_tying)))
        size = max(1, n // count)
        return [min(place // size, count - 1) for place in range(n)]

    def common(self, layers: Mapping[str, Layer], weights: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Params]:
        vectors: dict[str, Array] = {}
        keys, made = self.shared_keys(tuple(layers)), {}
        for place, (name, layer) in enumerate(layers.items()):
            key, like = keys[name]["v"], weights[name]
            if key not in vectors:
                vectors[key] = self._vector(like, rng)
            P = projections(self.projection_seed + place, self.u, self.dims(layer)["r"])
            made[name] = self.to_params(v=vectors[key], P=to(P, like))
        return made

    def _vector(self, like: Array, rng: np.random.Generator) -> Array:
        if self.init_weights is True:
            return zeros_like((self.u,), like)
        return to(rng.uniform(-self.init_v_bound, self.init_v_bound, self.u), like)

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        return self.start_alone(layer, W, rng)

    def start(self, layer: Layer, W: Array, rng: np.random.Generator, common: Params | None) -> Start[Params]:
        assert common is not None
        xp, r = namespace(W), self.dims(layer)["r"]
        U, S, V = thin_svd(_stored(layer, W))
        root = xp.sqrt(S[:r])
        return Start(common._replace(A=column(root) * V[:r, :], B=U[:, :r] * root), W)

    def delta(self, layer: Layer, p: Params) -> Delta:
        return Delta(_stored(layer, p.B @ mixed(p.v, p.P) @ p.A))

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        xp, mT = namespace(d.W), namespace(d.W).matrix_transpose
        dR = mT(p.B) @ _stored(layer, d.W) @ mT(p.A)
        return self.to_params(v=_flat(p.P) @ xp.reshape(dR, (-1,)))


def _stored(layer: Layer, W: Array) -> Array:
    """The matrix as its layer stores it; and back."""
    return namespace(W).matrix_transpose(W) if layer.kind == "embedding" else W


def _flat(P: Array) -> Array:
    return namespace(P).reshape(P, (P.shape[0], P.shape[1] * P.shape[2]))


def mixed(v: Array, P: Array) -> Array:
    """R (r, r)."""
    return namespace(v).reshape(v @ _flat(P), P.shape[1:])


def projections(seed: int, u: int, r: int) -> Host:
    """P (u, r, r) as torch draws it: normal, of deviation 1 / sqrt r."""
    return Generator(seed).normal((u, r, r), 0.0, 1.0 / math.sqrt(r))
