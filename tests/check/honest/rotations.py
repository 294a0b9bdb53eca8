"""The honest gradients of HRA, OFT and RoAd: what every adapter made of the weight, walked back from the last one to the first.

`h` is the `Honest` of port.py.
"""

from __future__ import annotations

from typing import Any

from peft_ref.check.case import Answer
from tests.check.honest.arithmetic import Host


def hra(h: Any) -> tuple[Answer, Host]:
    Ws, n = [h.W], len(h.case.adapters)
    for i in range(n):
        Ws.append(h.merge_step(i, Ws[-1], None)[0])
    dW = h.weight_gradient(h.X)
    out: Answer = {}
    for i in reversed(range(n)):
        du, dW = h.reflections(i).gradients(dW, Ws[i])
        out |= h.named(i, "hra_u", du)
    return out, h.a.matmul(h.dY, Ws[-1])


def oft(h: Any) -> tuple[Answer, Host]:
    Ws, n = [h.W], len(h.case.adapters)
    for i in range(n):
        Ws.append(h.blocked(i, Ws[-1], undo=False))
    dW = h.weight_gradient(h.X)
    out: Answer = {}
    for i in reversed(range(n)):
        blocks, dV, V = h.blocks(i), h.rows(dW), h.rows(Ws[i])
        table = h.layer.kind == "embedding"
        out |= h.named(i, "oft_", blocks.gradient(V, dV) if table else blocks.gradient(dV, V))
        dW = h.rows(blocks.turned(dV, back=not table))
    return out, h.a.matmul(h.dY, Ws[-1])


def road(h: Any) -> tuple[Answer, Host]:
    a, n = h.a, len(h.case.adapters)
    Ws, bs = [h.W], [h.b]
    for i in range(n):
        W, b = h.merge_step(i, Ws[-1], bs[-1])
        Ws.append(W)
        bs.append(b)
    dW, db = h.weight_gradient(h.X), None if h.b is None else a.sum(h.dY)
    out: Answer = {}
    for i in reversed(range(n)):
        turns = h.turns(i)
        dtheta, dalpha = turns.gradients(dW, Ws[i], db, bs[i])
        out |= {**h.named(i, "theta", dtheta), **h.named(i, "alpha", dalpha)}
        dW, db = turns.turned_back(dW), None if db is None else turns.turned_back(db[:, None])[:, 0]
    return out, a.matmul(h.dY, Ws[-1])
