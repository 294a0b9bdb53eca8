"""MLX's array namespace with the few calls put right in which it does not follow the array API, or not to float64."""

from __future__ import annotations

import math
from typing import Any, final

from peft_ref.arrays import Array

# The creation functions of the standard. MLX's have no `device`: an array lives where it is used.
CREATION = frozenset({"arange", "asarray", "empty", "eye", "full", "linspace", "ones", "zeros", "ones_like", "zeros_like", "full_like"})


class _Linalg:
    def __init__(self, mx: Any) -> None:
        self._mx = mx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mx.linalg, name)

    def svd(self, x: Array, /, *, full_matrices: bool = True) -> tuple[Array, Array, Array]:
        """MLX's svd is always the full one."""
        U, S, Vh = self._mx.linalg.svd(x)
        k = S.shape[-1]
        return (U, S, Vh) if full_matrices else (U[..., :k], S, Vh[..., :k, :])


@final
class Namespace:
    def __init__(self, mx: Any) -> None:
        self._mx = mx
        self.linalg = _Linalg(mx)
        self.bool = mx.bool_

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._mx, name)
        if name not in CREATION:
            return found

        def create(*args: Any, device: Any = None, **options: Any) -> Array:
            return found(*args, **options)

        return create

    def exp(self, x: Array, /) -> Array:
        """MLX's own is right to float32 only; its expm1 is right, and e^-x = 1 / e^x loses no digits."""
        if x.dtype != self._mx.float64:
            return self._mx.exp(x)
        grown = self._mx.expm1(self._mx.abs(x)) + 1
        return self._mx.where(x < 0, 1 / grown, grown)

    def argsort(self, x: Array, /, *, axis: int = -1, descending: bool = False, stable: bool = True) -> Array:
        """MLX's is always stable and ascending."""
        return self._mx.argsort(-x if descending else x, axis=axis)

    def cos(self, x: Array, /) -> Array:
        """MLX's own is right to float32 only, and so is its sin."""
        return self._mx.cos(x) if x.dtype != self._mx.float64 else self._series(x, 0)

    def sin(self, x: Array, /) -> Array:
        return self._mx.sin(x) if x.dtype != self._mx.float64 else self._series(x, 1)

    def _series(self, x: Array, first: int) -> Array:
        """1 - y^2 / 2! + ... or y - y^3 / 3! + ..., for y = x less its whole turns: at most pi, where 16 terms leave nothing."""
        y = x - 2 * math.pi * self._mx.round(x / (2 * math.pi))
        total = term = y if first else self._mx.ones_like(y)
        for k in range(first + 2, first + 34, 2):
            term = -term * y * y / (k * (k - 1))
            total = total + term
        return total
