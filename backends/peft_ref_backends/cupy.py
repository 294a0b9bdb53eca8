"""CuPy on the current CUDA device. Written from its documentation: where no GPU is, it says so and is skipped.

Trap: with CUPY_TF32=1 in the environment, float32 matrix products run in TensorFloat32. CuPy reads it once, at the process's first such
product, which may be over: it cannot be put right here and is refused.
"""

from __future__ import annotations

import os
from typing import ClassVar, final

from peft_ref.arrays import Array
from peft_ref.backend import Backend, BackendBroken, BackendMissing, Host


@final
class CupyBackend(Backend):
    name: ClassVar[str] = "cupy"
    library: ClassVar[str] = "cupy"
    install: ClassVar[str] = "pip install 'peft-ref[cupy]'"

    def prepare(self) -> None:
        if os.environ.get("CUPY_TF32", "0") not in ("", "0"):
            raise BackendBroken("backend 'cupy': CUPY_TF32 is set, so float32 products are rounded to 11 bits. Unset it.")
        runtime = self.module.cuda.runtime
        try:
            count = int(runtime.getDeviceCount())
        except runtime.CUDARuntimeError as e:
            raise BackendMissing(f"backend 'cupy': CuPy is installed and finds no CUDA device: {e}") from e
        if count == 0:
            raise BackendMissing("backend 'cupy': CuPy is installed and there is no CUDA device.")

    def hold(self, array: Host) -> Array:
        return self.module.asarray(array)

    def fetch(self, array: Array) -> Host:
        host: Host = self.module.asnumpy(array)
        return host

    @property
    def device(self) -> str:
        return f"cuda:{self.module.cuda.Device().id}"
