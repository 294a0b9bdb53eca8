"""Methods that compute what they add from the frozen weight and bias alone, whatever stands below them: GLoRA, PEANuT, DEFT.

    W' = W + dW(W0, b0)      b' = b + db(W0, b0)

Several of them add up. `contracts` says how a stack of adapters works.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import final

from peft_ref.arrays import Array
from peft_ref.contracts import Delta, P, WeightGradients, WeightMethod, added, taken_out
from peft_ref.errors import NotMergeableError
from peft_ref.layers import Layer


class Conditioned(WeightMethod[P]):
    """W' = W + dW(W0, b0), b' = b + db(W0, b0): what is added is computed from the frozen weight and bias.

    Where no `b0` is given, b is the frozen one.
    """

    @abstractmethod
    def change(self, layer: Layer, p: P, W0: Array, b0: Array | None) -> Delta: ...

    @abstractmethod
    def change_vjp(self, layer: Layer, p: P, W0: Array, b0: Array | None, d: Delta) -> tuple[P, Array | None]:
        """The gradients of p, and of b0 where the change reads it. W0 is frozen, and none is asked of it."""

    @final
    def weight(self, layer: Layer, p: P, W: Array, b: Array | None, W0: Array, b0: Array | None = None) -> tuple[Array, Array | None]:
        return added(self, Delta(W, b), self.change(layer, p, W0, b if b0 is None else b0))

    @final
    def weight_vjp(
        self, layer: Layer, p: P, W: Array, b: Array | None, W0: Array, dW: Array, db: Array | None, b0: Array | None = None
    ) -> WeightGradients[P]:
        params, db0 = self.change_vjp(layer, p, W0, b if b0 is None else b0, Delta(dW, db))
        if b0 is not None or db0 is None or db is None:
            return WeightGradients(params, dW, db, db0)
        return WeightGradients(params, dW, db + db0)

    @final
    def unmerge(self, layer: Layer, p: P, W: Array, b: Array | None, W0: Array, b0: Array | None = None) -> tuple[Array, Array | None]:
        if b is not None and b0 is None:
            raise NotMergeableError(f"{type(self).__name__}: what was added is computed from the frozen bias, and none came.\n  Pass b0.")
        return taken_out(self, Delta(W, b), self.change(layer, p, W0, b0))
