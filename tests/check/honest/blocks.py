"""OFT as an honest port may write it: block by block, or one dense matrix, its inverse by elimination or by LAPACK."""

from __future__ import annotations

import math
from typing import Any, final

import numpy as np

from tests.check.honest.arithmetic import Arithmetic, Host


@final
class Blocks:
    """The numbers of one adapter, in one arithmetic; `size` is what is turned."""

    def __init__(self, numbers: Host, config: Any, size: int, a: Arithmetic) -> None:
        self.a, self.config = a, config
        b = (1 + math.isqrt(1 + 8 * numbers.shape[1])) // 2
        self.b, self.n = b, size // b
        upper = np.triu_indices(b, 1)
        self.upper = upper
        if config["coft"]:
            limit = config["eps"] / math.sqrt(numbers.shape[0])
            for k in range(numbers.shape[0]):
                length = np.sqrt(a.number(2.0) * a.sum(numbers[k] * numbers[k]))
                if float(length) > limit:
                    numbers[k] = a.over(numbers[k] * a.number(limit), length)
        self.Q = []
        for row in numbers:
            Q = np.zeros((b, b), dtype=row.dtype)
            Q[upper] = row
            self.Q.append(Q - Q.T)
        self.R = [self.rotation(Q) for Q in self.Q]

    def terms(self) -> list[float]:
        t = self.config["num_cayley_neumann_terms"]
        return [1.0] + ([2.0] * (t - 1) if t <= 2 else [2.0] * max(t - 2, 2) + [1.0])

    def one(self) -> Host:
        return self.a.array(np.eye(self.b))

    def inverse(self, A: Host) -> Host:
        """In a wider format, or by elimination in this one."""
        a = self.a
        if a.pick(True, False) and a.dtype != np.float64:
            return np.linalg.inv(A.astype(np.float64)).astype(a.dtype)
        M = np.concatenate([A, self.one()], axis=1)
        for j in range(self.b):
            M[j] = a.over(M[j], M[j, j])
            for i in range(self.b):
                if i != j:
                    M[i] = M[i] - M[i, j] * M[j]
        return M[:, self.b :]

    def rotation(self, Q: Host) -> Host:
        a = self.a
        if not self.config["use_cayley_neumann"]:
            return a.matmul(a.add(self.one(), -Q), self.inverse(a.add(self.one(), Q)))
        c = self.terms()
        if a.pick(True, False):
            R = a.number(c[-1]) * self.one()
            for k in reversed(c[:-1]):
                R = a.add(a.number(k) * self.one(), a.matmul(Q, R))
            return R
        parts, power = [self.one()], self.one()
        for k in c[1:]:
            power = a.matmul(power, Q)
            parts.append(a.number(k) * power)
        return a.add(*parts)

    def of(self, i: int) -> Host:
        return self.R[0 if len(self.R) == 1 else i]

    def turned(self, V: Host, back: bool = False) -> Host:
        """V M^T; `back` V times its transposed. V is (m, n b)."""
        parts = []
        for i in range(self.n):
            F = self.of(i) if back else self.of(i).T
            parts.append(self.a.matmul(V[:, i * self.b : (i + 1) * self.b], F))
        return np.concatenate(parts, axis=1)

    def undone(self, V: Host) -> Host:
        if not self.config["use_cayley_neumann"]:
            return self.turned(V, back=True)
        inverses = [self.inverse(R.T) for R in self.R]
        parts = [self.a.matmul(V[:, i * self.b : (i + 1) * self.b], inverses[0 if len(inverses) == 1 else i]) for i in range(self.n)]
        return np.concatenate(parts, axis=1)

    def gradient(self, dV: Host, V: Host) -> Host:
        a, rows = self.a, []
        each = [a.matmul(dV[:, i * self.b : (i + 1) * self.b].T, V[:, i * self.b : (i + 1) * self.b]) for i in range(self.n)]
        dRs = [a.add(*each)] if len(self.Q) == 1 else each
        for Q, dR in zip(self.Q, dRs, strict=True):
            if self.config["use_cayley_neumann"]:
                parts, c = [np.zeros_like(Q)], self.terms()
                powers = [self.one()]
                for _ in c[1:]:
                    powers.append(a.matmul(powers[-1], Q))
                for k in range(1, len(c)):
                    for i in range(k):
                        parts.append(a.number(c[k]) * a.matmul(a.matmul(powers[i].T, dR), powers[k - 1 - i].T))
                dQ = a.add(*parts)
            else:
                AT = self.inverse(a.add(self.one(), Q)).T
                dQ = a.number(-2.0) * a.matmul(a.matmul(AT, dR), AT)
            rows.append((dQ - dQ.T)[self.upper])
        return np.stack(rows)
