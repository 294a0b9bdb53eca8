"""AdaMSS: the rows of a weight that point alike get an update of their own, in the few directions the weight already has.

    [W' | b'] = [W | b] + dW      dW at the rows of subspace i:  B_i A_i N

    N (r, in + 1), in on a layer without a bias: the first right singular vectors of [W | b].  r is at most out and the columns of N
    A_i (r_i, r)    B_i (n_i, r_i)    n_i rows are in subspace i, r_i = min(n_i, subspace_rank)

For a gradient G of dW, with G_i its rows of subspace i:  dB_i = G_i N^T A_i^T    dA_i = B_i^T G_i N^T.  N is not trained.
B_i starts at zero, so a fresh adapter changes nothing. A_i starts as the first right singular vectors of the rows of U in subspace i.
Which subspaces stay trained is `adamss_asa`.

Paper   PEFT names none
HF      peft.AdamssConfig, on linear layers. It clusters the rows of U by sklearn's k-means, and neither saves the clusters nor takes them
        from a file: it makes them again from the frozen weight. Here `clusters` says of every row which subspace it is in, as PEFT's
        seg_result does; without it neighbouring rows are together, which is a start of ours alone. `ranks` is r_i where
        use_dynamic_rank counted singular values. The bias is no argument of `init`: N's last column is zero there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, column, integers, namespace, thin_svd, to, zeros_like
from peft_ref.contracts import Additive, Delta, Key, Start
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.ranges import one_of, positive

MOST = 16  # subspaces

_NAMED: Any = NamedTuple  # mypy reads no list that is not written out: to it the fields are not known
Params: Any = _NAMED(
    "Params",
    [
        ("N", Annotated[Array, "r columns", Key("adamss_newB", trained=False)]),
        *(
            (f"{end}{i}", Annotated[Array, shape.format(i), Key(f"adamss_{end}.{i}", when=f"subspaces > {i}")])
            for end, shape in (("A", "rank{0} r"), ("B", "rows{0} rank{0}"))
            for i in range(MOST)
        ),
    ],
)


@final
@dataclass(frozen=True, kw_only=True)
class AdaMSS(Additive[Any]):
    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    init_weights: bool | str | None = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0
    clusters: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    peft_type: ClassVar[str] = "ADAMSS"
    tuner_prefix: ClassVar[str] = "adamss_"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        object.__setattr__(self, "clusters", tuple(self.clusters))  # JSON has lists
        object.__setattr__(self, "ranks", tuple(self.ranks))
        positive(self, "r", "num_subspaces", "subspace_rank")
        if self.num_subspaces > MOST:
            raise ConfigError(f"num_subspaces={self.num_subspaces}: at most {MOST} here.")
        one_of(self, "init_weights", "orthogonal", None, False)
        there = set(self.clusters)
        if there != set(range(len(there))) or len(there) > MOST:
            raise ConfigError(f"clusters={self.clusters}: the subspaces are numbered from 0, none is empty, and there are at most {MOST}.")
        if self.use_asa:
            self._check_schedule()

    def _check_schedule(self) -> None:
        positive(self, "mask_interval", "asa_target_subspaces", "asa_schedule_exponent")
        if self.init_warmup >= self.final_warmup:
            raise ConfigError(f"init_warmup={self.init_warmup} is not before final_warmup={self.final_warmup} (HF PEFT refuses it too).")

    def rows(self, layer: Layer) -> list[list[int]]:
        """The rows of every subspace."""
        out = layer.shape[0]
        count = min(self.num_subspaces, out)
        of = self.clusters or tuple(row * count // out for row in range(out))
        return [[row for row in range(out) if of[row] == i] for i in range(max(of) + 1)]

    def columns(self, layer: Layer) -> int:
        return layer.shape[1] + (1 if layer.bias else 0)

    def dims(self, layer: Layer) -> dict[str, int]:
        rows, columns = self.rows(layer), self.columns(layer)
        sizes = {f"rows{i}": len(own) for i, own in enumerate(rows)}
        ranks = {f"rank{i}": self.ranks[i] if self.ranks else min(len(own), self.subspace_rank) for i, own in enumerate(rows)}
        there = {f"subspaces > {i}": int(len(rows) > i) for i in range(MOST)}
        return {"r": min(self.r, layer.shape[0], columns), "columns": columns, **sizes, **ranks, **there}

    def check_geometry(self, layer: Layer) -> None:
        if self.clusters and len(self.clusters) != layer.shape[0]:
            raise ConfigError(
                f"AdaMSS: clusters has {len(self.clusters)} numbers for a layer of {layer.shape[0]} outputs: it needs one each.\n"
                "  They are PEFT's layer.seg_result, turned round."
            )
        if self.ranks and len(self.ranks) != len(self.rows(layer)):
            raise ConfigError(f"AdaMSS: {len(self.ranks)} ranks for {len(self.rows(layer))} subspaces: one each.")
        dims = self.dims(layer)
        if any(dims[f"rank{i}"] > dims["r"] for i in range(len(self.rows(layer)))):
            raise UnsupportedLayerError(
                f"AdaMSS: a subspace of rank {self.subspace_rank} in only {dims['r']} directions of a weight {layer.shape}"
                " (HF PEFT makes factors that do not fit)."
            )

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        """Whether the layer has a bias no tensor tells: it is taken for one that has."""
        rows = [shape[0] for key, shape in shapes.items() if key.startswith("adamss_B.") and len(shape) == 2]
        directions = shapes.get("adamss_newB", ())
        if not rows or len(directions) != 2:
            return None
        return Linear(in_features=directions[1] - 1, out_features=sum(rows))

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Any]:
        xp, rows, r = namespace(W), self.rows(layer), self.dims(layer)["r"]
        seen = xp.concat([W, zeros_like((W.shape[0], 1), W)], axis=1) if layer.bias else W
        U, _, V = thin_svd(seen)
        signs = _upright(V)
        U, V = U * xp.matrix_transpose(signs), V * signs
        values = {"N": V[:r, :]}
        for i, own in enumerate(rows):
            rank = self.dims(layer)[f"rank{i}"]
            directions = thin_svd(_take(U[:, :r], own))[2]
            values[f"A{i}"] = (directions * _upright(directions))[:rank, :]
            zero = self.init_weights == "orthogonal"
            values[f"B{i}"] = zeros_like((len(own), rank), W) if zero else to(0.01 * rng.normal(size=(len(own), rank)), W)
        return Start(self.to_params(**values), W)

    def delta(self, layer: Layer, p: Any) -> Delta:
        rows = self.rows(layer)
        parts = [getattr(p, f"B{i}") @ (getattr(p, f"A{i}") @ p.N) for i in range(len(rows))]
        order = [row for own in rows for row in own]
        whole = _take(namespace(p.N).concat(parts), [order.index(row) for row in range(len(order))])
        return Delta(whole[:, :-1], whole[:, -1]) if layer.bias else Delta(whole)

    def delta_vjp(self, layer: Layer, p: Any, d: Delta) -> Any:
        xp, mT = namespace(d.W), namespace(d.W).matrix_transpose
        beside = [] if not layer.bias else [zeros_like((d.W.shape[0], 1), d.W) if d.b is None else column(d.b)]
        seen = xp.concat([d.W, *beside], axis=1) @ mT(p.N)
        grads: dict[str, Array] = {}
        for i, own in enumerate(self.rows(layer)):
            A, B, G = getattr(p, f"A{i}"), getattr(p, f"B{i}"), _take(seen, own)
            grads |= {f"A{i}": mT(B) @ G, f"B{i}": G @ mT(A)}
        return self.to_params(**grads)


def _upright(V: Array) -> Array:
    """The signs (rows, 1) that make the sums of V's rows positive: singular vectors have none of their own, and every library others."""
    xp = namespace(V)
    sums = xp.sum(V, axis=1, keepdims=True)
    one = sums * 0.0 + 1.0
    return xp.where(sums >= 0.0, one, -one)


def _take(X: Array, rows: Sequence[int]) -> Array:
    return namespace(X).take(X, integers(np.asarray(rows), X), axis=0)
