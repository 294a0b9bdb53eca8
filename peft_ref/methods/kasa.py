"""KaSA: LoRA with learned singular values between its factors, on a frozen weight without its smallest ones.

    W' = W + s B diag(d) A      s = alpha / r,  or alpha / sqrt(r) with use_rslora

    A (r, in)    B (out, r)    d (r,)

For a gradient G of W', with H = s B^T G:   dA = diag(d) H    dd_k = sum_j A_kj H_kj    dB = s G (diag(d) A)^T.
At the start the frozen weight loses its r smallest singular values for good, B is zero and d standard normal.

Two penalties may be added to the loss; they ask A and B to be singular vectors, and d to be small:
    L = beta |d|^2 + gamma (|B^T B - 1| + |A A^T - 1|),   |.| Frobenius's norm, summed over all modules
    dd = 2 beta d    dB = 2 gamma B M / |M|, M = B^T B - 1    dA = 2 gamma M A / |M|, M = A A^T - 1,   nothing where M = 0

Paper   2024, arXiv:2412.06071, eq. 9 to 12
HF      peft.LoraConfig(kasa_config=...), for nn.Linear alone. The singular values are cut off in float32. The weight is not given back:
        neither disabling nor unmerging nor deleting the adapter does, and each further adapter cuts r more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, column, namespace, thin_svd, to
from peft_ref.contracts import Factors, Key, LowRank, Start
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Layer
from peft_ref.methods.lora_init import biased, check_bias, check_init, check_rank, initial_factors, scaled, scaling
from peft_ref.methods.orthogonality import distance, distance_vjp
from peft_ref.methods.submap import as_submap
from peft_ref.ranges import not_negative

KINDS = frozenset({"linear"})


class Params(NamedTuple):
    A: Annotated[Array, "r in", Key("lora_A.weight", kinds=KINDS)]
    B: Annotated[Array, "out r", Key("lora_B.weight", kinds=KINDS)]
    d: Annotated[Array, "r", Key("lora_diag", kinds=KINDS)]
    c: Annotated[Array | None, "out", Key("lora_B.bias", kinds=KINDS, when="lora_bias")] = None


@dataclass(frozen=True, kw_only=True)
class KasaConfig:
    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        not_negative(self, "beta", "gamma")


@final
@dataclass(frozen=True, kw_only=True)
class KaSA(LowRank[Params]):
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    kasa_config: KasaConfig = field(default_factory=KasaConfig)

    peft_type: ClassVar[str] = "LORA"
    flag: ClassVar[str | None] = "kasa_config"
    flag_value: ClassVar[bool | str | type] = KasaConfig
    tuner_prefix: ClassVar[str] = "lora_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    cuts_weight: ClassVar[bool] = True
    dropout: ClassVar[str | None] = "lora_dropout"

    def __post_init__(self) -> None:
        check_rank(self)
        check_bias(self)
        object.__setattr__(self, "kasa_config", as_submap(KasaConfig, "kasa_config", self.kasa_config))

    @property
    def scale(self) -> float:
        return scaling(self.r, self.lora_alpha, self.use_rslora)

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r}

    def check_geometry(self, layer: Layer) -> None:
        check_init(self, layer)
        if self.r >= min(layer.shape):
            raise UnsupportedLayerError(
                f"KaSA with r={self.r} on a weight {layer.shape}: cutting off {self.r} of {min(layer.shape)} singular values leaves none"
                " (HF PEFT refuses it too).\n  Use a smaller r."
            )

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        A, B, W = initial_factors(layer, W, self.r, self.scale, self.init_lora_weights, rng)
        return Start(biased(self, Params(A, B, to(rng.normal(size=self.r), W)), layer, W, rng), truncated(W, self.r))

    def factors(self, p: Params) -> Factors:
        return Factors(B=self.scale * p.B, A=column(p.d) * p.A, b=scaled(self.scale, p.c))

    def factors_vjp(self, p: Params, d: Factors) -> Params:
        return Params(A=column(p.d) * d.A, B=self.scale * d.B, d=namespace(d.A).sum(p.A * d.A, axis=1), c=scaled(self.scale, d.b))

    def penalty(self, params: Mapping[str, Params]) -> Array:
        """What is added to the loss, over all modules of a model."""
        beta, gamma = self.kasa_config.beta, self.kasa_config.gamma
        losses = []
        for p in params.values():
            xp = namespace(p.d)
            rows = distance(p.A) + distance(xp.matrix_transpose(p.B))
            losses.append(beta * xp.sum(p.d * p.d) + gamma * xp.reshape(rows, ()))
        return sum(losses[1:], start=losses[0])

    def penalty_vjp(self, params: Mapping[str, Params], d: Array | float) -> dict[str, Params]:
        """The gradient of `penalty`, given that of the loss for it."""
        beta, gamma = d * self.kasa_config.beta, d * self.kasa_config.gamma
        grads = {}
        for name, p in params.items():
            mT = namespace(p.B).matrix_transpose
            grads[name] = Params(A=gamma * distance_vjp(p.A), B=gamma * mT(distance_vjp(mT(p.B))), d=2 * beta * p.d)
        return grads


def truncated(W: Array, r: int) -> Array:
    """W (out, in) without its r smallest singular values."""
    U, S, Vh = thin_svd(W)
    kept = S.shape[0] - r
    return (U[:, :kept] * S[:kept]) @ Vh[:kept, :]
