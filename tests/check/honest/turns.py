"""RoAd as an honest port may write it: pair by pair through indices, or one dense matrix."""

from __future__ import annotations

from typing import Any, final

import numpy as np

from tests.check.honest.arithmetic import Arithmetic, Host


@final
class Turns:
    """The angles and stretches of one adapter on `out` outputs, in one arithmetic."""

    def __init__(self, theta: Host, alpha: Host, config: Any, out: int, a: Arithmetic) -> None:
        self.a, self.theta, self.alpha, g = a, theta, alpha, int(config["group_size"])
        i = np.arange(out)
        upper = i % g < g // 2
        self.partner = np.where(upper, i + g // 2, i - g // 2)
        self.sign = a.array(np.where(upper, -1.0, 1.0))
        # Which number makes the c, and which the s, of every output.
        per_pair = i // g * (g // 2) + i % (g // 2)
        per_kind = i // g * 2 * g + i % g
        self.of_c, self.of_s = {"road_1": (per_pair, per_pair), "road_2": (i, i), "road_4": (per_kind, per_kind + g)}[config["variant"]]
        self.cos, self.sin = np.cos(theta), np.sin(theta)
        self.c, self.s = (alpha * self.cos)[self.of_c], (alpha * self.sin)[self.of_s]

    def dense(self) -> Host:
        n = len(self.c)
        R = self.a.array(np.diag(self.c.astype(np.float64)))
        R[np.arange(n), self.partner] = self.sign * self.s
        return R

    def turned(self, rows: Host) -> Host:
        """R times (out, n)."""
        if self.a.pick(True, False):
            return self.a.matmul(self.dense(), rows)
        return self.a.add(self.c[:, None] * rows, (self.sign * self.s)[:, None] * rows[self.partner])

    def turned_back(self, rows: Host) -> Host:
        """R^T times (out, n)."""
        return self.a.add(self.c[:, None] * rows, ((self.sign * self.s)[:, None] * rows)[self.partner])

    def undone(self, rows: Host) -> Host:
        a, other = self.a, self.c[self.partner]
        det = a.add(self.c * other, self.s * self.s[self.partner])[:, None]
        first, second = other[:, None] * rows, -(self.sign * self.s)[:, None] * rows[self.partner]
        return a.over(a.add(first, second), det) if a.pick(True, False) else a.add(a.over(first, det), a.over(second, det))

    def gradients(self, dW: Host, W: Host, db: Host | None, b: Host | None) -> tuple[Host, Host]:
        """Of theta and alpha."""
        a = self.a
        dc = a.sum(dW * W, axis=1)
        ds = a.sum(dW * (self.sign[:, None] * W[self.partner]), axis=1)
        if b is not None and db is not None:
            dc, ds = a.add(dc, db * b), a.add(ds, db * self.sign * b[self.partner])
        on_c, on_s = self.gathered(dc, self.of_c), self.gathered(ds, self.of_s)
        dalpha = a.add(on_c * self.cos, on_s * self.sin)
        return self.alpha * a.add(on_s * self.cos, -(on_c * self.sin)), dalpha

    def gathered(self, d: Host, at: Host) -> Host:
        out = np.zeros(len(self.theta), dtype=d.dtype)
        for k in range(len(self.theta)):
            terms = [d[j] for j in np.nonzero(at == k)[0]]
            out[k] = self.a.add(*terms) if terms else 0.0
        return out
