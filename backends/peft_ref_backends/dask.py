"""Dask arrays: lazy, so this backend shows whether anything needs a value before its time. Computed in one thread, the same each time.

Every array is one chunk: Dask's linalg and fft ask for that along the axes they work on.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import ClassVar, final

import numpy as np

from peft_ref.arrays import Array
from peft_ref.backend import Backend, Host


@final
class DaskBackend(Backend):
    name: ClassVar[str] = "dask"
    library: ClassVar[str] = "dask.array"
    install: ClassVar[str] = "pip install 'peft-ref[dask]'"

    def hold(self, array: Host) -> Array:
        return self.module.from_array(array, chunks=-1)

    def fetch(self, array: Array) -> Host:
        return np.asarray(array.compute(scheduler="synchronous"))

    def settle(self, arrays: Sequence[Array]) -> list[Array]:
        from dask.base import persist

        return list(persist(*arrays, scheduler="synchronous"))

    @property
    def version(self) -> str:
        return importlib.metadata.version("dask")
