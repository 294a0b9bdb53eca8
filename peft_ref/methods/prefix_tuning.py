"""PrefixTuning: learn keys and values that every attention layer finds before those of the input.

    table = E                                  or, with prefix_projection,   table = tanh(E W1^T + b1) W2^T + b2

    E (tokens, layers 2 dim)                   E (tokens, dim)    W1 (hidden, dim)    W2 (layers 2 dim, hidden)    b1, b2

A row of the table holds, layer by layer, the key of all heads and then the value: `peft_ref.splice.key_values` cuts it into them.
For a gradient G of the table, with H = tanh(E W1^T + b1) and D = (G W2) * (1 - H * H):
    dW2 = G^T H    db2 = sum of G's rows    dW1 = D^T E    db1 = sum of D's rows    dE = D W1;    without projection dE = G.

Paper   Li and Liang 2021, arXiv:2101.00190
HF      peft.PrefixTuningConfig. dim is that of keys and values: fewer than the model's where queries share them. Keys are not rotated:
        positions of the input begin after them. init_weights="zero" makes the table zero, which is not the identity: zero keys take
        their share of the attention. With an encoder-decoder see `key_values`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from peft_ref.arrays import Array, namespace, to, zeros_like
from peft_ref.methods.dense import dense, dense_vjp, initial_dense
from peft_ref.prompts import EMBEDDING, NO_SOURCES, Context, Sources, TablePrompt, Tensors
from peft_ref.ranges import positive

FIRST, SECOND = "transform.0", "transform.2"


@final
@dataclass(frozen=True, kw_only=True)
class PrefixTuning(TablePrompt):
    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    tuner_prefix: ClassVar[str] = "prefix_tuning_"
    as_wide: ClassVar[tuple[str, ...]] = ("encoder_hidden_size",)
    place: ClassVar[str] = "cache"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "encoder_hidden_size")

    @property
    def projects(self) -> bool:
        return self.prefix_projection and not self.inference_mode

    def shapes(self) -> dict[str, tuple[int, ...]]:
        tokens, columns = self.table_shape
        if not self.projects:
            return {EMBEDDING: (tokens, columns)}
        dim, hidden = self.size("token_dim"), self.size("encoder_hidden_size")
        return {
            EMBEDDING: (tokens, dim),
            f"{FIRST}.weight": (hidden, dim),
            f"{FIRST}.bias": (hidden,),
            f"{SECOND}.weight": (columns, hidden),
            f"{SECOND}.bias": (columns,),
        }

    def init(self, like: Array, rng: np.random.Generator, sources: Sources = NO_SOURCES) -> Tensors:
        shapes, zero = self.shapes(), self.init_weights == "zero"
        if not self.projects:
            return {EMBEDDING: zeros_like(self.table_shape, like) if zero else to(rng.normal(size=self.table_shape), like)}
        last = {name: zeros_like(shapes[name], like) for name in (f"{SECOND}.weight", f"{SECOND}.bias")} if zero else {}
        return {
            EMBEDDING: to(rng.normal(size=shapes[EMBEDDING]), like),
            **initial_dense(FIRST, shapes, like, rng),
            **(last or initial_dense(SECOND, shapes, like, rng)),
        }

    def table(self, p: Tensors, ctx: Context) -> Array:
        if not self.projects:
            return p[EMBEDDING]
        return dense(SECOND, p, namespace(p[EMBEDDING]).tanh(dense(FIRST, p, p[EMBEDDING])))

    def table_vjp(self, p: Tensors, ctx: Context, d: Array) -> Tensors:
        if not self.projects:
            return {EMBEDDING: d}
        H = namespace(d).tanh(dense(FIRST, p, p[EMBEDDING]))
        dH, second = dense_vjp(SECOND, p, H, d)
        dE, first = dense_vjp(FIRST, p, p[EMBEDDING], dH * (1 - H * H))
        return {EMBEDDING: dE, **first, **second}
