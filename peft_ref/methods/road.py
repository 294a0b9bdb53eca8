"""RoAd: turn and stretch the outputs of a layer, two at a time.

    W' = R W    b' = R b      on every pair of outputs   R = [[c_1, -s_1], [s_2, c_2]],   c = alpha cos(theta)   s = alpha sin(theta)

The outputs come in groups of `group_size`, g for short; output i of a group's first half is paired with output i of its second half.

    road_1   theta, alpha (out/2)    one pair of numbers per pair of outputs: both rows of R share it
    road_2   theta, alpha (out)      one per output
    road_4   theta, alpha (2 out)    one for c and one for s per output: g numbers for the c of a group, then g for its s

With P the map of rows (w_1, w_2) -> (-w_2, w_1) of each pair,  W' = c W + s P W,  c and s a factor of every row.  For a gradient G of W'
and g of b':   dc_i = sum_j (G W)_ij + g_i b_i    ds_i = sum_j (G P W)_ij + g_i (P b)_i    dW = c G + P^T (s G)
    dalpha = dc cos + ds sin    dtheta = alpha (ds cos - dc sin).   theta starts at zero and alpha at one: nothing changes.

Paper   Liao, Monz 2024, arXiv:2409.00119; it pairs neighbours, HF the halves of a group
HF      peft.RoadConfig, on linear layers. It unmerges with a matrix inverted in float32, this one by the determinants c_1 c_2 + s_1 s_2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, column, namespace, to
from peft_ref.contracts import Key, Reweight, Start, WeightGradients
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.ranges import one_of, positive

KINDS = frozenset({"linear"})
SIZES = {"road_1": (1, 2), "road_2": (1, 1), "road_4": (2, 1)}  # of theta and alpha, as a fraction of out


class Params(NamedTuple):
    theta: Annotated[Array, "n", Key("road_theta", kinds=KINDS)]
    alpha: Annotated[Array, "n", Key("road_alpha", kinds=KINDS)]


@final
@dataclass(frozen=True, kw_only=True)
class RoAd(Reweight[Params]):
    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True

    peft_type: ClassVar[str] = "ROAD"
    tuner_prefix: ClassVar[str] = "road_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        one_of(self, "variant", *SIZES)
        positive(self, "group_size")
        if self.group_size % 2:
            raise ConfigError(f"group_size={self.group_size}: a group has two halves, so it must be even (HF PEFT refuses it too).")

    def dims(self, layer: Layer) -> dict[str, int]:
        top, bottom = SIZES[self.variant]
        return {"n": layer.shape[0] * top // bottom}

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        top, bottom = SIZES[self.variant]
        n = shapes.get("road_theta", (0,))[0] * bottom // top
        return Linear(in_features=1, out_features=n) if n else None

    def check_geometry(self, layer: Layer) -> None:
        if layer.shape[0] % self.group_size:
            raise UnsupportedLayerError(
                f"RoAd: {layer.shape[0]} outputs do not fall into groups of group_size={self.group_size} (HF PEFT refuses it too).\n"
                "  Choose a group_size that divides them."
            )

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        n = self.dims(layer)["n"]
        theta, alpha = (np.zeros(n), np.ones(n)) if self.init_weights else (rng.normal(0, 0.5, n), rng.normal(1, 0.5, n))
        return Start(Params(to(theta, W), to(alpha, W)), W)

    def weight(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        c, s = self.factors(p)
        return column(c) * W + column(s) * self.paired(W), None if b is None else c * b + s * self.paired(b)

    def weight_vjp(
        self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array, dW: Array, db: Array | None
    ) -> WeightGradients[Params]:
        xp, (c, s) = namespace(dW), self.factors(p)
        dc, ds = xp.sum(dW * W, axis=1), xp.sum(dW * self.paired(W), axis=1)
        if b is None or db is None:
            return WeightGradients(self.factors_vjp(p, dc, ds), column(c) * dW - self.paired(column(s) * dW), None)
        dc, ds = dc + db * b, ds + db * self.paired(b)
        return WeightGradients(self.factors_vjp(p, dc, ds), column(c) * dW - self.paired(column(s) * dW), c * db - self.paired(s * db))

    def unmerge(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        c, s = self.factors(p)
        c_other, s_other = self._swapped(c), self._swapped(s)
        det = c * c_other + s * s_other  # of each pair's matrix, the same for both
        back = (column(c_other) * W - column(s) * self.paired(W)) / column(det)
        return back, None if b is None else (c_other * b - s * self.paired(b)) / det

    def factors(self, p: Params) -> tuple[Array, Array]:
        """The factors c and s (out,) of every output."""
        xp = namespace(p.theta)
        cos, sin = p.alpha * xp.cos(p.theta), p.alpha * xp.sin(p.theta)
        half = self.group_size // 2
        if self.variant == "road_1":
            return _twice(cos, half), _twice(sin, half)
        if self.variant == "road_2":
            return cos, sin
        return _first(cos, 2 * half), _second(sin, 2 * half)

    def factors_vjp(self, p: Params, dc: Array, ds: Array) -> Params:
        xp, half = namespace(p.theta), self.group_size // 2
        if self.variant == "road_1":
            dc, ds = _first(dc, half) + _second(dc, half), _first(ds, half) + _second(ds, half)
        if self.variant == "road_4":
            none = dc * 0.0
            dc, ds = _joined(dc, none, 2 * half), _joined(none, ds, 2 * half)
        cos, sin = xp.cos(p.theta), xp.sin(p.theta)
        return Params(theta=p.alpha * (ds * cos - dc * sin), alpha=dc * cos + ds * sin)

    def _swapped(self, v: Array) -> Array:
        half = self.group_size // 2
        return _joined(_second(v, half), _first(v, half), half)

    def paired(self, v: Array) -> Array:
        """(w_1, w_2) -> (-w_2, w_1) on every pair of rows; its transpose is its opposite."""
        half = self.group_size // 2
        return _joined(-_second(v, half), _first(v, half), half)


def _halves(v: Array, n: int) -> Array:
    """Rows in groups of two halves of n: (groups, 2, n, ...)."""
    return namespace(v).reshape(v, (v.shape[0] // (2 * n), 2, n, *v.shape[1:]))


def _first(v: Array, n: int) -> Array:
    return namespace(v).reshape(_halves(v, n)[:, 0, ...], (v.shape[0] // 2, *v.shape[1:]))


def _second(v: Array, n: int) -> Array:
    return namespace(v).reshape(_halves(v, n)[:, 1, ...], (v.shape[0] // 2, *v.shape[1:]))


def _joined(first: Array, second: Array, n: int) -> Array:
    """Undoes `_first` and `_second`: n rows of each in turn."""
    xp, groups, rest = namespace(first), first.shape[0] // n, first.shape[1:]
    pair = xp.stack([xp.reshape(first, (groups, n, *rest)), xp.reshape(second, (groups, n, *rest))], axis=1)
    return xp.reshape(pair, (2 * first.shape[0], *rest))


def _twice(v: Array, n: int) -> Array:
    return _joined(v, v, n)
