"""LoHa with `use_effective_conv2d`: on a kernel each of the two products has a small core of the kernel's size between its factors.

    W' = W + s P1 * P2      b' = b      s = alpha / r      (P_n)_pqk = sum_ij T_ijk Wa_ip Wb_jq      of the n-th T, Wa, Wb

    T1, T2 (r, r, k)    W1a, W2a (r, out)    W1b, W2b (r, in/groups)    k points of the kernel; P_n folds to (out, in/groups k)

A linear layer and a kernel of one point have no core: there it is LoHa, with LoHa's tensors. For a gradient G of W', H1 = s G * P2,
U_ipk = sum_q H1_pqk Wb_jq and V_iqk = sum_j T_ijk Wb_jq:
    dT_ijk = sum_pq Wa_ip Wb_jq H1_pqk    dWb_jq = sum_ipk T_ijk Wa_ip H1_pqk    dWa_ip = sum_qk V_iqk H1_pqk
and the same with 1 and 2 exchanged. A fresh W2b is zero, so a fresh adapter changes nothing.

Paper   FedPara: Hyeon-Woo et al. 2021, arXiv:2108.06098, proposition 3; the form is LyCORIS's
HF      peft.LoHaConfig(use_effective_conv2d=True). Its hand-written gradient of W1a and W2a is wrong: each is given the V of the other
        product. All else is right. That is what its users train with, so it is the gradient here too; `delta_vjp_true` is the derivative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, namespace, to, zeros_like
from peft_ref.contracts import Additive, Delta, Key, Start, WeightMap
from peft_ref.layers import Conv, Layer
from peft_ref.methods import loha
from peft_ref.methods.loha import KINDS
from peft_ref.ranges import positive

CONV1D, CONV2D = frozenset({"conv1d"}), frozenset({"conv2d"})


class Params(NamedTuple):
    w1_a: Annotated[Array, "a0 a1", Key("hada_w1_a", kinds=KINDS)]
    w1_b: Annotated[Array, "r b1", Key("hada_w1_b", kinds=KINDS)]
    w2_a: Annotated[Array, "a0 a1", Key("hada_w2_a", kinds=KINDS)]
    w2_b: Annotated[Array, "r b1", Key("hada_w2_b", kinds=KINDS)]
    t1: Annotated[Array, "r r k", Key("hada_t1", "r r *k 1", CONV1D, "core"), Key("hada_t1", "r r *k", CONV2D, "core")]
    t2: Annotated[Array, "r r k", Key("hada_t2", "r r *k 1", CONV1D, "core"), Key("hada_t2", "r r *k", CONV2D, "core")]


class Product(NamedTuple):
    """One of the two products: its core and its factors."""

    T: Array
    a: Array
    b: Array

    def half(self) -> Array:
        """V (r, in/groups k), the core and the input's factor."""
        xp, (r, _, k) = namespace(self.T), self.T.shape
        by_point = xp.matrix_transpose(self.b) @ self.T  # (i, q, k)
        return xp.reshape(by_point, (r, self.b.shape[1] * k))

    def product(self) -> Array:
        """P (out, in/groups k)."""
        return namespace(self.a).matrix_transpose(self.a) @ self.half()

    def vjp(self, H: Array) -> Product:
        """The gradients of T, Wa and Wb for a gradient H of P."""
        xp, mT, (r, _, k) = namespace(H), namespace(H).matrix_transpose, self.T.shape
        through = xp.reshape(self.a @ H, (r, self.b.shape[1], k))  # (i, q, k)
        return Product(T=self.b @ through, a=self.half() @ mT(H), b=xp.sum(self.T @ mT(through), axis=0))


@final
@dataclass(frozen=True, kw_only=True)
class LoHaEffective(Additive[Params]):
    r: int = 8
    alpha: float = 8
    init_weights: bool = True

    peft_type: ClassVar[str] = "LOHA"
    flag: ClassVar[str | None] = "use_effective_conv2d"
    tuner_prefix: ClassVar[str] = "hada_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        positive(self, "r")

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def dims(self, layer: Layer) -> dict[str, int]:
        (out, n_in), k, r = layer.shape, math.prod(layer.kernel_size), self.r
        core = any(n != 1 for n in layer.kernel_size)
        return {"r": r, "k": k, "core": core, "a0": r if core else out, "a1": out if core else r, "b1": n_in // k}

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        if not {"hada_t1", "hada_w1_a", "hada_w1_b"} <= shapes.keys():
            return None
        kernel = shapes["hada_t1"][2:]  # a last axis of 1 may be that of a 1-d convolution or a kernel's own: the tensors fit both
        n_in, out = shapes["hada_w1_b"][1], shapes["hada_w1_a"][1]
        return Conv(in_channels=n_in, out_channels=out, kernel_size=kernel[:1] if kernel[1:] == (1,) else kernel)

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        values = {}
        for s in self.spec(layer):
            bound, zero = 1 / math.sqrt(math.prod(s.stored_shape[1:])), self.init_weights and s.field == "w2_b"
            values[s.field] = zeros_like(s.shape, W) if zero else to(rng.uniform(-bound, bound, s.shape), W)
        return Start(self.to_params(**values), W)

    def delta(self, layer: Layer, p: Params) -> Delta:
        if p.t1 is None:
            return self._plain().delta(layer, loha.Params(*p[:4]))
        first, second = _products(p)
        return Delta(self.scale * (first.product() * second.product()))

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        """As HF has it: the gradients of W1a and W2a are made with the other product's core and factor."""
        right = self.delta_vjp_true(layer, p, d)
        if p.t1 is None:
            return right
        mT, (first, second), (h1, h2) = namespace(d.W).matrix_transpose, _products(p), self._parts(p, d)
        return right._replace(w1_a=second.half() @ mT(h1), w2_a=first.half() @ mT(h2))

    def delta_vjp_true(self, layer: Layer, p: Params, d: Delta) -> Params:
        """The derivative of `delta`."""
        if p.t1 is None:
            return self.to_params(**self._plain().delta_vjp(layer, loha.Params(*p[:4]), d)._asdict())
        (first, second), (h1, h2) = _products(p), self._parts(p, d)
        d1, d2 = first.vjp(h1), second.vjp(h2)
        return Params(d1.a, d1.b, d2.a, d2.b, d1.T, d2.T)

    def differentiated(self, layer: Layer, p: Params, W0: Array) -> WeightMap[Params]:
        """Where W1a moves away from p, HF moves P1 by what the other product makes of the step, and W2a alike."""
        if p.t1 is None:
            return lambda q, W, b: self.weight(layer, q, W, b, W0)
        here = _products(p)

        def moved(q: Params) -> tuple[Array, Array]:
            now = _products(q)
            steps = (now[0].a - here[0].a, now[1].a - here[1].a)
            first, second = (now[n]._replace(a=here[n].a).product() + now[1 - n]._replace(a=steps[n]).product() for n in (0, 1))
            return first, second

        def weight(q: Params, W: Array, b: Array | None) -> tuple[Array, Array | None]:
            first, second = moved(q)
            return W + self.scale * (first * second), b

        return weight

    def _parts(self, p: Params, d: Delta) -> tuple[Array, Array]:
        """H1 and H2, the gradients of the two products."""
        first, second = _products(p)
        return self.scale * (d.W * second.product()), self.scale * (d.W * first.product())

    def products(self, layer: Layer, p: Params) -> tuple[Array, Array]:
        """P1 and P2 (out, in)."""
        if p.t1 is None:
            return p.w1_a @ p.w1_b, p.w2_a @ p.w2_b
        first, second = _products(p)
        return first.product(), second.product()

    def _plain(self) -> loha.LoHa:
        return loha.LoHa(r=self.r, alpha=self.alpha)


def _products(p: Params) -> tuple[Product, Product]:
    return Product(p.t1, p.w1_a, p.w1_b), Product(p.t2, p.w2_a, p.w2_b)
