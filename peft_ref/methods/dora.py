"""DoRA: LoRA gives the direction of every row of the weight, a learned magnitude its length.

    V = W + s B A      n = the row norms of W0 + s B A      W' = (m / n) V      b' = b

    A (r, in)    B (out, r)    m (out,)    s as in LoRA

W0 is the frozen weight, W what an earlier adapter made of it: with one adapter they are the same.  With n held constant, a gradient G of
W' gives   dm = sum_j (G V)_ij / n_i    dV = (m / n) G    dA = s B^T dV    dB = s dV A^T.
m starts at the norms of W + s B A, so with B = 0 a fresh adapter changes nothing.

Paper   Liu et al. 2024, arXiv:2402.09353; section 4.3 holds n constant in the gradient, and so does HF
HF      peft.LoraConfig(use_dora=True). The norm of several adapters is measured at W0. On grouped convolutions HF computes the norm of a
        wrongly reshaped product: refused here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, column, namespace, row_norm
from peft_ref.contracts import Factors, Key, Reweight, Scaled, Start, Turned, WeightGradients, WeightMap, conv_key
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Layer
from peft_ref.methods import lora
from peft_ref.methods.lora_init import check_init, check_rank, initial_factors, scaling


class Params(NamedTuple):
    A: Annotated[
        Array,
        "r in",
        Key("lora_A.weight", kinds=lora.LINEAR),
        Key("lora_embedding_A", kinds=lora.TABLE),
        conv_key("lora_A.weight", "r channels *k"),
    ]
    B: Annotated[
        Array,
        "out r",
        Key("lora_B.weight", kinds=lora.LINEAR),
        Key("lora_embedding_B", kinds=lora.TABLE),
        conv_key("lora_B.weight", "out r *1"),
    ]
    m: Annotated[Array, "out", Key("lora_magnitude_vector"), conv_key("lora_magnitude_vector", "1 out *1")]


def with_magnitudes(method: DoRA, start: Start[lora.Params]) -> Start[Params]:
    """The start of a DoRA whose factors were made like LoRA's: of data, or by a quantiser."""
    A, B = start.params.A, start.params.B
    return Start(Params(A, B, row_norm(start.W + method.scale * (B @ A))), start.W)


@final
@dataclass(frozen=True, kw_only=True)
class DoRA(Reweight[Params]):
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True

    peft_type: ClassVar[str] = "LORA"
    flag: ClassVar[str | None] = "use_dora"
    tuner_prefix: ClassVar[str] = "lora_"
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    dropout: ClassVar[str | None] = "lora_dropout"
    by_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rank(self)

    @property
    def scale(self) -> float:
        return scaling(self.r, self.lora_alpha, self.use_rslora)

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r}

    def check_geometry(self, layer: Layer) -> None:
        check_init(self, layer)
        if layer.groups > 1:
            raise UnsupportedLayerError(
                f"DoRA on a convolution with groups={layer.groups}: HF PEFT computes the norm of a wrongly reshaped"
                " product there, so there is nothing right to compare with."
            )

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        A, B, W = initial_factors(layer, W, self.r, self.scale, self.init_lora_weights, rng)
        return Start(Params(A, B, row_norm(W + self.scale * (B @ A))), W)

    def weight(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return column(p.m / self._norm(p, W0)) * (W + self._delta(p)), b

    def weight_vjp(
        self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array, dW: Array, db: Array | None
    ) -> WeightGradients[Params]:
        xp, n = namespace(dW), self._norm(p, W0)
        dm = xp.sum(dW * (W + self._delta(p)), axis=1) / n
        dV = column(p.m / n) * dW
        dA = self.scale * (xp.matrix_transpose(p.B) @ dV)
        dB = self.scale * (dV @ xp.matrix_transpose(p.A))
        return WeightGradients(Params(dA, dB, dm), dV, db)

    def product(self, layer: Layer, p: Params) -> Scaled:
        return Scaled(p.m, factors=Factors(self.scale * p.B, p.A), unit=True)

    def product_vjp(self, layer: Layer, p: Params, d: Scaled | Turned) -> Params:
        assert isinstance(d, Scaled)
        assert d.factors is not None
        return Params(A=d.factors.A, B=self.scale * d.factors.B, m=d.rows)

    def unmerge(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return W / column(p.m / self._norm(p, W0)) - self._delta(p), b

    def differentiated(self, layer: Layer, p: Params, W0: Array) -> WeightMap[Params]:
        n = self._norm(p, W0)
        return lambda q, W, b: (column(q.m / n) * (W + self._delta(q)), b)

    def _delta(self, p: Params) -> Array:
        return self.scale * (p.B @ p.A)

    def _norm(self, p: Params, W0: Array) -> Array:
        return row_norm(W0 + self._delta(p))
