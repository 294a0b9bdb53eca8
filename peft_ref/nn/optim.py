"""Optimisers as pure functions of a tree of arrays (peft_ref/nn/tree.py): the arithmetic of torch.optim, element by element.

    AdamW   m = b1 m + (1 - b1) g       v = b2 v + (1 - b2) g^2                                                  at step t = 1, 2, ...
            p = (1 - lr w) p  -  lr / (1 - b1^t)  m / (sqrt(v / (1 - b2^t)) + eps)                               w: weight_decay
    SGD     g = g + w p      u = c u + (1 - d) g, at first u = g       p = p - lr u,  or  p - lr (g + c u) with nesterov
            c: momentum, without which u is g;  d: dampening

    clip    g min(1, c / (|g| + 1e-6)),    |g| the Euclidean norm of all gradients together

A gradient of None leaves its parameter and what is remembered of it as they were.

Paper   Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2: there weight decay is not multiplied by lr, in torch it is
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, final

from peft_ref.arrays import Array, namespace, zeros_like
from peft_ref.errors import ConfigError
from peft_ref.nn.tree import leaves, mapped

T = TypeVar("T")


class AdamWState(NamedTuple):
    step: int  # how many were made
    m: Any  # trees like the parameters'
    v: Any


@final
@dataclass(frozen=True, kw_only=True)
class AdamW:
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={self.betas}: two weights from 0 to below 1 are needed.")
        _not_negative(self, "eps", "weight_decay")

    def init(self, params: Any) -> AdamWState:
        zeros = mapped(lambda p: zeros_like(tuple(p.shape), p), params)
        return AdamWState(0, zeros, zeros)

    def update(self, state: AdamWState, params: T, grads: T, lr: float) -> tuple[AdamWState, T]:
        """The state and the parameters after one step."""
        step, (b1, b2) = state.step + 1, self.betas
        m = mapped(lambda m, g: m if g is None else b1 * m + (1 - b1) * g, state.m, grads)
        v = mapped(lambda v, g: v if g is None else b2 * v + (1 - b2) * (g * g), state.v, grads)
        rate, root = lr / (1 - b1**step), math.sqrt(1 - b2**step)

        def moved(p: Array, g: Array | None, m: Array, v: Array) -> Array:
            return p if g is None else (1 - lr * self.weight_decay) * p - rate * (m / (namespace(v).sqrt(v) / root + self.eps))

        return AdamWState(step, m, v), mapped(moved, params, grads, m, v)


class SGDState(NamedTuple):
    step: int
    u: Any  # a tree like the parameters', None without momentum


@final
@dataclass(frozen=True, kw_only=True)
class SGD:
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _not_negative(self, "momentum", "weight_decay")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ConfigError("nesterov=True needs a momentum and no dampening (torch refuses it too).")

    def init(self, params: Any) -> SGDState:
        return SGDState(0, mapped(lambda p: zeros_like(tuple(p.shape), p), params) if self.momentum else None)

    def update(self, state: SGDState, params: T, grads: T, lr: float) -> tuple[SGDState, T]:
        """The state and the parameters after one step."""
        c, new = self.momentum, 1.0 if state.step == 0 else 1 - self.dampening
        full = mapped(lambda p, g: 0 * p if g is None else g + self.weight_decay * p, params, grads)
        u = mapped(lambda u, g, d: u if g is None else c * u + new * d, state.u, grads, full) if c else None
        way = full if u is None else mapped(lambda g, u: g + c * u, full, u) if self.nesterov else u
        return SGDState(state.step + 1, u), mapped(lambda p, g, d: p if g is None else p - lr * d, params, grads, way)


class Clipped(NamedTuple):
    grads: Any
    norm: Array  # before


def global_norm(grads: Any) -> Array:
    squares = [namespace(g).sum(g * g) for _, g in leaves(grads)]
    if not squares:
        raise ConfigError("there are no gradients whose norm could be taken.")
    return namespace(squares[0]).sqrt(sum(squares[1:], squares[0]))


def clip_by_global_norm(grads: Any, most: float) -> Clipped:
    """torch's clip_grad_norm_. What is not finite stays so, everywhere."""
    norm = global_norm(grads)
    xp = namespace(norm)
    factor = most / (norm + 1e-6)
    factor = xp.where(factor > 1, xp.ones_like(factor), factor)
    return Clipped(mapped(lambda g: g * factor, grads), norm)


def _not_negative(optimiser: AdamW | SGD, *names: str) -> None:
    for name in names:
        if (value := getattr(optimiser, name)) < 0:
            raise ConfigError(f"{name}={value}: it cannot be negative (torch refuses it too).")
