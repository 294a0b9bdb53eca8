"""Methods that act on the whole weight, as an honest port may write them: the same mathematics in other orders.

Each says what it makes of W, how it takes that back, and the gradients of its tensors with that of W, for a gradient dW of what it made.
Everything is a matrix (out, in) in the arithmetic's dtype; W0 is the frozen weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

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


class MiSS(Other):
    """Of both kinds: the block is repeated over columns and, where it is smaller than the weight, over rows."""

    @property
    def D(self) -> Host:
        return self.t["miss_block"]

    def _copies(self, a: Arithmetic, dW: Host) -> Host:
        """Sums over every place of an entry of D."""
        r, q = self.D.shape
        sums = [[a.sum(dW[i::q, j::r].reshape(-1)) for i in range(q)] for j in range(r)]
        return np.asarray(sums).astype(a.dtype)

    def delta(self, a: Arithmetic, W: Host, W0: Host) -> Host:
        r, q = self.D.shape
        return self.D.T[np.arange(self.shape[0]) % q][:, np.arange(self.shape[1]) % r]

    def gradients(self, a: Arithmetic, dW: Host, W: Host, W0: Host) -> Tensors:
        return {"miss_block": self._copies(a, dW)}


class MiSSBat(Other):
    def _placed(self, what: Callable[[Host, Host], Host], W: Host) -> Host:
        """Every block of W by `what`, given the block and its D."""
        D, out = self.t["miss_block"], np.array(W)
        r = D.shape[-1]
        for i in range(0, self.shape[0], r):
            for j in range(0, self.shape[1], r):
                out[i : i + r, j : j + r] = what(W[i : i + r, j : j + r], D[i // r])
        return out

    def delta(self, a: Arithmetic, W: Host, W0: Host) -> Host:
        return self._placed(lambda block, D: a.matmul(block, D, start=D), W)

    def merged(self, a: Arithmetic, W: Host, W0: Host) -> Host:
        if a.pick(True, False):
            return super().merged(a, W, W0)
        one = a.array(np.eye(self.t["miss_block"].shape[-1]))
        return self._placed(lambda block, D: a.matmul(block, one + D, start=D), W)

    def unmerged(self, a: Arithmetic, W: Host, W0: Host) -> Host:
        """The blocks of the cases are triangular, so their inverse is exact."""

        def back(block: Host, D: Host) -> Host:
            inverse = np.linalg.inv(np.eye(len(D)) + D.astype(np.float64)).astype(a.dtype)
            return a.matmul(block - D, inverse)

        return self._placed(back, W)

    def gradients(self, a: Arithmetic, dW: Host, W: Host, W0: Host) -> Tensors:
        D, r = self.t["miss_block"], self.t["miss_block"].shape[-1]
        blocks = []
        for i in range(0, self.shape[0], r):
            row, grad = W[i : i + r], dW[i : i + r]
            parts = [a.matmul(row[:, j : j + r].T, grad[:, j : j + r]) for j in range(0, self.shape[1], r)]
            blocks.append(a.add(*parts, *(grad[:, j : j + r] for j in range(0, self.shape[1], r))))
        return {"miss_block": np.stack(blocks).reshape(D.shape)}

    def through(self, a: Arithmetic, dW: Host) -> Host:
        one = a.array(np.eye(self.t["miss_block"].shape[-1]))
        return self._placed(lambda block, D: a.matmul(block, (one + D).T), dW)


class LoKr(Other):
    def _parts(self, a: Arithmetic) -> tuple[Host, Host]:
        t = {k.removeprefix("lokr_"): v for k, v in self.t.items()}
        w1 = t["w1"] if "w1" in t else a.matmul(t["w1_a"], t["w1_b"])
        if "w2" in t:
            return w1, t["w2"].reshape(len(t["w2"]), -1)
        if "t2" not in t:
            return w1, a.matmul(t["w2_a"], t["w2_b"])
        core = t["t2"].reshape(*t["t2"].shape[:2], -1)
        slices = [a.matmul(a.matmul(t["w2_a"].T, core[:, :, k]), t["w2_b"]) for k in range(core.shape[2])]
        return w1, np.stack(slices, axis=-1).reshape(t["w2_a"].shape[1], -1)

    @property
    def s(self) -> float:
        return float(self.config["alpha"] / self.config["r"])

    def _blocks(self, w1: Host, w2: Host) -> Host:
        """Where each product w1[a, c] w2[b, e] stands in the weight: indices into vec(w1) vec(w2)^T."""
        at = np.arange(w1.size * w2.size).reshape(w1.size, w2.size)
        if "lokr_w2" in self.t and self.t["lokr_w2"].ndim == 3:  # HF on a 1-d convolution
            o2, i2, k = self.t["lokr_w2"].shape
            return at.reshape(*w1.shape, o2, i2, k).transpose(2, 0, 3, 1, 4).reshape(self.shape)
        return at.reshape(*w1.shape, *w2.shape).transpose(0, 2, 1, 3).reshape(self.shape)

    def delta(self, a: Arithmetic, W: Host, W0: Host) -> Host:
        w1, w2 = self._parts(a)
        early = a.pick(True, False)
        products = (a.scaled(w1, self.s) if early else w1).reshape(-1, 1) * w2.reshape(1, -1)
        placed = products.reshape(-1)[self._blocks(w1, w2)]
        return placed if early else a.scaled(placed, self.s)

    def gradients(self, a: Arithmetic, dW: Host, W: Host, W0: Host) -> Tensors:
        w1, w2 = self._parts(a)
        R = np.zeros(w1.size * w2.size, dtype=dW.dtype)
        R[self._blocks(w1, w2).reshape(-1)] = a.scaled(dW, self.s).reshape(-1)
        R = R.reshape(w1.size, w2.size)
        d1 = a.matmul(R, w2.reshape(-1, 1)).reshape(w1.shape)
        d2 = a.matmul(w1.reshape(1, -1), R).reshape(w2.shape)
        t = {k.removeprefix("lokr_"): v for k, v in self.t.items()}
        out = {"lokr_w1": d1} if "w1" in t else {"lokr_w1_a": a.matmul(d1, t["w1_b"].T), "lokr_w1_b": a.matmul(t["w1_a"].T, d1)}
        if "w2" in t:
            return {**out, "lokr_w2": d2}
        if "t2" not in t:
            return {**out, "lokr_w2_a": a.matmul(d2, t["w2_b"].T), "lokr_w2_b": a.matmul(t["w2_a"].T, d2)}
        core = t["t2"].reshape(*t["t2"].shape[:2], -1)
        d2 = d2.reshape(t["w2_a"].shape[1], t["w2_b"].shape[1], -1)
        n = range(core.shape[2])
        d_core = np.stack([a.matmul(a.matmul(t["w2_a"], d2[:, :, k]), t["w2_b"].T) for k in n], axis=-1)
        d_a = a.add(*(a.matmul(a.matmul(core[:, :, k], t["w2_b"]), d2[:, :, k].T) for k in n))
        d_b = a.add(*(a.matmul(a.matmul(core[:, :, k].T, t["w2_a"]), d2[:, :, k]) for k in n))
        return {**out, "lokr_w2_a": d_a, "lokr_w2_b": d_b, "lokr_t2": d_core}


class GraLoRA(Other):
    @property
    def s(self) -> float:
        return float(self.config["alpha"] / (self.config["r"] + self.config["hybrid_r"]))

    def _parts(self) -> list[tuple[int, int, slice, slice, slice, slice]]:
        """Per block: its row and column of blocks, its rows and columns of the weight, the ranks in B_j and in A_n."""
        k, r = self.config["gralora_k"], self.config["r"]
        t, rows, columns = r // k, self.shape[0] // k, self.shape[1] // k
        at = [(j, n) for j in range(k) for n in range(k)]
        own = lambda i, size: slice(i * size, i * size + size)  # noqa: E731
        return [(j, n, own(j, rows), own(n, columns), own(n, t), own(j, t)) for j, n in at]

    def delta(self, a: Arithmetic, W: Host, W0: Host) -> Host:
        A, B, out = self.t["gralora_A"], self.t["gralora_B"], np.zeros(self.shape, dtype=a.dtype)
        for j, n, rows, columns, in_B, in_A in self._parts():
            out[rows, columns] = a.matmul(B[j][in_B].T, A[n][:, in_A].T)
        if self.config["hybrid_r"]:
            out = a.add(out, a.matmul(self.t["gralora_B_general.weight"], self.t["gralora_A_general.weight"]))
        return a.scaled(out, self.s)

    def gradients(self, a: Arithmetic, dW: Host, W: Host, W0: Host) -> Tensors:
        A, B, G = self.t["gralora_A"], self.t["gralora_B"], a.scaled(dW, self.s)
        dA, dB = np.zeros(A.shape, dtype=a.dtype), np.zeros(B.shape, dtype=a.dtype)
        for j, n, rows, columns, in_B, in_A in self._parts():
            dB[j][in_B] = a.matmul(A[n][:, in_A].T, G[rows, columns].T)
            dA[n][:, in_A] = a.matmul(G[rows, columns].T, B[j][in_B].T)
        out = {"gralora_A": dA, "gralora_B": dB}
        if self.config["hybrid_r"]:
            out["gralora_A_general.weight"] = a.matmul(self.t["gralora_B_general.weight"].T, G)
            out["gralora_B_general.weight"] = a.matmul(G, self.t["gralora_A_general.weight"].T)
        return out


OTHERS: dict[str, type[Other]] = {"gralora": GraLoRA, "hira": HiRA, "lokr": LoKr, "miss": MiSS, "miss_bat": MiSSBat, "miss_mini": MiSS}
