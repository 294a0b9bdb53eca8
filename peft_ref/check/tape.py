"""Reverse-mode gradients of scalar arithmetic, through NumPy object arrays.

A named mistake states only its wrong forward; what its author's autograd would return follows from here. This is never used for a right
answer: those gradients are written by hand.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


class Node:
    """A float that remembers what it was computed from."""

    __slots__ = ("grad", "parents", "value")

    def __init__(self, value: float, parents: tuple[tuple[Node, float], ...] = ()) -> None:
        self.value, self.parents, self.grad = value, parents, 0.0

    def __float__(self) -> float:
        return self.value

    def __add__(self, other: Any) -> Node:
        if isinstance(other, Node):
            return Node(self.value + other.value, ((self, 1.0), (other, 1.0)))
        return Node(self.value + float(other), ((self, 1.0),))

    __radd__ = __add__

    def __mul__(self, other: Any) -> Node:
        if isinstance(other, Node):
            return Node(self.value * other.value, ((self, other.value), (other, self.value)))
        return Node(self.value * float(other), ((self, float(other)),))

    __rmul__ = __mul__

    def __pos__(self) -> Node:
        return self

    def __neg__(self) -> Node:
        return self * -1.0

    def __sub__(self, other: Any) -> Node:
        return self.__add__(-other)

    def __rsub__(self, other: Any) -> Node:
        return (-self).__add__(other)

    def __truediv__(self, other: Any) -> Node:
        if isinstance(other, Node):
            return Node(
                self.value / other.value,
                ((self, 1.0 / other.value), (other, -self.value / other.value**2)),
            )
        return self * (1.0 / float(other))

    def __rtruediv__(self, other: Any) -> Node:
        return Node(float(other) / self.value, ((self, -float(other) / self.value**2),))

    def __abs__(self) -> Node:
        return self if self.value >= 0 else -self

    def sqrt(self) -> Node:
        root = math.sqrt(self.value)
        return Node(root, ((self, 0.5 / root),))

    def tanh(self) -> Node:
        out = math.tanh(self.value)
        return Node(out, ((self, 1.0 - out * out),))

    def exp(self) -> Node:
        out = math.exp(self.value)
        return Node(out, ((self, out),))

    def cos(self) -> Node:
        return Node(math.cos(self.value), ((self, -math.sin(self.value)),))

    def sin(self) -> Node:
        return Node(math.sin(self.value), ((self, math.cos(self.value)),))

    def __gt__(self, other: Any) -> bool:
        return self.value > float(other)

    def __ge__(self, other: Any) -> bool:
        return self.value >= float(other)


def tape_array(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An object array of nodes with the values of `array`; integers stay as they are."""
    if array.dtype.kind in "iub":
        return array
    out = np.empty(array.shape, dtype=object)
    out.reshape(-1)[:] = [Node(v) for v in array.reshape(-1).tolist()]
    return out


def constant(value: Any) -> Any:
    """`value` cut off from what it was computed from."""
    if isinstance(value, Node):
        return value.value
    if isinstance(value, np.ndarray) and value.dtype == object:
        return np.asarray([float(v) for v in value.reshape(-1)]).reshape(value.shape)
    return value


def backward(y: np.ndarray[Any, Any], dy: np.ndarray[Any, Any]) -> None:
    """Sets the gradient of sum(y * dy) in every node that y was computed from."""
    order: list[Node] = []
    seen: set[int] = set()
    todo: list[tuple[Node, bool]] = [(n, False) for n in y.reshape(-1) if isinstance(n, Node)]
    while todo:
        node, done = todo.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            todo.append((node, True))
            todo.extend((parent, False) for parent, _ in node.parents)
    for node, seed in zip(y.reshape(-1), dy.reshape(-1), strict=True):
        if isinstance(node, Node):
            node.grad += float(seed)
    for node in reversed(order):
        for parent, local in node.parents:
            parent.grad += local * node.grad


def gradients(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray([n.grad for n in array.reshape(-1)], dtype=np.float64).reshape(array.shape)
