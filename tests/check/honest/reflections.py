"""HRA as an honest port may write it: reflection by reflection, or one dense matrix first."""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np

from tests.check.honest.arithmetic import Arithmetic, Host


class Gradients(NamedTuple):
    u: Host
    W: Host


@final
class Reflections:
    """The vectors u (in, r) of one adapter, in one arithmetic."""

    def __init__(self, u: Host, a: Arithmetic, orthogonal: bool) -> None:
        self.u, self.a = u, a
        self.normals: list[Host] = []
        self.left: list[Host] = []
        for k in range(u.shape[1]):
            v = u[:, k]
            for n in self.normals if orthogonal else ():
                v = a.add(v, -(n * self.dot(n, v)))
            self.left.append(v)
            self.normals.append(a.over(v, self.length(v)))
        self.orthogonal = orthogonal

    def dot(self, v: Host, w: Host) -> Host:
        return self.a.sum(v * w)

    def length(self, v: Host) -> Host:
        return self.a.norm(v[None, :])[0]

    def reflect(self, W: Host, n: Host) -> Host:
        a, two = self.a, self.a.number(2.0)
        return a.add(W, -(two * a.matmul(W, n[:, None]) * n))

    def matrix(self, normals: list[Host]) -> Host:
        """The product of the reflections as a dense matrix; with orthonormal vectors 1 - 2 N N^T."""
        R = self.a.array(np.eye(len(normals[0])))
        if self.orthogonal and self.a.pick(True, False):
            N = np.stack(normals, axis=1)
            return self.a.add(R, -self.a.matmul(self.a.number(2.0) * N, N.T))
        for n in normals:
            R = self.reflect(R, n)
        return R

    def merged(self, W: Host, back: bool = False) -> Host:
        normals = self.normals[::-1] if back else self.normals
        if self.a.pick(True, False):
            return self.a.matmul(W, self.matrix(normals))
        for n in normals:
            W = self.reflect(W, n)
        return W

    def gradients(self, dW: Host, W: Host) -> Gradients:
        a, two = self.a, self.a.number(2.0)
        before = [W]
        for n in self.normals[:-1]:
            before.append(self.reflect(before[-1], n))
        d = []
        for n, V in zip(reversed(self.normals), reversed(before), strict=True):
            d.append(-(two * a.add(a.matmul(a.matmul(n[None, :], dW.T), V)[0], a.matmul(a.matmul(n[None, :], V.T), dW)[0])))
            dW = self.reflect(dW, n)
        d.reverse()
        du: list[Host] = []
        for k in reversed(range(len(d))):
            n, v, u = self.normals[k], self.left[k], self.u[:, k]
            dv = a.over(a.add(d[k], -(n * self.dot(n, d[k]))), self.length(v))
            back = dv
            for m in self.normals[:k] if self.orthogonal else ():
                back = a.add(back, -(m * self.dot(m, dv)))
            for j in range(k) if self.orthogonal else ():
                m = self.normals[j]
                d[j] = a.add(d[j], -(self.dot(m, u) * dv), -(self.dot(m, dv) * u))
            du.append(back)
        return Gradients(np.stack(du[::-1], axis=1), dW)
