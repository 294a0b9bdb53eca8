"""FRoD: write the frozen weight in a basis that the same layer of all blocks shares, and train its diagonal and a few entries beside it.

    W' = W + U (S + diag(L)) V^T - W0        alone: W' = U (S + diag(L)) V^T

    L (in,)   s (nnz,)   S is zero but for S[places[0, k], places[1, k]] = s[k], off the diagonal       trained, each layer's own
    V (in, in)   places (2, nnz)                                      not trained, one for all layers of a category
    U (out, in)  the columns of W0 V^-T, each divided by its length   not trained, in no file: worked out of W0 and V

For a gradient G of W':  dM = U^T G V (in, in),   dL_i = dM_ii,   ds_k = dM at place k.  A fresh L holds the lengths and a fresh s is zero,
so that U diag(L) V^T is W0 and a fresh adapter changes nothing, but for rounding.

V comes from the weights W_1, W_2, ... of a category, one below the other:
    fewer rows than columns    their right singular vectors, all `in` of them
    else, of their Q R         R^T E,   E the eigenvectors of the mean of (Q_i^T Q_i + regularization_alpha I)^-1, Q_i the rows of W_i
A category is the last two parts of a module's name, or the last alone below a number; its weights come in the order of the blocks.

Paper   doi.org/10.1609/aaai.v40i31.39813
HF      peft.FrodConfig, on linear layers and Conv1D. It works V out in float32, and U from its own V, whatever V the file then brings. Here
        U comes from the file's. nnz is int(in^2 sparse_rate), and the places are drawn by torch, category by category.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, integers, namespace, scattered, to, zeros_like
from peft_ref.conditioned import Conditioned
from peft_ref.contracts import Delta, Key, Start
from peft_ref.errors import ConfigError
from peft_ref.layers import Layer
from peft_ref.methods.frod_basis import basis, categories, places, solved
from peft_ref.ranges import probability, share

KINDS = frozenset({"linear", "transposed_linear"})


class Params(NamedTuple):
    L: Annotated[Array, "in", Key("frod_lambda_l", kinds=KINDS)]
    s: Annotated[Array, "nnz", Key("frod_lambda_s_values", kinds=KINDS)]
    V: Annotated[Array, "in in", Key("frod_V", kinds=KINDS, trained=False, shared=True, saved="save_projection")]
    places: Annotated[Array, "2 nnz", Key("frod_s_indices", kinds=KINDS, trained=False, shared=True, saved="save_projection")]
    size: Annotated[Array, "2", Key("frod_s_size", kinds=KINDS, trained=False, shared=True, saved="save_projection")]
    U: Annotated[Array, "out in", Key("frod_U", kinds=KINDS, trained=False, derived=True)]


@final
@dataclass(frozen=True, kw_only=True)
class FRoD(Conditioned[Params]):
    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: float = 0.0
    init_weights: bool = True
    sparse_rate: float = 0.01
    regularization_alpha: float = 1e-3

    peft_type: ClassVar[str] = "FROD"
    tuner_prefix: ClassVar[str] = "frod_"
    dropout: ClassVar[str | None] = "frod_dropout"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        share(self, "sparse_rate")
        probability(self, "frod_dropout")

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"nnz": self.count(layer.shape[1])}

    def count(self, n: int) -> int:
        beside = n * n - n
        count = min(int(n * n * self.sparse_rate), beside)
        return max(1, count) if self.sparse_rate > 0 and beside else count

    def shared_keys(self, modules: Sequence[str]) -> dict[str, dict[str, str]]:
        prefixes = {"V": "frod_V", "places": "frod_s_indices", "size": "frod_s_size"}
        return {
            name: {field: f"{prefix}.{category}" for field, prefix in prefixes.items()}
            for category, (own, _) in categories(modules).items()
            for name in own
        }

    def common(self, layers: Mapping[str, Layer], weights: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Params]:
        found, made = categories(tuple(layers)), {}
        for category, (names, read) in found.items():
            if len({layers[name].shape[1] for name in names}) > 1:
                raise ConfigError(
                    f"FRoD: the modules {names[0]!r} .. {names[-1]!r} share one V, being of the category {category!r}, and have different\n"
                    "  numbers of inputs (HF PEFT fails there). Adapt those of one size."
                )
            made[category] = basis([weights[name] for name in read], self.regularization_alpha)
        sizes = {category: layers[names[0]].shape[1] for category, (names, _) in found.items()}
        drawn = places(sizes, {category: self.count(n) for category, n in sizes.items()}, self.projection_prng_key)
        given = {
            category: self.to_params(V=V, places=integers(drawn[category], V), size=integers(np.full(2, sizes[category]), V))
            for category, V in made.items()
        }
        return {name: given[category] for category, (names, _) in found.items() for name in names}

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        return self.start_alone(layer, W, rng)

    def start(self, layer: Layer, W: Array, rng: np.random.Generator, common: Params | None) -> Start[Params]:
        assert common is not None
        U, lengths = solved(W, common.V)
        s = zeros_like((self.count(layer.shape[1]),), W)
        if not self.init_weights:
            s, lengths = (v + to(0.1 * rng.normal(size=v.shape), W) for v in (s, lengths))
        return Start(common._replace(L=lengths, s=s, U=U), W)

    def change(self, layer: Layer, p: Params, W0: Array, b0: Array | None) -> Delta:
        xp, n = namespace(W0), layer.shape[1]
        turned = p.U * p.L
        if p.s.shape[0]:
            turned = turned + p.U @ xp.reshape(scattered(p.s, _flat(p.places, n), n * n), (n, n))
        return Delta(turned @ xp.matrix_transpose(p.V) - W0)

    def change_vjp(self, layer: Layer, p: Params, W0: Array, b0: Array | None, d: Delta) -> tuple[Params, Array | None]:
        xp, n = namespace(d.W), layer.shape[1]
        seen = d.W @ p.V
        dM = xp.reshape(xp.matrix_transpose(p.U) @ seen, (n * n,))
        return self.to_params(L=xp.sum(p.U * seen, axis=0), s=xp.take(dM, _flat(p.places, n))), None


def _flat(places: Array, n: int) -> Array:
    """Every place as one number, row by row."""
    at = namespace(places).astype(places, namespace(places).int64)
    return at[0, :] * n + at[1, :]
