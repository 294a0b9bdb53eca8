"""LoRA: add a low-rank matrix to a frozen weight.

    W' = W + s B A      b' = b + s c      s = alpha / r,  or alpha / sqrt(r) with use_rslora

    A (r, in)    B (out, r)    c (out,), only with lora_bias

For a gradient G of W' and g of b':   dA = s B^T G    dB = s G A^T    dc = s g.   A fresh B is zero, so a fresh adapter changes nothing.

Paper   Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732
HF      peft.LoraConfig. A is drawn like torch's kaiming_uniform_(a=sqrt 5): uniform within 1/sqrt(fan in). On an embedding the roles
        swap: A starts at zero and B is standard normal. pissa, olora and orthogonal are in `lora_init.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, namespace
from peft_ref.contracts import Factors, Key, LowRank, Start, conv_key
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Layer
from peft_ref.methods.lora_init import check_bias, check_init, check_rank, initial_bias, initial_factors, scaling

LINEAR = frozenset({"linear", "transposed_linear"})
TABLE = frozenset({"embedding"})


class Params(NamedTuple):
    A: Annotated[
        Array,
        "r in",
        Key("lora_A.weight", kinds=LINEAR),
        Key("lora_embedding_A", kinds=TABLE),
        conv_key("lora_A.weight", "r channels *k"),
    ]
    B: Annotated[
        Array,
        "out r/groups",
        Key("lora_B.weight", kinds=LINEAR),
        Key("lora_embedding_B", kinds=TABLE),
        conv_key("lora_B.weight", "out r/groups *1"),
    ]
    c: Annotated[
        Array | None,
        "out",
        Key("lora_B.bias", kinds=LINEAR, when="lora_bias"),
        conv_key("lora_B.bias", "out", when="lora_bias"),
    ] = None


def transposed(p: Params) -> Params:
    """The factors of the transposed delta: those of a head that is tied to a table, from the table's."""
    xp = namespace(p.A)
    return Params(A=xp.matrix_transpose(p.B), B=xp.matrix_transpose(p.A))


@final
@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank[Params]):
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True

    peft_type: ClassVar[str] = "LORA"
    tuner_prefix: ClassVar[str] = "lora_"
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    dropout: ClassVar[str | None] = "lora_dropout"

    def __post_init__(self) -> None:
        check_rank(self)
        check_bias(self)

    @property
    def scale(self) -> float:
        return scaling(self.r, self.lora_alpha, self.use_rslora)

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r, "in": layer.fan_in}

    def check_geometry(self, layer: Layer) -> None:
        check_init(self, layer)
        if self.lora_bias and layer.kind == "embedding":
            raise UnsupportedLayerError("lora_bias=True on an embedding layer: HF PEFT refuses it.\n  Use lora_bias=False.")

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        A, B, W = initial_factors(layer, W, self.r, self.scale, self.init_lora_weights, rng)
        c = initial_bias(layer, W, self.r, self.init_lora_weights, rng) if self.lora_bias else None
        return Start(Params(A, B, c), W)

    def factors(self, p: Params) -> Factors:
        return Factors(B=self.scale * p.B, A=p.A, b=None if p.c is None else self.scale * p.c)

    def factors_vjp(self, p: Params, d: Factors) -> Params:
        return Params(A=d.A, B=self.scale * d.B, c=None if d.b is None else self.scale * d.b)
