"""Small modules that several architectures share, by the names of their parameters in a `Net`.

norm   layer_norm with the module's weight and bias                feed_forward   outer(f(inner(x)))
"""

from __future__ import annotations

from peft_ref.arrays import Array
from peft_ref.nn.functions import Activation, layer_norm, layer_norm_vjp
from peft_ref.nn.net import Gradients, Net


def norm(net: Net, name: str, x: Array, eps: float) -> Array:
    return layer_norm(x, net.parameter(f"{name}.weight"), net.parameter(f"{name}.bias"), eps)


def norm_vjp(net: Net, name: str, x: Array, eps: float, dy: Array) -> tuple[Array, Gradients]:
    d = layer_norm_vjp(x, net.parameter(f"{name}.weight"), net.parameter(f"{name}.bias"), eps, dy)
    return d.x, net.gradient(f"{name}.weight", d.w) + net.gradient(f"{name}.bias", d.b)


def feed_forward(net: Net, inner: str, outer: str, f: Activation, x: Array) -> Array:
    return net.apply(outer, f.f(net.apply(inner, x)))


def feed_forward_vjp(net: Net, inner: str, outer: str, f: Activation, x: Array, dy: Array) -> tuple[Array, Gradients]:
    h = net.apply(inner, x)
    dopened, of_outer = net.vjp(outer, f.f(h), dy)
    dx, of_inner = net.vjp(inner, x, f.vjp(h, dopened))
    return dx, of_outer + of_inner
