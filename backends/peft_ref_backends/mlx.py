"""MLX on the CPU, the only device where it has float64.

MLX follows the array API but for a few calls, which `mlx_namespace` puts right; `peft_ref.arrays` is told to use it for MLX's arrays.
Its FFT computes in complex64 only, so `fft` is not among the extensions. Arrays are lazy and computed when fetched.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar, final

import numpy as np

from peft_ref.arrays import Array, register_namespace
from peft_ref.backend import Backend, Host
from peft_ref_backends.mlx_namespace import Namespace


@final
class MlxBackend(Backend):
    name: ClassVar[str] = "mlx"
    library: ClassVar[str] = "mlx.core"
    install: ClassVar[str] = "pip install 'peft-ref[mlx]'"
    extensions: ClassVar[frozenset[str]] = frozenset({"linalg"})

    def prepare(self) -> None:
        register_namespace(self.module.array, Namespace(self.module))

    def scope(self) -> AbstractContextManager[Any]:
        on_cpu: AbstractContextManager[Any] = self.module.stream(self.module.cpu)
        return on_cpu

    def hold(self, array: Host) -> Array:
        return self.module.array(array, dtype=getattr(self.module, array.dtype.name if array.dtype != bool else "bool_"))

    def fetch(self, array: Array) -> Host:
        return np.array(array)
