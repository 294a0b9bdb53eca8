"""LoKr: add the Kronecker product of two small matrices: the second one, scaled by every entry of the first.

    W' = W + s W1 (x) W2      b' = b      s = alpha / r      (W1 (x) W2)_(a o2 + b),(c i2 + d) = W1_ac W2_bd

    W1 (o1, i1)    W2 (o2, i2 k)    out = o1 o2, in/groups = i1 i2, and k the size of the kernel

W1 = W1a W1b with decompose_both where that is smaller; W2 = W2a W2b where that is smaller; with use_effective_conv2d
W2_bdk = sum_ij T_ijk W2a_ib W2b_jd. The delta is a rearrangement of the outer product vec(W1) vec(W2)^T; with a gradient G of W'
rearranged alike into R:   dW1 = s R vec(W2),   dW2 = s R^T vec(W1),   and on from there by the rule of a matrix product.
A fresh W1 or W1a is zero, so a fresh adapter changes nothing.

Paper   LyCORIS: Yeh et al. 2023, arXiv:2309.14859
HF      peft.LoKrConfig, on linear layers and 1-d and 2-d convolutions. On a 1-d convolution with a full W2 its axes are paired wrongly:
        (o2, o1, i2, i1, k) is read as the weight. Saved adapters are trained on that, so it is so here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, namespace, to, zeros_like
from peft_ref.contracts import Additive, Delta, Key, Start
from peft_ref.layers import Conv, Layer, Linear
from peft_ref.ranges import one_of, positive

KINDS = frozenset({"linear", "conv1d", "conv2d"})
LINEAR, CONVS, CONV1D, CONV2D = (frozenset(k) for k in (("linear",), ("conv1d", "conv2d"), ("conv1d",), ("conv2d",)))


class Params(NamedTuple):
    w1: Annotated[Array, "o1 i1", Key("lokr_w1", kinds=KINDS, when="full1")]
    w1_a: Annotated[Array, "o1 r", Key("lokr_w1_a", kinds=KINDS, when="low1")]
    w1_b: Annotated[Array, "r i1", Key("lokr_w1_b", kinds=KINDS, when="low1")]
    w2: Annotated[Array, "o2 i2k", Key("lokr_w2", kinds=LINEAR, when="full2"), Key("lokr_w2", "o2 i2 *k", kinds=CONVS, when="full2")]
    w2_a: Annotated[Array, "a0 a1", Key("lokr_w2_a", kinds=KINDS, when="low2")]
    w2_b: Annotated[Array, "r b1", Key("lokr_w2_b", kinds=KINDS, when="low2")]
    t2: Annotated[
        Array,
        "r r k",
        Key("lokr_t2", "r r *k 1", kinds=CONV1D, when="core"),
        Key("lokr_t2", "r r *k", kinds=CONV2D, when="core"),
    ]


@final
@dataclass(frozen=True, kw_only=True)
class LoKr(Additive[Params]):
    r: int = 8
    alpha: float = 8
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    init_weights: bool | str = True

    peft_type: ClassVar[str] = "LOKR"
    tuner_prefix: ClassVar[str] = "lokr_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        positive(self, "r")
        one_of(self, "init_weights", True, False, "lycoris")

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def dims(self, layer: Layer) -> dict[str, int]:
        k = math.prod(layer.kernel_size)
        (i1, i2), (o1, o2) = (factors(n, self.decompose_factor) for n in (layer.shape[1] // k, layer.shape[0]))
        low1 = self.decompose_both and 2 * self.r < max(o1, i1)
        low2 = 2 * self.r < max(o2, i2)
        core = low2 and self.use_effective_conv2d and any(n != 1 for n in layer.kernel_size)
        sizes = {"r": self.r, "o1": o1, "i1": i1, "o2": o2, "i2": i2, "k": k, "i2k": i2 * k}
        switches = {"full1": not low1, "low1": low1, "full2": not low2, "low2": low2, "core": core}
        return {**sizes, **switches, "a0": self.r if core else o2, "a1": o2 if core else self.r, "b1": i2 if core else i2 * k}

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        return next((c for c in _layers(shapes) if {s.key: s.stored_shape for s in self.spec(c)} == shapes), None)

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        zero = {True: ("w1", "w1_a"), False: (), "lycoris": ("w2", "w2_b")}[self.init_weights]
        values = {}
        for s in self.spec(layer):
            bound = 1 / math.sqrt(math.prod(s.stored_shape[1:]))
            values[s.field] = zeros_like(s.shape, W) if s.field in zero else to(rng.uniform(-bound, bound, s.shape), W)
        return Start(self.to_params(**values), W)

    def delta(self, layer: Layer, p: Params) -> Delta:
        return Delta(self.kronecker(layer, self.first(p), self.scale * self.second(p)))

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        xp, mT = namespace(d.W), namespace(d.W).matrix_transpose
        w1, w2, R = self.first(p), self.second(p), self.scale * self.rearranged(layer, d.W)
        d1 = xp.reshape(R @ xp.reshape(w2, (-1,)), w1.shape)
        d2 = xp.reshape(xp.reshape(w1, (-1,)) @ R, w2.shape)
        grads = {"w1": d1} if p.w1 is not None else {"w1_a": d1 @ mT(p.w1_b), "w1_b": mT(p.w1_a) @ d1}
        if p.w2 is not None:
            return self.to_params(**grads, w2=d2)
        if p.t2 is None:
            return self.to_params(**grads, w2_a=d2 @ mT(p.w2_b), w2_b=mT(p.w2_a) @ d2)
        r, _, k = p.t2.shape
        half, dw2 = self._half(p), xp.reshape(d2, (w2.shape[0], -1, k))
        d_half = xp.reshape(p.w2_b @ dw2, (w2.shape[0], r * k))
        core, w2_b = xp.reshape(p.t2, (r, r * k)), xp.sum(half @ mT(dw2), axis=0)
        return self.to_params(**grads, w2_a=core @ mT(d_half), w2_b=w2_b, t2=xp.reshape(p.w2_a @ d_half, p.t2.shape))

    def first(self, p: Params) -> Array:
        """W1 (o1, i1)."""
        return p.w1_a @ p.w1_b if p.w1 is None else p.w1

    def second(self, p: Params) -> Array:
        """W2 (o2, i2 k)."""
        if p.w2 is not None:
            return p.w2
        if p.t2 is None:
            return p.w2_a @ p.w2_b
        xp, half = namespace(p.t2), self._half(p)
        return xp.reshape(xp.matrix_transpose(xp.matrix_transpose(half) @ p.w2_b), (half.shape[0], -1))

    def _half(self, p: Params) -> Array:
        """sum_i T_ijk W2a_ib as (o2, r, k)."""
        xp = namespace(p.t2)
        r, _, k = p.t2.shape
        return xp.reshape(xp.matrix_transpose(p.w2_a) @ xp.reshape(p.t2, (r, r * k)), (-1, r, k))

    def kronecker(self, layer: Layer, w1: Array, w2: Array) -> Array:
        """W1 (x) W2 as a weight (out, in)."""
        xp, (order, sizes) = namespace(w1), self._places(layer)
        outer = xp.reshape(w1, (-1, 1)) * xp.reshape(w2, (1, -1))
        return xp.reshape(xp.permute_dims(xp.reshape(outer, sizes), order), layer.shape)

    def rearranged(self, layer: Layer, d: Array) -> Array:
        """The transpose of that rearrangement: (out, in) as (o1 i1, o2 i2 k)."""
        xp, (order, sizes) = namespace(d), self._places(layer)
        split = xp.permute_dims(xp.reshape(d, tuple(sizes[axis] for axis in order)), tuple(int(n) for n in np.argsort(order)))
        return xp.reshape(split, (sizes[0] * sizes[1], -1))

    def _places(self, layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where the axes (o1, i1, o2, i2, k) of the outer product stand in the weight, and their sizes."""
        n = self.dims(layer)
        crossed = layer.kind == "conv1d" and n["full2"]
        return ((2, 0, 3, 1, 4) if crossed else (0, 2, 1, 3, 4)), tuple(n[size] for size in ("o1", "i1", "o2", "i2", "k"))


def factors(n: int, factor: int) -> tuple[int, int]:
    """(m, n / m): m = factor where that divides n, else the largest divisor up to the root of n and, if it is not -1, up to factor."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    limit = math.isqrt(n) if factor == -1 else min(math.isqrt(n), factor)
    m = next((m for m in range(limit, 1, -1) if n % m == 0), 1)
    return m, n // m


def _layers(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Layer]:
    """The layers that tensors of these shapes may belong to."""
    by = {key.removeprefix("lokr_"): shape for key, shape in shapes.items()}
    if not ({"w1"} <= by.keys() or {"w1_a", "w1_b"} <= by.keys()) or not ({"w2"} <= by.keys() or {"w2_a", "w2_b"} <= by.keys()):
        return
    o1, i1 = by["w1"] if "w1" in by else (by["w1_a"][0], by["w1_b"][1])
    o2 = by["w2"][0] if "w2" in by else by["w2_a"][1 if "t2" in by else 0]
    width = by["w2"][1] if "w2" in by else by["w2_b"][1]
    kernel = by["w2"][2:] if "w2" in by else by.get("t2", ())[2:]
    if kernel:
        yield Conv(in_channels=i1 * width, out_channels=o1 * o2, kernel_size=kernel)
        return
    yield Linear(in_features=i1 * width, out_features=o1 * o2)
    for k in range(2, width + 1):  # a flattened kernel: any that fits
        if width % k == 0:
            yield Conv(in_channels=i1 * width // k, out_channels=o1 * o2, kernel_size=(k,))
