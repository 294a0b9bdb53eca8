"""Methods that act on the whole weight, as an honest port may write them: the same mathematics in other orders.

Each says what it makes of W, how it takes that back, and the gradients of its tensors with that of W, for a gradient dW of what it made.
Everything is a matrix (out, in) in the arithmetic's dtype; W0 is the frozen weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from tests.check.honest.arithmetic import Arithmetic, Host

Tensors = Mapping[str, Host]


class Other(ABC):
    def __init__(self, tensors: Tensors, config: Mapping[str, Any], shape: tuple[int, int], kernel: int) -> None:
        self.t, self.config, self.shape, self.kernel = tensors, config, shape, kernel

    @abstractmethod
    def delta(self, a: Arithmetic, W: Host, W0: Host) -> Host: ...

    @abstractmethod
    def gradients(self, a: Arithmetic, dW: Host, W: Host, W0: Host) -> Tensors: ...

    def merged(self, a: Arithmetic, W: Host, W0: Host) -> Host:
        return a.add(W, self.delta(a, W, W0))

    def unmerged(self, a: Arithmetic, W: Host, W0: Host) -> Host:
        return a.add(W, -self.delta(a, W, W0))

    def through(self, a: Arithmetic, dW: Host) -> Host:
        """The gradient of W."""
        return dW


class HiRA(Other):
    def _factors(self) -> tuple[Host, Host]:
        A, B = (next(v for k, v in self.t.items() if k.endswith(letter)) for letter in "AB")
        return A.reshape(A.shape[0], -1), B.reshape(B.shape[0], -1)

    def delta(self, a: Arithmetic, W: Host, W0: Host) -> Host:
        A, B = self._factors()
        if a.pick(True, False):
            return W0 * a.matmul(B, A)
        return a.sum(B.T[:, :, None] * W0[None] * A[:, None, :])

    def gradients(self, a: Arithmetic, dW: Host, W: Host, W0: Host) -> Tensors:
        A, B = self._factors()
        M = dW * W0
        return {"A": a.matmul(B.T, M), "B": a.matmul(M, A.T)}


OTHERS: dict[str, type[Other]] = {"hira": HiRA}
