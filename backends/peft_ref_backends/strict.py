"""array-api-strict: the standard and nothing else. What runs here uses no call that only some library has; it also stands in for CuPy,
whose arrays refuse the same mixing of libraries, on a machine without a GPU."""

from __future__ import annotations

from typing import ClassVar, final

import numpy as np

from peft_ref.arrays import Array
from peft_ref.backend import Backend, Host


@final
class StrictBackend(Backend):
    name: ClassVar[str] = "strict"
    library: ClassVar[str] = "array_api_strict"
    install: ClassVar[str] = "pip install 'peft-ref[strict]'"

    def hold(self, array: Host) -> Array:
        return self.module.asarray(array)

    def fetch(self, array: Array) -> Host:
        return np.from_dlpack(array)
