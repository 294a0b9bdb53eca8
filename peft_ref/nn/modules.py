"""Small modules that several architectures share, by the names of their parameters in a `Net`.

feed_forward   outer(f(inner(x)))
"""

from __future__ import annotations

from peft_ref.arrays import Array
from peft_ref.nn.functions import Activation
from peft_ref.nn.net import Gradients, Net


def feed_forward(net: Net, inner: str, outer: str, f: Activation, x: Array) -> Array:
    return net.apply(outer, f.f(net.apply(inner, x)))


def feed_forward_vjp(net: Net, inner: str, outer: str, f: Activation, x: Array, dy: Array) -> tuple[Array, Gradients]:
    h = net.apply(inner, x)
    dopened, of_outer = net.vjp(outer, f.f(h), dy)
    dx, of_inner = net.vjp(inner, x, f.vjp(h, dopened))
    return dx, of_outer + of_inner
