"""DeLoRA: add a sum of r unit outer products with one learned length, weighed by the norms of the frozen weight's columns.

    W' = W + B diag(c) A diag(w)      c_i = lambda / r / (max(|A_i|, e) max(|B_i|, e))      e = 1e-4

    A (r, in), rows A_i    B (out, r), columns B_i    lambda (1,)    w (in,): the norms of W's columns when the adapter was made

So B diag(c) A is no longer than lambda, whatever A and B are: their lengths say nothing, lambda alone how far the weight moves.

For a gradient G of W', with H = G diag(w) A^T (out, r) and t_i = B_i . H_i, column by column:
    dlambda = sum t_i c_i / lambda    dB_i = c_i (H_i - t_i B_i / |B_i|^2)    dA_i = c_i (B_i^T G diag(w) - t_i A_i / |A_i|^2),
each without its second term where the length is below e.  w has no gradient.  B starts at zero, so a fresh adapter changes nothing.

Paper   Bini et al. 2025, arXiv:2503.18225
HF      peft.DeloraConfig, on linear layers. w is saved with the adapter. lambda_pattern says from which lambda a module starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, at_least, column, namespace, row_norm, to, zeros_like
from peft_ref.contracts import Factors, Key, LowRank, Start
from peft_ref.layers import Layer
from peft_ref.ranges import positive, probability

LEAST = 1e-4


class Params(NamedTuple):
    A: Annotated[Array, "r in", Key("delora_A")]
    B: Annotated[Array, "out r", Key("delora_B")]
    length: Annotated[Array, "1", Key("delora_lambda")]
    w: Annotated[Array, "in", Key("delora_w_norm", trained=False)]


@final
@dataclass(frozen=True, kw_only=True)
class DeLoRA(LowRank[Params]):
    r: int = 8
    delora_lambda: float = 15.0
    module_dropout: float = 0.0
    init_weights: bool = True

    peft_type: ClassVar[str] = "DELORA"
    tuner_prefix: ClassVar[str] = "delora_"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    dropout: ClassVar[str | None] = "module_dropout"

    def __post_init__(self) -> None:
        positive(self, "r")
        probability(self, "module_dropout")

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r}

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        def uniform(rows: int, columns: int) -> Array:
            bound = 1 / math.sqrt(columns)
            return to(rng.uniform(-bound, bound, (rows, columns)), W)

        xp, (out, n_in) = namespace(W), layer.shape
        A = uniform(self.r, n_in)
        B = zeros_like((out, self.r), W) if self.init_weights else uniform(out, self.r)
        return Start(Params(A, B, zeros_like((1,), W) + self.delora_lambda, row_norm(xp.matrix_transpose(W))), W)

    def factors(self, p: Params) -> Factors:
        return Factors(B=p.B * (p.length * self._per_length(p)), A=p.A * p.w)

    def factors_vjp(self, p: Params, d: Factors) -> Params:
        xp = namespace(p.A)
        per_length = self._per_length(p)
        c, dA = p.length * per_length, d.A * p.w
        along = xp.sum(p.B * d.B, axis=0)
        return self.to_params(
            A=dA - column(along * c * _over_square(row_norm(p.A))) * p.A,
            B=d.B * c - p.B * (along * c * _over_square(row_norm(xp.matrix_transpose(p.B)))),
            length=xp.sum(along * per_length, keepdims=True),
        )

    def _per_length(self, p: Params) -> Array:
        """c / lambda (r,)."""
        lengths = at_least(row_norm(p.A), LEAST) * at_least(row_norm(namespace(p.B).matrix_transpose(p.B)), LEAST)
        return 1.0 / self.r / lengths


def _over_square(norm: Array) -> Array:
    """One over the square of a length that acts; zero where it is held at e."""
    xp, acts = namespace(norm), norm >= LEAST
    one = norm * 0.0 + 1.0
    length = xp.where(acts, norm, one)
    return xp.where(acts, one / (length * length), norm * 0.0)
