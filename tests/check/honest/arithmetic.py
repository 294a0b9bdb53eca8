"""Arithmetic as an honest implementation may do it: in float32, float16 or bfloat16, rounded after every operation, sums in any order.

A decision that an implementation is free to take is drawn from `rng`; two runs with the same seed decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

Host: TypeAlias = Any  # an array; NumPy's types do not know ml_dtypes

DTYPES: dict[str, Any] = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
WIDER: dict[str, Any] = {"float64": np.longdouble, "float32": np.float64, "float16": np.float32, "bfloat16": np.float32}
ORDERS = ("given", "reversed", "shuffled", "pairwise", "tree", "largest first", "smallest first", "wide accumulator", "fused multiply-add")


class Arithmetic:
    """Elementwise operations and sums in one dtype and, unless told, one order of summation for the whole run."""

    def __init__(self, dtype: str, rng: np.random.Generator, order: str | None = None) -> None:
        self.dtype: Any = DTYPES[dtype]
        self.wider: Any = WIDER[dtype]
        self.rng = rng
        self.order = order or ORDERS[int(rng.integers(len(ORDERS)))]

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def array(self, value: Any) -> Host:
        return np.asarray(value).astype(self.dtype)

    def number(self, value: float) -> Host:
        """A constant, rounded to the dtype."""
        return np.asarray(value).astype(self.dtype)

    def add(self, *terms: Host) -> Host:
        """A sum of a few arrays, in any order."""
        at = self.rng.permutation(len(terms))
        total = terms[at[0]]
        for i in at[1:]:
            total = total + terms[i]
        return total

    def over(self, a: Host, b: Host) -> Host:
        """a / b, or a times the reciprocal of b."""
        return a / b if self.pick(True, False) else a * (self.number(1.0) / b)

    def scaled(self, array: Host, s: float) -> Host:
        """s times an array: s rounded to the dtype first, or a wide constant and one rounding."""
        if self.pick(True, False):
            return array * self.number(s)
        return (array.astype(self.wider) * self.wider(s)).astype(self.dtype)

    def sum(self, terms: Host, axis: int = 0) -> Host:
        parts = np.moveaxis(terms, axis, 0)
        if parts.shape[0] == 0:
            return np.zeros(parts.shape[1:], dtype=self.dtype)
        return _SUMS[self.order](self, parts)

    def matmul(self, a: Host, b: Host, start: Host | None = None) -> Host:
        """a (m, k) times b (k, n), and `start` (m, n or broadcast) as one more term of every sum."""
        if self.order == "fused multiply-add":
            total = np.zeros((a.shape[0], b.shape[1]), dtype=self.dtype)
            total = total if start is None else total + start
            for k in range(a.shape[1]):  # the product is exact in the wider format
                product = a[:, k, None].astype(self.wider) * b[None, k, :].astype(self.wider)
                total = (total.astype(self.wider) + product).astype(self.dtype)
            return total
        products = a[:, :, None] * b[None, :, :]
        if start is not None:
            first = np.broadcast_to(start, (a.shape[0], b.shape[1]))[:, None, :]
            products = np.concatenate([first, products], axis=1)
        return self.sum(products, axis=1)

    def norm(self, V: Host) -> Host:
        """The Euclidean norm of every row, in the dtype or in a wider one."""
        if self.pick(True, False):
            return np.sqrt(self.sum(V * V, axis=1))
        wide = V.astype(self.wider)
        return np.sqrt(np.sum(wide * wide, axis=1)).astype(self.dtype)


def _in_turn(arithmetic: Arithmetic, parts: Sequence[Host] | Host) -> Host:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _pairwise(arithmetic: Arithmetic, parts: Host) -> Host:
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return _pairwise(arithmetic, parts[:half]) + _pairwise(arithmetic, parts[half:])


def _tree(arithmetic: Arithmetic, parts: Host) -> Host:
    """Two at random become one, until one is left."""
    left = list(parts)
    while len(left) > 1:
        i, j = arithmetic.rng.choice(len(left), 2, replace=False)
        left = [part for k, part in enumerate(left) if k not in (i, j)] + [left[i] + left[j]]
    return left[0]


def _sorted(sign: int) -> Callable[[Arithmetic, Host], Host]:
    def ordered(arithmetic: Arithmetic, parts: Host) -> Host:
        at = np.argsort(sign * np.abs(parts.astype(np.float64)), axis=0)
        return _in_turn(arithmetic, np.take_along_axis(parts, at, axis=0))

    return ordered


def _wide(arithmetic: Arithmetic, parts: Host) -> Host:
    return np.sum(parts.astype(arithmetic.wider), axis=0).astype(arithmetic.dtype)


_SUMS: dict[str, Callable[[Arithmetic, Host], Host]] = {
    "given": _in_turn,
    "reversed": lambda arithmetic, parts: _in_turn(arithmetic, parts[::-1]),
    "shuffled": lambda arithmetic, parts: _in_turn(arithmetic, parts[arithmetic.rng.permutation(len(parts))]),
    "pairwise": _pairwise,
    "tree": _tree,
    "largest first": _sorted(-1),
    "smallest first": _sorted(1),
    "wide accumulator": _wide,
    "fused multiply-add": _in_turn,
}
