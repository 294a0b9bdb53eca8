"""What an adaption prompt adds, as an honest port may compute it, head by head, written from spec/methods/adaption_prompt.md."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from peft_ref.check.case import Answer, Case
from tests.check.honest.arithmetic import Arithmetic, Host


def answer(case: Case, a: Arithmetic) -> Answer:
    return HonestBlock(case, a).answer()


class HonestBlock:
    def __init__(self, case: Case, a: Arithmetic) -> None:
        self.case, self.a, asked = case, a, case.question["attention"]
        self.heads, self.groups, self.d = (asked[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        self.q = a.array(case.question["q"])
        self.E = a.array(case.adapters[0].tensors["adaption_prompt"])[0]
        self.g = a.array(case.adapters[0].tensors["adaption_gate"])[0]
        self.W = self._projections(asked["projections"], asked["hidden_size"])
        self.k, self.v = (self._by_groups(self._projected(self.E, *self.W[name])) for name in "kv")
        # Everybody divides by sqrt(d) somewhere: on the scores, or on the queries or keys before.
        self.where = a.pick("scores", "queries", "keys")

    def _projections(self, given: Any, n: int) -> dict[str, tuple[Host, Host | None]]:
        """(in, out) and bias of k, v and, where there is one, o."""
        read = {name: (self.a.array(p["weight"]), None if p["bias"] is None else self.a.array(p["bias"])) for name, p in given.items()}
        if "c_attn" not in read:
            return {name[0]: (W.T, b) for name, (W, b) in read.items()}
        W, b = read["c_attn"]
        return {name: (W[:, i * n : (i + 1) * n], None if b is None else b[i * n : (i + 1) * n]) for i, name in ((1, "k"), (2, "v"))}

    def _projected(self, x: Host, W: Host, b: Host | None) -> Host:
        if b is None:
            return self.a.matmul(x, W)
        return self.a.matmul(x, W, start=b) if self.a.pick(True, False) else self.a.add(self.a.matmul(x, W), b)

    def _by_groups(self, rows: Host) -> Host:
        return np.stack([rows[:, i * self.d : (i + 1) * self.d] for i in range(self.groups)])

    def _rooted(self, x: Host) -> Host:
        root = math.sqrt(self.d)
        return self.a.pick(lambda: self.a.scaled(x, 1 / root), lambda: self.a.over(x, self.a.number(root)))()

    def weights(self, q: Host, k: Host) -> Host:
        """The softmax (T, n) of one head of one example, with the largest score taken off or as it is."""
        a = self.a
        if self.where == "queries":
            scores = a.matmul(self._rooted(q), k.T)
        elif self.where == "keys":
            scores = a.matmul(q, self._rooted(k).T)
        else:
            scores = self._rooted(a.matmul(q, k.T))
        if a.pick(True, False):
            scores = scores - np.max(scores, axis=1, keepdims=True)
        e = a.array(np.exp(scores.astype(np.float64)))
        return a.over(e, a.sum(e, axis=1)[:, None])

    def answer(self) -> Answer:
        case, a, (batch, heads, tokens, d) = self.case, self.a, self.q.shape
        share = heads // self.groups
        A = np.stack([[self.weights(self.q[b, h], self.k[h // share]) for h in range(heads)] for b in range(batch)])
        if case.operation == "attention":
            out = np.stack([[self._gated(A[b, h], self.v[h // share]) for h in range(heads)] for b in range(batch)])
            joined = np.swapaxes(out, 1, 2).reshape(batch * tokens, heads * d)
            y = self._projected(joined, *self.W["o"]) if "o" in self.W else joined
            return {"y": y.reshape(batch, tokens, -1)}
        assert case.dy is not None
        dy = a.array(case.dy).reshape(batch * tokens, -1)
        dy = a.matmul(dy, self.W["o"][0].T) if "o" in self.W else dy
        D = np.swapaxes(dy.reshape(batch, tokens, heads, d), 1, 2)
        dq, dk, dv, dg = np.zeros_like(self.q), [], [], []
        for b, h in np.ndindex(batch, heads):
            k, v, own = self.k[h // share], self.v[h // share], A[b, h]
            dg.append(D[b, h] * a.matmul(own, v))
            gD = self.g * D[b, h]
            dA = a.matmul(gD, v.T)
            dZ = own * (dA - a.sum(own * dA, axis=1)[:, None])
            dq[b, h] = self._rooted(a.matmul(dZ, k))
            dk.append((h // share, self._rooted(a.matmul(dZ.T, self.q[b, h]))))
            dv.append((h // share, a.matmul(own.T, gD)))
        dK, dV = (np.concatenate([a.sum(np.stack([x for i, x in of if i == g])) for g in range(self.groups)], axis=1) for of in (dk, dv))
        dE = a.add(a.matmul(dK, self.W["k"][0].T), a.matmul(dV, self.W["v"][0].T))
        return {"q": dq, "0.adaption_prompt": dE[None], "0.adaption_gate": a.sum(np.stack(dg).reshape(-1))[None]}

    def _gated(self, A: Host, v: Host) -> Host:
        a = self.a
        return a.pick(lambda: self.g * a.matmul(A, v), lambda: a.matmul(self.g * A, v), lambda: a.matmul(A, self.g * v))()
