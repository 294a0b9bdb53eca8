"""QA-LoRA: LoRA that reads sums over groups of inputs, so that it fits into the zero points of a weight quantised in those groups.

    W' = W + s B A P      s = alpha / r,  or alpha / sqrt(r) with use_rslora

    A (r, in/g)    B (out, r)    P (in/g, in) averages g neighbouring inputs and multiplies by in/g:  P_ij = in / g^2 where j // g = i

g is qalora_group_size. For a gradient G of W', with H = G P^T, G's columns summed over each group times in / g^2:
dA = s B^T H    dB = s H A^T.   A fresh B is zero.

Paper   2023, arXiv:2309.14717
HF      peft.LoraConfig(use_qalora=True), on GPTQ layers alone: any other layer does not read it and gets LoRA, whose A is (r, in). Merging
        is refused there, since the weight is quantised; here it is a matrix like any other. The paper sums over a group, HF takes the
        mean and then multiplies by the number of groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, namespace, to
from peft_ref.contracts import Factors, Key, LowRank, Start
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.methods.lora_init import biased, check_bias, check_init, check_rank, initial_factors, scaling
from peft_ref.ranges import positive

KINDS = frozenset({"linear"})


class Params(NamedTuple):
    A: Annotated[Array, "r reads", Key("lora_A.weight", kinds=KINDS)]
    B: Annotated[Array, "out r", Key("lora_B.weight", kinds=KINDS)]
    c: Annotated[Array | None, "out", Key("lora_B.bias", kinds=KINDS, when="lora_bias")] = None


@final
@dataclass(frozen=True, kw_only=True)
class QALoRA(LowRank[Params]):
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    qalora_group_size: int = 16

    peft_type: ClassVar[str] = "LORA"
    flag: ClassVar[str | None] = "use_qalora"
    tuner_prefix: ClassVar[str] = "lora_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    dropout: ClassVar[str | None] = "lora_dropout"

    def __post_init__(self) -> None:
        check_rank(self)
        check_bias(self)
        positive(self, "qalora_group_size")

    @property
    def scale(self) -> float:
        return scaling(self.r, self.lora_alpha, self.use_rslora)

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r, "reads": layer.shape[1] // self.qalora_group_size}

    def check_geometry(self, layer: Layer) -> None:
        check_init(self, layer)
        if layer.shape[1] % self.qalora_group_size:
            raise UnsupportedLayerError(
                f"QA-LoRA: {layer.shape[1]} inputs are no whole number of groups of qalora_group_size={self.qalora_group_size}"
                " (HF PEFT refuses it too).\n  Choose a size that divides every targeted layer's inputs."
            )

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        A, B = shapes.get("lora_A.weight", ()), shapes.get("lora_B.weight", ())
        return Linear(in_features=A[1] * self.qalora_group_size, out_features=B[0]) if len(A) == len(B) == 2 else None

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        n_in = layer.shape[1] // self.qalora_group_size
        _, B, W = initial_factors(layer, W, self.r, self.scale, self.init_lora_weights, rng)
        bound = 1 / math.sqrt(n_in)  # whatever init_lora_weights made of A: it is drawn anew in its smaller shape
        return Start(biased(self, Params(to(rng.uniform(-bound, bound, (self.r, n_in)), W), B), layer, W, rng), W)

    def factors(self, p: Params) -> Factors:
        xp, g = namespace(p.A), self.qalora_group_size
        wide = xp.concat([xp.expand_dims(p.A, axis=2)] * g, axis=2)
        return Factors(B=self.scale * p.B, A=self._weight(p.A) * xp.reshape(wide, (p.A.shape[0], p.A.shape[1] * g)))

    def factors_vjp(self, p: Params, d: Factors) -> Params:
        grouped = namespace(d.A).reshape(d.A, (*p.A.shape, self.qalora_group_size))
        return Params(A=self._weight(p.A) * namespace(d.A).sum(grouped, axis=2), B=self.scale * d.B, c=self._unused(p))

    def _unused(self, p: Params) -> Array | None:
        """The gradient of c: PEFT's forward multiplies with B's weight, and never reads its bias."""
        return None if p.c is None else 0 * p.c

    def _weight(self, A: Array) -> float:
        """How much one input counts: the mean of g, times the number of groups."""
        return float(A.shape[1] / self.qalora_group_size)
