"""PVeRA: VeRA whose inner numbers are drawn from a normal distribution, its mean and its variance both functions of the input.

    W' = W + diag(b) B_out diag(d_1) A_1        in evaluation: the mean alone

    b (out,)    d = (d_1, d_2) (2r,)    A = (A_1, A_2) (2r, widest in)    B (widest out, r);  A_in, B_out as in VeRA

In training a layer puts out   layer(x; W) + b * (B_out h),   h = m + e * exp(v / 2),   m = d_1 * (A_1 x),   v = d_2 * (A_2 x),   e noise,
which is no map of the weight: `sampled` has it, with the noise as an argument.
Of the mean, with H = (G A_1^T) * B_out:   db = H d_1    dd = (H^T b, 0).   A fresh b is zero.

Paper   PVeRA 2025, arXiv:2512.07703
HF      peft.PveraConfig, on linear layers and Conv1D. Noise with sample_at_inference too; a merge takes the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, NamedTuple, Self, final

import numpy as np

from peft_ref.arrays import Array, as_rows, column, namespace, to, zeros_like
from peft_ref.contracts import Additive, Delta, Key, Start
from peft_ref.layers import Layer
from peft_ref.methods.vera import projections
from peft_ref.methods.widths import check_widths, widest
from peft_ref.ranges import positive, probability

KINDS = frozenset({"linear", "transposed_linear"})


class Params(NamedTuple):
    b: Annotated[Array, "out", Key("pvera_lambda_b", kinds=KINDS)]
    d: Annotated[Array, "rows", Key("pvera_lambda_d", kinds=KINDS)]
    A: Annotated[Array, "rows widest_in", Key("pvera_A", kinds=KINDS, trained=False, shared=True, saved="save_projection")]
    B: Annotated[Array, "widest_out r", Key("pvera_B", kinds=KINDS, trained=False, shared=True, saved="save_projection")]


class Sampled(NamedTuple):
    params: Params
    x: Array


@final
@dataclass(frozen=True, kw_only=True)
class PVeRA(Additive[Params]):
    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    d_initial: float = 0.1
    init_weights: bool = True
    pvera_dropout: float = 0.0
    sample_at_inference: bool = False
    generator_seed: int | None = None
    widest_in: int | None = None  # of all adapted layers, as `spanning` finds them: no key of a configuration
    widest_out: int | None = None

    peft_type: ClassVar[str] = "PVERA"
    tuner_prefix: ClassVar[str] = "pvera_lambda_"
    dropout: ClassVar[str | None] = "pvera_dropout"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        positive(self, "r")
        probability(self, "pvera_dropout")

    def dims(self, layer: Layer) -> dict[str, int]:
        out, n_in = layer.shape
        return {"r": self.r, "rows": 2 * self.r, "widest_in": self.widest_in or n_in, "widest_out": self.widest_out or out}

    def check_geometry(self, layer: Layer) -> None:
        check_widths("PVeRA", layer, self.widest_in, self.widest_out)

    def spanning(self, layers: Mapping[str, Layer]) -> Self:
        out, n_in = widest(layers)
        return replace(self, widest_in=n_in, widest_out=out)

    def spanned_by(self, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        A, B = shapes.get("pvera_A", ()), shapes.get("pvera_B", ())
        return replace(self, widest_in=A[1], widest_out=B[0]) if len(A) == len(B) == 2 else self

    def common(self, layers: Mapping[str, Layer], weights: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Params]:
        if not layers:
            return {}
        like = weights[next(iter(layers))]
        out, n_in = widest(layers)
        drawn = projections(self.projection_prng_key, 2 * self.r, self.r, self.widest_in or n_in, self.widest_out or out)
        A, B = (to(matrix, like) for matrix in drawn)
        return dict.fromkeys(layers, self.to_params(A=A, B=B))

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        return self.start_alone(layer, W, rng)

    def start(self, layer: Layer, W: Array, rng: np.random.Generator, common: Params | None) -> Start[Params]:
        assert common is not None
        b, d = zeros_like((layer.shape[0],), W), zeros_like((2 * self.r,), W) + self.d_initial
        if not self.init_weights:
            b, d = b + 1, to(rng.normal(size=2 * self.r), W)
        return Start(common._replace(b=b, d=d), W)

    def delta(self, layer: Layer, p: Params) -> Delta:
        out, n_in = layer.shape
        return Delta((column(p.b) * p.B[:out, :]) @ (column(p.d[: self.r]) * p.A[: self.r, :n_in]))

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        xp = namespace(d.W)
        out, n_in = layer.shape
        H = (d.W @ xp.matrix_transpose(p.A[: self.r, :n_in])) * p.B[:out, :]
        mean = xp.sum(H * column(p.b), axis=0)
        return self.to_params(b=xp.sum(H * p.d[: self.r], axis=1), d=xp.concat([mean, zeros_like((self.r,), mean)]))

    def sampled(self, layer: Layer, p: Params, x: Array, noise: Array) -> Array:
        """What the adapter adds to the layer's output for x (.., in) with this noise (.., r)."""
        _, h = self._drawn(layer, p, x, noise)
        return p.b * (h @ namespace(h).matrix_transpose(p.B[: layer.shape[0], :]))

    def sampled_vjp(self, layer: Layer, p: Params, x: Array, noise: Array, dy: Array) -> Sampled:
        """The gradients of `sampled` for the parameters and for x."""
        xp, r, (out, n_in) = namespace(dy), self.r, layer.shape
        z, h = self._drawn(layer, p, x, noise)
        B = p.B[:out, :]
        dh = (dy * p.b) @ B
        dv = dh * noise * xp.exp(z[..., r:] * p.d[r:] / 2) / 2
        inner = xp.concat([dh, dv], axis=-1)
        db, dd = xp.sum(as_rows(dy * (h @ xp.matrix_transpose(B))), axis=0), xp.sum(as_rows(inner * z), axis=0)
        return Sampled(self.to_params(b=db, d=dd), (inner * p.d) @ p.A[:, :n_in])

    def _drawn(self, layer: Layer, p: Params, x: Array, noise: Array) -> tuple[Array, Array]:
        xp = namespace(x)
        z = x @ xp.matrix_transpose(p.A[:, : layer.shape[1]])
        both = z * p.d
        return z, both[..., : self.r] + noise * xp.exp(both[..., self.r :] / 2)
