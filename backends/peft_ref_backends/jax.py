"""JAX on its default device.

Traps: JAX turns float64 into float32 unless x64 is enabled, when an array is made and again at every operation; and on accelerators a
float32 matrix product runs in lower precision by default. Both switches are set in the scope only, for this thread: a float64 array that
is used outside `backend.scope()` is silently rounded to float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import ClassVar, final

import numpy as np

from peft_ref.arrays import Array
from peft_ref.backend import Backend, Host


@final
class JaxBackend(Backend):
    name: ClassVar[str] = "jax"
    library: ClassVar[str] = "jax"
    install: ClassVar[str] = "pip install 'peft-ref[jax]'"

    @contextmanager
    def scope(self) -> Iterator[None]:
        jax = self.module
        home = jax if "enable_x64" in vars(jax) else import_module("jax.experimental")  # where older versions keep it
        with home.enable_x64(True), jax.default_matmul_precision("highest"):
            yield

    def hold(self, array: Host) -> Array:
        return self.module.numpy.asarray(array)

    def fetch(self, array: Array) -> Host:
        return np.asarray(array)

    @property
    def device(self) -> str:
        return str(self.module.devices()[0])
