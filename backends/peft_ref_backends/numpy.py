"""NumPy: the oracle's own library. Its arrays come in read-only, so whatever writes into an argument fails here."""

from __future__ import annotations

from typing import ClassVar, final

import numpy as np

from peft_ref.arrays import Array
from peft_ref.backend import Backend, Host


@final
class NumpyBackend(Backend):
    name: ClassVar[str] = "numpy"
    library: ClassVar[str] = "numpy"
    install: ClassVar[str] = "pip install numpy"

    def hold(self, array: Host) -> Array:
        array.setflags(write=False)
        return array

    def fetch(self, array: Array) -> Host:
        return np.asarray(array)
