"""The layers of a prompt's encoder.

    y = x W^T + b,    dx = g W    dW = g^T x    db = sum of g's rows,   W (out, in)    b (out,)

HF      torch.nn.Linear, with its start: both uniform within 1/sqrt(in).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from peft_ref.arrays import Array, namespace, to
from peft_ref.prompts import Tensors


def initial_dense(name: str, shapes: Mapping[str, tuple[int, ...]], like: Array, rng: np.random.Generator) -> Tensors:
    bound = 1 / math.sqrt(shapes[f"{name}.weight"][1])
    return {key: to(rng.uniform(-bound, bound, shapes[key]), like) for key in (f"{name}.weight", f"{name}.bias")}


def dense(name: str, p: Tensors, x: Array) -> Array:
    W = p[f"{name}.weight"]
    return x @ namespace(W).matrix_transpose(W) + p[f"{name}.bias"]


def dense_vjp(name: str, p: Tensors, x: Array, d: Array) -> tuple[Array, Tensors]:
    """The gradient of x (rows, in), and of the layer's two tensors."""
    xp = namespace(d)
    return d @ p[f"{name}.weight"], {f"{name}.weight": xp.matrix_transpose(d) @ x, f"{name}.bias": xp.sum(d, axis=0)}
