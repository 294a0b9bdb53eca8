"""MLX on the CPU, the only device where it has float64.

MLX follows the array API but for a few calls, which `_Namespace` puts right; `peft_ref.arrays` is told to use it for MLX's arrays.
Its FFT computes in complex64 only, so `fft` is not among the extensions. Arrays are lazy and computed when fetched.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar, final

import numpy as np

from peft_ref.arrays import Array, register_namespace
from peft_ref.backend import Backend, Host

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
class _Namespace:
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


@final
class MlxBackend(Backend):
    name: ClassVar[str] = "mlx"
    library: ClassVar[str] = "mlx.core"
    install: ClassVar[str] = "pip install 'peft-ref[mlx]'"
    extensions: ClassVar[frozenset[str]] = frozenset({"linalg"})

    def prepare(self) -> None:
        register_namespace(self.module.array, _Namespace(self.module))

    def scope(self) -> AbstractContextManager[Any]:
        on_cpu: AbstractContextManager[Any] = self.module.stream(self.module.cpu)
        return on_cpu

    def hold(self, array: Host) -> Array:
        return self.module.array(array, dtype=getattr(self.module, array.dtype.name if array.dtype != bool else "bool_"))

    def fetch(self, array: Array) -> Host:
        return np.array(array)
