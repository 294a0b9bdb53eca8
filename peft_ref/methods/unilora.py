"""Uni-LoRA: every number of every LoRA factor of the model is one of a few trained numbers, times a fixed scale.

    W' = W + B A        A = theta[i_A] * s_A  (r, in)        B = theta[i_B] * s_B  (out, r)

    theta (D,), trained, one for all layers        i: which of its numbers        s = 1 / sqrt(how often that one is used in the model)

So the map from theta to all factors together is an isometry. The places are dealt out over all layers at once, as evenly as can be: module
by module, A before B, row by row.  For a gradient G of W':  dA = B^T G,  dB = G A^T,  dtheta_k = sum of s dA where i_A is k, and of s dB.
No factor starts at zero: a fresh adapter is near the identity and not it.

Paper   Uni-LoRA 2025, arXiv:2506.00799
HF      peft.UniLoraConfig, on linear layers and Conv1D. No scale alpha / r. Places come from NumPy's default_rng(proj_seed), and are in a
        file only with save_indices; without it a file holds theta alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, integers, namespace, one_hot, to
from peft_ref.contracts import Additive, Delta, Key, Start
from peft_ref.layers import Layer
from peft_ref.ranges import positive, probability

KINDS = frozenset({"linear", "transposed_linear"})


class Params(NamedTuple):
    theta: Annotated[Array, "length", Key("unilora_theta_d", kinds=KINDS, shared=True)]
    indices_A: Annotated[Array, "r in", Key("unilora_indices_A", kinds=KINDS, trained=False, saved="save_indices")]
    indices_B: Annotated[Array, "out r", Key("unilora_indices_B", kinds=KINDS, trained=False, saved="save_indices")]
    scales_A: Annotated[Array, "r in", Key("unilora_scales_A", kinds=KINDS, trained=False, saved="save_indices")]
    scales_B: Annotated[Array, "out r", Key("unilora_scales_B", kinds=KINDS, trained=False, saved="save_indices")]


@final
@dataclass(frozen=True, kw_only=True)
class UniLoRA(Additive[Params]):
    r: int = 4
    theta_d_length: int = 256
    proj_seed: int = 42
    unilora_dropout: float = 0.0
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False

    peft_type: ClassVar[str] = "UNILORA"
    tuner_prefix: ClassVar[str] = "unilora_"
    dropout: ClassVar[str | None] = "unilora_dropout"
    kinds: ClassVar[frozenset[str]] = KINDS
    counts_layers: ClassVar[bool] = True
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        positive(self, "r", "theta_d_length")
        probability(self, "unilora_dropout")

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r, "length": self.theta_d_length}

    def common(self, layers: Mapping[str, Layer], weights: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Params]:
        if not layers:
            return {}
        like, bound = weights[next(iter(layers))], self.init_theta_d_bound
        theta = to(rng.uniform(-bound, bound, self.theta_d_length) if self.init_weights else rng.normal(size=self.theta_d_length), like)
        shapes = {name: ((self.r, layer.shape[1]), (layer.shape[0], self.r)) for name, layer in layers.items()}
        places = dealt(sum(math.prod(shape) for pair in shapes.values() for shape in pair), self.theta_d_length, self.proj_seed)
        used = np.bincount(places)
        scales = 1 / np.sqrt(np.maximum(used, 1).astype(np.float32))
        made, at = {}, 0
        for name, pair in shapes.items():
            parts: list[Array] = []
            for shape in pair:
                parts.append(places[at : at + math.prod(shape)].reshape(shape))
                at += math.prod(shape)
            indices, factors = [integers(i, like) for i in parts], [to(scales[i], like) for i in parts]
            made[name] = Params(theta, *indices, *factors)
        return made

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        return self.start_alone(layer, W, rng)

    def start(self, layer: Layer, W: Array, rng: np.random.Generator, common: Params | None) -> Start[Params]:
        assert common is not None
        return Start(common, W)

    def delta(self, layer: Layer, p: Params) -> Delta:
        return Delta(_picked(p.theta, p.indices_B, p.scales_B) @ _picked(p.theta, p.indices_A, p.scales_A))

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        mT = namespace(d.W).matrix_transpose
        A, B = _picked(p.theta, p.indices_A, p.scales_A), _picked(p.theta, p.indices_B, p.scales_B)
        dA, dB = mT(B) @ d.W, d.W @ mT(A)
        return self.to_params(theta=_put_back(p.theta, p.indices_A, p.scales_A * dA) + _put_back(p.theta, p.indices_B, p.scales_B * dB))


def dealt(count: int, length: int, seed: int) -> np.ndarray[Any, Any]:
    """Which of `length` numbers each of `count` places gets: all equally often, some chosen ones once more, and then shuffled."""
    rng = np.random.default_rng(seed)
    each, rest = divmod(count, length)
    every = np.concat([np.repeat(np.arange(length), each), rng.choice(length, size=rest, replace=False)])
    rng.shuffle(every)
    return every


def _picked(theta: Array, indices: Array, scales: Array) -> Array:
    xp = namespace(theta)
    return xp.reshape(xp.take(theta, xp.reshape(indices, (-1,))), tuple(indices.shape)) * scales


def _put_back(theta: Array, indices: Array, d: Array) -> Array:
    """The transpose of picking: every number's sum over the places that it went to."""
    xp = namespace(theta)
    return xp.reshape(d, (-1,)) @ one_hot(indices, theta.shape[0], theta)
