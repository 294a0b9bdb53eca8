"""LN tuning: train a layer's own weight and bias, and nothing else; meant for norms, which hold few numbers.

    W' = w      b' = c          w in the shape of the stored weight,  c (out,) where the layer has a bias

For gradients G of W' and g of b':   dw = G in the stored layout,   dc = g;   what stands below gets nothing.
w and c start at the frozen ones, so a fresh adapter changes nothing.

Paper   arXiv:2312.11420, on the layer norms of language models that learn to see
HF      peft.LNTuningConfig: a copy of the module takes its place, whatever the module is, so linear layers, tables and convolutions are
        trained in full that way too. Several adapters may be there; one acts at a time, and merging changes places with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, namespace, zeros_like
from peft_ref.contracts import EVERY_KIND, KINDS, Key, Reweight, Start, WeightGradients, conv_key
from peft_ref.layers import CONV_KINDS, Conv, Layer, Linear
from peft_ref.norms import NORM, Norm

WEIGHT, BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"


class Params(NamedTuple):
    w: Annotated[
        Array,
        "rows columns",
        Key(WEIGHT, "rows", kinds=frozenset({NORM})),
        Key(WEIGHT, kinds=KINDS - CONV_KINDS),
        conv_key(WEIGHT, "out channels/groups *k"),
    ]
    c: Annotated[Array, "out", Key(BIAS, kinds=EVERY_KIND, when="biased")]


@final
@dataclass(frozen=True, kw_only=True)
class LNTuning(Reweight[Params]):
    peft_type: ClassVar[str] = "LN_TUNING"
    tuner_prefix: ClassVar[str] = "ln_tuning_"
    kinds: ClassVar[frozenset[str]] = EVERY_KIND
    replaces: ClassVar[bool] = True
    swaps: ClassVar[bool] = True
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def dims(self, layer: Layer) -> dict[str, int]:
        rows, *others = layer.weight_shape
        return {"rows": rows, "columns": math.prod(others), "biased": int(layer.bias)}

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        """The weight is there as it is stored; a table, or a transposed linear layer, cannot be told from a linear one."""
        shape, bias = shapes.get(WEIGHT, ()), BIAS in shapes
        if len(shape) == 1:
            return Norm(features=shape[0], bias=bias)
        if len(shape) == 2:
            transposed = bias and shapes[BIAS] == shape[1:] != shape[:1]
            out, n_in = shape[::-1] if transposed else shape
            return Linear(in_features=n_in, out_features=out, transposed=transposed, bias=bias)
        if 3 <= len(shape) <= 5:
            return Conv(in_channels=shape[1], out_channels=shape[0], kernel_size=shape[2:], bias=bias)
        return None

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        return Start(self.to_params(w=self._stored(layer, W), c=zeros_like((layer.shape[0],), W) if layer.bias else None), W)

    def with_frozen_bias(self, params: Params, b: Array | None) -> Params:
        return params if params.c is None or b is None else params._replace(c=b)

    def weight(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        w, c = (None if v is None else _as_computed(v, W) for v in p)
        return layer.fold(namespace(w).reshape(w, layer.weight_shape)), c

    def weight_vjp(
        self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array, dW: Array, db: Array | None
    ) -> WeightGradients[Params]:
        d = self.to_params(w=self._stored(layer, dW), c=db if layer.bias else None)
        return WeightGradients(d, zeros_like(dW.shape, dW), None if db is None else zeros_like(db.shape, db))

    def unmerge(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return W0, b

    def _stored(self, layer: Layer, W: Array) -> Array:
        """The weight as it is stored, all axes but the first as one."""
        sizes = self.dims(layer)
        return namespace(W).reshape(layer.unfold(W), (sizes["rows"], sizes["columns"]))


def _as_computed(v: Array, W: Array) -> Array:
    """A 16-bit number is kept as it is, and computed with as the frozen weight is."""
    return v if v.dtype == W.dtype else namespace(v).astype(v, W.dtype)
