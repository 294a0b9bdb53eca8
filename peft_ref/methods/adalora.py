"""AdaLoRA: low-rank factors with a diagonal between them, whose entries the training switches off where they matter least.

    W' = W + s B (E * A)      s = alpha / (init_r + 1e-5)

    A (r, in)    E (r, 1)    B (out, r)

Row k of A, entry k of E and column k of B are one triplet, a singular vector pair and its value. For a gradient G of W', with
H = s B^T G:   dA = E * H    dE_k = sum_j A_kj H_kj    dB = s G (E * A)^T.   A fresh E is zero, so a fresh adapter changes nothing.

Nothing makes A and B singular vectors but a penalty that is added to the loss:
    L = w / n  sum over the n factors of all modules of |M|,   M = A A^T - 1 or B^T B - 1,  |.| Frobenius's norm,
    dA = w / n  2 M A / |M|    dB = w / n  2 B M / |M|,   nothing where M = 0.
Which triplets stay is decided in `adalora_allocator.py`. Those that were pruned for good may be cut out: `live_r` is then the rank
that is left, and s stays what it was.

Paper   Zhang et al. 2023, arXiv:2303.10512, eq. 3 and 4; there the delta is unscaled and the penalty is squared
HF      peft.AdaLoraConfig. alpha is not divided by a rank in `scaling` but by init_r + 1e-5 in the layer; alpha <= 0 stands for init_r.
        init_lora_weights: every name means True. On grouped convolutions HF crashes: refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, namespace, to, zeros_like
from peft_ref.contracts import Factors, Key, LowRank, Start
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Layer
from peft_ref.methods.orthogonality import distance, distance_vjp
from peft_ref.ranges import not_negative, positive, probability

KINDS = frozenset({"linear", "transposed_linear", "conv2d"})
EPSILON = 1e-5  # HF's, beside the rank that it divides by


class Params(NamedTuple):
    A: Annotated[Array, "r in", Key("lora_A", kinds=KINDS)]
    E: Annotated[Array, "r 1", Key("lora_E", kinds=KINDS)]
    B: Annotated[Array, "out r", Key("lora_B", kinds=KINDS)]


@final
@dataclass(frozen=True, kw_only=True)
class AdaLoRA(LowRank[Params]):
    init_r: int = 12
    target_r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None  # HF's default too, and HF refuses it
    init_lora_weights: bool | str = True
    live_r: int | None = None  # what a rank pattern leaves of init_r on one module; no key of adapter_config.json

    peft_type: ClassVar[str] = "ADALORA"
    tuner_prefix: ClassVar[str] = "lora_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    dropout: ClassVar[str | None] = "lora_dropout"

    def __post_init__(self) -> None:
        positive(self, "init_r")
        if self.live_r is not None and not 0 <= self.live_r <= self.init_r:
            raise ConfigError(f"live_r={self.live_r}: of init_r={self.init_r} triplets that many cannot be left.")
        probability(self, "lora_dropout")
        positive(self, "total_step", "deltaT")
        if self.total_step is None:
            raise ConfigError(f"total_step={self.total_step}: the schedule needs the number of training steps (HF PEFT refuses it too).")
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                f"tinit={self.tinit}, tfinal={self.tfinal}, total_step={self.total_step}: no step is left in which ranks are"
                " allocated (HF PEFT refuses it too).\n  tinit must be smaller than total_step - tfinal."
            )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(
                    f"{name}={getattr(self, name)}: a moving average needs a weight between 0 and 1 (HF PEFT refuses it too)."
                )
        not_negative(self, "orth_reg_weight")

    @property
    def r(self) -> int:
        return self.init_r if self.live_r is None else self.live_r

    @property
    def scale(self) -> float:
        return (self.lora_alpha if self.lora_alpha > 0 else self.init_r) / (self.init_r + EPSILON)

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r}

    def check_geometry(self, layer: Layer) -> None:
        if layer.groups > 1:
            raise UnsupportedLayerError(
                f"AdaLoRA on a convolution with groups={layer.groups}: HF PEFT crashes there.\n  Target other layers."
            )

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        (out, n_in), deviation = layer.shape, 0.02 if self.init_lora_weights else 1.0
        A, B = rng.normal(0.0, deviation, (self.r, n_in)), rng.normal(0.0, deviation, (out, self.r))
        E = zeros_like((self.r, 1), W) if self.init_lora_weights else to(rng.normal(size=(self.r, 1)), W)
        return Start(Params(to(A, W), E, to(B, W)), W)

    def factors(self, p: Params) -> Factors:
        return Factors(B=self.scale * p.B, A=p.E * p.A)

    def factors_vjp(self, p: Params, d: Factors) -> Params:
        return Params(A=p.E * d.A, E=namespace(d.A).sum(p.A * d.A, axis=1, keepdims=True), B=self.scale * d.B)

    def orthogonality(self, params: Mapping[str, Params]) -> Array:
        """The penalty that is added to the loss, over all modules of a model."""
        norms = [distance(V) for p in params.values() for V in _rows(p)]
        total = self.orth_reg_weight / len(norms) * sum(norms[1:], start=norms[0])
        return namespace(total).reshape(total, ())

    def orthogonality_vjp(self, params: Mapping[str, Params], d: Array | float) -> dict[str, Params]:
        """The gradient of `orthogonality`, given that of the loss for it."""
        share = d * self.orth_reg_weight / (2 * len(params))
        grads = {}
        for name, p in params.items():
            dA, dB = (share * distance_vjp(V) for V in _rows(p))
            grads[name] = Params(A=dA, E=zeros_like(p.E.shape, p.E), B=namespace(dB).matrix_transpose(dB))
        return grads


def _rows(p: Params) -> tuple[Array, Array]:
    """A and B^T, whose rows the penalty wants orthonormal."""
    return p.A, namespace(p.B).matrix_transpose(p.B)
