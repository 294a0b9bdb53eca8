"""HiRA: multiply the frozen weight, entry by entry, by a low-rank matrix, and add that.

    W' = W + W0 * (B A)      b' = b

    A (r, in)    B (out, r)

There is no scale. W0 is the frozen weight, W what an earlier adapter made of it: alone, W' = W0 * (1 + B A), and several adapters add up.
For a gradient G of W', with M = G * W0:   dA = B^T M    dB = M A^T.   A fresh B is zero, so a fresh adapter changes nothing.
The delta has rank up to r times that of W0.

Paper   Huang et al., ICLR 2025, openreview.net/forum?id=TwJrTz9cRS
HF      peft.HiraConfig. On an embedding A starts at zero and B is standard normal; init_weights=False leaves both standard normal. HF's
        unmerge puts a saved copy of the weight back, this one subtracts. It refuses convolutions with groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, namespace, to, zeros_like
from peft_ref.contracts import Key, Reweight, Start, WeightGradients, conv_key
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Layer
from peft_ref.ranges import one_of, positive, probability

LINEAR = frozenset({"linear", "transposed_linear"})
TABLE = frozenset({"embedding"})


class Params(NamedTuple):
    A: Annotated[Array, "r in", Key("hira_A", kinds=LINEAR), Key("hira_embedding_A", kinds=TABLE), conv_key("hira_A", "r channels *k")]
    B: Annotated[Array, "out r", Key("hira_B", kinds=LINEAR), Key("hira_embedding_B", kinds=TABLE), conv_key("hira_B", "out r *1")]


@final
@dataclass(frozen=True, kw_only=True)
class HiRA(Reweight[Params]):
    r: int = 32
    hira_dropout: float = 0.0
    init_weights: bool | str = True

    peft_type: ClassVar[str] = "HIRA"
    tuner_prefix: ClassVar[str] = "hira_"
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    by_rows: ClassVar[bool] = True
    dropout: ClassVar[str | None] = "hira_dropout"

    def __post_init__(self) -> None:
        positive(self, "r")
        probability(self, "hira_dropout")
        one_of(self, "init_weights", True, False, "gaussian")

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r}

    def check_geometry(self, layer: Layer) -> None:
        if layer.groups > 1:
            raise UnsupportedLayerError(
                f"HiRA on a convolution with groups={layer.groups}: B A has no entry for each of the weight's (HF PEFT refuses it too)."
            )

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        (out, n_in), r = layer.shape, self.r
        if self.init_weights is False:
            return Start(Params(to(rng.normal(size=(r, n_in)), W), to(rng.normal(size=(out, r)), W)), W)
        if layer.kind == "embedding":
            return Start(Params(zeros_like((r, n_in), W), to(rng.normal(size=(out, r)), W)), W)
        bound = 1 / math.sqrt(n_in)
        gaussian = self.init_weights == "gaussian" and not layer.kernel_size
        A = rng.normal(0.0, 1 / r, (r, n_in)) if gaussian else rng.uniform(-bound, bound, (r, n_in))
        return Start(Params(to(A, W), zeros_like((out, r), W)), W)

    def weight(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return W + W0 * (p.B @ p.A), b

    def weight_vjp(
        self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array, dW: Array, db: Array | None
    ) -> WeightGradients[Params]:
        mT, M = namespace(dW).matrix_transpose, dW * W0
        return WeightGradients(Params(A=mT(p.B) @ M, B=M @ mT(p.A)), dW, db)

    def unmerge(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return W - W0 * (p.B @ p.A), b
