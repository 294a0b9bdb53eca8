"""A bidirectional LSTM over the rows of x, layer upon layer, for the encoder of P-tuning.

    a_t = W x_t + b + R h_{t-1} + c        (i, f, g, o) = (sigma, sigma, tanh, sigma) of a_t's four parts
    s_t = f s_{t-1} + i g                  h_t = o tanh(s_t)                h_0 = s_0 = 0

    W (4 hidden, in)    R (4 hidden, hidden)    b, c (4 hidden,)

The other direction walks from the last row to the first. A layer's output is both, side by side: (rows, 2 hidden), the next one's input.
Backwards in time, with dh_t from above and from the step after, and ds_t from the step after:
    ds_t += dh_t o (1 - tanh(s_t)^2)    da = (ds g i (1-i), ds s_{t-1} f (1-f), ds i (1-g^2), dh tanh(s_t) o (1-o))
    dx_t = da W    dh_{t-1} = da R    ds_{t-1} = ds f    dW = sum da x_t^T    dR = sum da h_{t-1}^T    db = dc = sum da.

A plus sign before a number says that it is computed as it stands, step by step, and never multiplied out: `check/exact.py` reads it.

HF      torch.nn.LSTM with bias, gates in that order, every tensor uniform within 1/sqrt(hidden) at first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from peft_ref.arrays import Array, namespace, to, zeros_like
from peft_ref.prompts import Tensors

HEAD = "lstm_head"
DIRECTIONS = ("", "_reverse")


class Step(NamedTuple):
    """One row's gates, its state and output, each (1, hidden), and the state and output before it."""

    i: Array
    f: Array
    g: Array
    o: Array
    s: Array
    h: Array
    s_before: Array
    h_before: Array


def lstm_shapes(n_in: int, hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for name in _names(layer):
            shapes |= {
                name("weight_ih"): (4 * hidden, 2 * hidden if layer else n_in),
                name("weight_hh"): (4 * hidden, hidden),
                name("bias_ih"): (4 * hidden,),
                name("bias_hh"): (4 * hidden,),
            }
    return shapes


def initial_lstm(shapes: Mapping[str, tuple[int, ...]], hidden: int, like: Array, rng: np.random.Generator) -> Tensors:
    bound = 1 / math.sqrt(hidden)
    return {key: to(rng.uniform(-bound, bound, shape), like) for key, shape in shapes.items() if key.startswith(f"{HEAD}.")}


def lstm(p: Tensors, x: Array, layers: int, masks: Sequence[Array] = ()) -> Array:
    """(rows, 2 hidden). `masks` are factors of what each layer but the last hands on."""
    return _outputs(p, x, layers, masks)[-1]


def lstm_vjp(p: Tensors, x: Array, layers: int, masks: Sequence[Array], d: Array) -> tuple[Array, Tensors]:
    """The gradient of x and of every tensor."""
    grads: dict[str, Array] = {}
    entering = [x, *_outputs(p, x, layers, masks)[:-1]]
    for layer in reversed(range(layers)):
        hidden = d.shape[1] // 2
        into = entering[layer]
        both = [_walk_vjp(p, name, into, d[:, n * hidden : (n + 1) * hidden], backwards=bool(n)) for n, name in enumerate(_names(layer))]
        d = both[0][0] + both[1][0]
        grads |= {**both[0][1], **both[1][1]}
        if layer and masks:
            d = d * masks[layer - 1]
    return d, grads


def _outputs(p: Tensors, x: Array, layers: int, masks: Sequence[Array]) -> list[Array]:
    """What leaves each layer, after its mask."""
    xp, outputs = namespace(x), []
    for layer in range(layers):
        both = [_walk(p, name, x, backwards=bool(n)) for n, name in enumerate(_names(layer))]
        x = xp.concat([xp.concat([s.h for s in side]) for side in both], axis=1)
        if masks and layer + 1 < layers:
            x = x * masks[layer]
        outputs.append(x)
    return outputs


class _Name(NamedTuple):
    layer: int
    direction: str

    def __call__(self, tensor: str) -> str:
        return f"{HEAD}.{tensor}_l{self.layer}{self.direction}"


def _names(layer: int) -> tuple[_Name, _Name]:
    return _Name(layer, DIRECTIONS[0]), _Name(layer, DIRECTIONS[1])


def _walk(p: Tensors, name: _Name, x: Array, backwards: bool) -> list[Step]:
    """One direction of one layer: a step for every row of x, in the order of the rows."""
    mT = namespace(x).matrix_transpose
    W, R = mT(p[name("weight_ih")]), mT(p[name("weight_hh")])
    bias = p[name("bias_ih")] + p[name("bias_hh")]
    hidden = R.shape[0]
    h = s = zeros_like((1, hidden), x)
    steps: list[Step] = []
    for t in _order(x, backwards):
        a = x[t : t + 1, :] @ W + h @ R + bias
        i, f, o = (_sigmoid(a[:, n * hidden : (n + 1) * hidden]) for n in (0, 1, 3))
        g = namespace(a).tanh(a[:, 2 * hidden : 3 * hidden])
        s_before, h_before = s, h
        s = +(f * s + i * g)
        h = +(o * namespace(s).tanh(s))
        steps.append(Step(i, f, g, o, s, h, s_before, h_before))
    return steps[::-1] if backwards else steps


def _walk_vjp(p: Tensors, name: _Name, x: Array, d: Array, backwards: bool) -> tuple[Array, Tensors]:
    xp = namespace(d)
    W, R = p[name("weight_ih")], p[name("weight_hh")]
    steps = _walk(p, name, x, backwards)
    dh = ds = zeros_like((1, R.shape[1]), x)
    da: list[Array] = [None] * len(steps)
    for t in reversed(_order(x, backwards)):
        v = steps[t]
        top = xp.tanh(v.s)
        dh = +(dh + d[t : t + 1, :])
        ds = +(ds + dh * v.o * +(1 - top * top))
        di, df, dg = ds * v.g * +(v.i * (1 - v.i)), ds * v.s_before * +(v.f * (1 - v.f)), ds * v.i * +(1 - v.g * v.g)
        da[t] = +xp.concat([di, df, dg, dh * top * +(v.o * (1 - v.o))], axis=1)
        dh, ds = da[t] @ R, ds * v.f
    rows = xp.concat(da)
    before = xp.concat([v.h_before for v in steps])
    db = xp.sum(rows, axis=0)
    return rows @ W, {
        name("weight_ih"): xp.matrix_transpose(rows) @ x,
        name("weight_hh"): xp.matrix_transpose(rows) @ before,
        name("bias_ih"): db,
        name("bias_hh"): db,
    }


def _order(x: Array, backwards: bool) -> list[int]:
    """The rows as they are walked."""
    rows = list(range(x.shape[0]))
    return rows[::-1] if backwards else rows


def _sigmoid(a: Array) -> Array:
    """1 / (1 + exp(-a)), by a function that cannot overflow."""
    return +((1 + namespace(a).tanh(a / 2)) / 2)
