"""MiCA: LoRA whose B is fixed at the directions in which the frozen weight does least, so that only A is trained.

    W' = W + s B A      s = alpha / r,  or alpha / sqrt(r) with use_rslora

    A (r, in)    B (out, r), not trained: the left singular vectors of the r smallest singular values of W

For a gradient G of W':   dA = s B^T G.   A starts at zero, so a fresh adapter changes nothing.

Paper   2026, arXiv:2604.01694
HF      peft.LoraConfig(init_lora_weights="mica"), refused on a float64 weight and on convolutions. A singular vector's sign is the
        decomposition's choice, so B is what a file says, not what the weight says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, thin_svd, zeros_like
from peft_ref.contracts import Factors, Key, LowRank, Start
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Layer
from peft_ref.methods import lora
from peft_ref.methods.lora_init import scaling
from peft_ref.ranges import positive, probability

KINDS = lora.LINEAR | lora.TABLE


class Params(NamedTuple):
    A: Annotated[Array, "r in", Key("lora_A.weight", kinds=lora.LINEAR), Key("lora_embedding_A", kinds=lora.TABLE)]
    B: Annotated[
        Array,
        "out r",
        Key("lora_B.weight", kinds=lora.LINEAR, trained=False),
        Key("lora_embedding_B", kinds=lora.TABLE, trained=False),
    ]


@final
@dataclass(frozen=True, kw_only=True)
class MiCA(LowRank[Params]):
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False

    peft_type: ClassVar[str] = "LORA"
    flag: ClassVar[str | None] = "init_lora_weights"
    flag_value: ClassVar[bool | str | type] = "mica"
    tuner_prefix: ClassVar[str] = "lora_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    held: ClassVar[frozenset[str]] = frozenset({"B"})
    dropout: ClassVar[str | None] = "lora_dropout"

    def __post_init__(self) -> None:
        positive(self, "r")
        probability(self, "lora_dropout")

    @property
    def scale(self) -> float:
        return scaling(self.r, self.lora_alpha, self.use_rslora)

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r}

    def check_geometry(self, layer: Layer) -> None:
        if self.r > min(layer.shape):
            raise UnsupportedLayerError(
                f"MiCA with r={self.r}: a weight {layer.shape} has only {min(layer.shape)} directions (HF PEFT refuses it too).\n"
                f"  Use r <= {min(layer.shape)}."
            )

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        U, _, _ = thin_svd(W)
        return Start(Params(A=zeros_like((self.r, layer.shape[1]), W), B=U[:, U.shape[1] - self.r :]), W)

    def factors(self, p: Params) -> Factors:
        return Factors(B=self.scale * p.B, A=p.A)

    def factors_vjp(self, p: Params, d: Factors) -> Params:
        return self.to_params(A=d.A)
