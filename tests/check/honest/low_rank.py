"""LoRA, AdaLoRA, DoRA and LoHa as an honest port may write them: the same mathematics in many orders, written from the papers' formulas.

Every function takes matrices: X (rows, in), W (out, in), dY (rows, out), all in the arithmetic's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.check.honest.arithmetic import Arithmetic, Host


@dataclass
class LowRank:
    """s B A and, with lora_bias, s c; `m` makes it DoRA, `diagonal` AdaLoRA: its A is E * A, of these two."""

    A: Host
    B: Host
    s: float
    c: Host | None = None
    m: Host | None = None
    diagonal: tuple[Host, Host] | None = None

    def delta(self, a: Arithmetic) -> Host:
        where = a.pick("product", "A", "B")
        A, B = (a.scaled(self.A, self.s), self.B) if where == "A" else (self.A, self.B)
        B = a.scaled(B, self.s) if where == "B" else B
        return a.scaled(a.matmul(B, A), self.s) if where == "product" else a.matmul(B, A)

    def path(self, a: Arithmetic, X: Host) -> Host:
        """s B A x without forming B A, the scale anywhere."""
        where = a.pick("x", "A", "h", "B", "y")
        h = a.matmul(a.scaled(X, self.s) if where == "x" else X, (a.scaled(self.A, self.s) if where == "A" else self.A).T)
        h = a.scaled(h, self.s) if where == "h" else h
        y = a.matmul(h, (a.scaled(self.B, self.s) if where == "B" else self.B).T)
        return a.scaled(y, self.s) if where == "y" else y

    def shift(self, a: Arithmetic) -> Host | None:
        return None if self.c is None else a.scaled(self.c, self.s)

    def merged(self, a: Arithmetic, W: Host) -> Host:
        """W + s B A: the delta formed first, or its terms added to W one by one."""
        if a.pick(True, False):
            return a.add(W, self.delta(a))
        return a.matmul(a.scaled(self.B, self.s), self.A, start=W)

    def factor_gradients(self, a: Arithmetic, X: Host, dY: Host) -> tuple[Host, Host]:
        """dA and dB of s B A x for a gradient dY, through h = A x or through the gradient of the weight."""
        if a.pick(True, False):
            dW = a.matmul(dY.T, X)
            return a.scaled(a.matmul(self.B.T, dW), self.s), a.scaled(a.matmul(dW, self.A.T), self.s)
        early = a.pick(True, False)
        g = a.scaled(dY, self.s) if early else dY
        dA, dB = a.matmul(a.matmul(g, self.B).T, X), a.matmul(g.T, a.matmul(X, self.A.T))
        return (dA, dB) if early else (a.scaled(dA, self.s), a.scaled(dB, self.s))

    def input_gradient(self, a: Arithmetic, dY: Host) -> Host:
        return a.scaled(a.matmul(a.matmul(dY, self.B), self.A), self.s) if a.pick(True, False) else a.matmul(dY, self.delta(a))

    # ---- DoRA

    def directions(self, a: Arithmetic, W: Host) -> Host:
        return self.merged(a, W)

    def row_norms(self, a: Arithmetic, W0: Host) -> Host:
        """The row norms of W0 + s B A; or |W|^2 + 2 s W.BA + s^2 |BA|^2, never formed and in wide numbers, as some do to save memory."""
        if a.pick(True, True, False):
            return a.norm(self.directions(a, W0))
        W, A, B = (v.astype(a.wider) for v in (W0, self.A, self.B))
        cross, gram = (B @ (A @ W.T)).diagonal(), ((B @ (A @ A.T)) * B).sum(axis=1)
        s = a.wider(self.s)
        return np.sqrt((W * W).sum(axis=1) + 2 * s * cross + s * s * gram).astype(a.dtype)

    def gain(self, a: Arithmetic, W0: Host) -> Host:
        """m / n, n the row norms of W0 + s B A; or m times 1 / n."""
        assert self.m is not None
        return a.over(self.m, self.row_norms(a, W0))

    def dora_merged(self, a: Arithmetic, W: Host, W0: Host) -> Host:
        V = self.directions(a, W)
        if a.pick(True, False):
            return self.gain(a, W0)[:, None] * V
        assert self.m is not None
        n = self.row_norms(a, W0)
        return self.m[:, None] * a.over(V, n[:, None])

    def dora_added(self, a: Arithmetic, X: Host, base: Host, W0: Host, base_of_dropped: Host | None = None) -> Host:
        """What HF adds to the frozen layer's output: (m/n - 1) W x + (m/n) s B A x."""
        g = self.gain(a, W0)
        under = base if base_of_dropped is None else base_of_dropped
        return a.add((g - a.number(1.0)) * under, g * self.path(a, X))

    def dora_unmerged(self, a: Arithmetic, W: Host, W0: Host) -> Host:
        back = a.pick("divide", "reciprocal", "norm first")
        if back == "norm first":
            assert self.m is not None
            n = self.row_norms(a, W0)
            return a.add(a.over(W * n[:, None], self.m[:, None]), -self.delta(a))
        g = self.gain(a, W0)[:, None]
        return a.add(W / g if back == "divide" else W * (a.number(1.0) / g), -self.delta(a))

    def dora_gradients(self, a: Arithmetic, dW: Host, W: Host, W0: Host) -> tuple[Host, Host, Host, Host]:
        """dA, dB, dm and the gradient of W, for a gradient dW of the merged weight; n is held constant."""
        assert self.m is not None
        n = self.row_norms(a, W0)
        V = self.directions(a, W)
        dm = a.over(a.sum(dW * V, axis=1), n) if a.pick(True, False) else a.sum(dW * a.over(V, n[:, None]), axis=1)
        dV = a.over(self.m, n)[:, None] * dW if a.pick(True, False) else a.over(self.m[:, None] * dW, n[:, None])
        return a.scaled(a.matmul(self.B.T, dV), self.s), a.scaled(a.matmul(dV, self.A.T), self.s), dm, dV


@dataclass
class Hadamard:
    """s (W1a W1b) * (W2a W2b)."""

    w1_a: Host
    w1_b: Host
    w2_a: Host
    w2_b: Host
    s: float

    def delta(self, a: Arithmetic) -> Host:
        where = a.pick("w1_a", "first", "all")
        first = a.matmul(a.scaled(self.w1_a, self.s) if where == "w1_a" else self.w1_a, self.w1_b)
        first = a.scaled(first, self.s) if where == "first" else first
        both = first * a.matmul(self.w2_a, self.w2_b)
        return a.scaled(both, self.s) if where == "all" else both

    def gradients(self, a: Arithmetic, dW: Host) -> tuple[Host, Host, Host, Host]:
        early = a.pick(True, False)
        d = a.scaled(dW, self.s) if early else dW
        one, two = d * a.matmul(self.w2_a, self.w2_b), d * a.matmul(self.w1_a, self.w1_b)
        grads = (a.matmul(one, self.w1_b.T), a.matmul(self.w1_a.T, one), a.matmul(two, self.w2_b.T), a.matmul(self.w2_a.T, two))
        return grads if early else tuple(a.scaled(g, self.s) for g in grads)
