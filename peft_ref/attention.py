"""Attention with grouped queries.

    P = softmax(s Q K^T + M)      Y = P V                 for every head;  s = 1 / sqrt(d) mostly
    dV = P^T dY      dZ = P (dP - sum(P dP)),  dP = dY V^T      dQ = s dZ K      dK = s dZ^T Q      dM = dZ

    Q (batch, heads, T, d)    K, V (batch, groups, S, d)    M, P (batch, heads, T, S)    heads / groups neighbours share one K and V
    softmax      p_i = e^{x_i} / sum_j e^{x_j}           dx = p (dy - sum(p dy))

M is added: the mask, a relative position bias (T5), or their sum. HF computes the softmax in float32, whatever the model's dtype.
"""

from __future__ import annotations

from typing import NamedTuple

from peft_ref.arrays import Array, namespace, sum_to


def softmax(x: Array) -> Array:
    """Over the last axis. The largest entry is subtracted first, which changes nothing but the overflow."""
    xp = namespace(x)
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return e / xp.sum(e, axis=-1, keepdims=True)


def softmax_vjp(x: Array, dy: Array) -> Array:
    p = softmax(x)
    return p * (dy - namespace(p).sum(p * dy, axis=-1, keepdims=True))


def split_heads(x: Array, heads: int) -> Array:
    """(batch, T, heads * d) as (batch, heads, T, d). Its transpose is `join_heads`."""
    xp = namespace(x)
    batch, T, width = x.shape
    return xp.permute_dims(xp.reshape(x, (batch, T, heads, width // heads)), (0, 2, 1, 3))


def join_heads(x: Array) -> Array:
    """Undoes `split_heads`, and is its transpose."""
    xp = namespace(x)
    batch, heads, T, d = x.shape
    return xp.reshape(xp.permute_dims(x, (0, 2, 1, 3)), (batch, T, heads * d))


class AttentionGradients(NamedTuple):
    q: Array
    k: Array
    v: Array
    bias: Array | None


def attention(q: Array, k: Array, v: Array, bias: Array | None, scale: float) -> Array:
    """Y (batch, heads, T, d); `bias` is M above, or anything that broadcasts to it."""
    y = softmax(_scores(q, k, bias, scale)) @ _shared(v)
    return namespace(q).reshape(y, (*q.shape[:3], v.shape[-1]))


def attention_vjp(q: Array, k: Array, v: Array, bias: Array | None, scale: float, dy: Array) -> AttentionGradients:
    xp = namespace(q, k, v, dy)
    mT = xp.matrix_transpose
    scores = _scores(q, k, bias, scale)
    dy = _grouped(dy, k.shape[1])
    dv = mT(softmax(scores)) @ dy
    dz = softmax_vjp(scores, dy @ mT(_shared(v)))
    dq = scale * dz @ _shared(k)
    dk = scale * mT(dz) @ _grouped(q, k.shape[1])
    dbias = None if bias is None else sum_to(xp.reshape(dz, (*q.shape[:3], k.shape[2])), bias.shape)
    return AttentionGradients(xp.reshape(dq, q.shape), xp.sum(dk, axis=2), xp.sum(dv, axis=2), dbias)


def _grouped(q: Array, groups: int) -> Array:
    """(batch, heads, T, d) as (batch, groups, heads / groups, T, d)."""
    batch, heads, T, d = q.shape
    return namespace(q).reshape(q, (batch, groups, heads // groups, T, d))


def _shared(k: Array) -> Array:
    """(batch, groups, S, d) with an axis of length 1 for the heads that share it."""
    return namespace(k).expand_dims(k, axis=2)


def _scores(q: Array, k: Array, bias: Array | None, scale: float) -> Array:
    """s Q K^T + M, shape (batch, groups, heads / groups, T, S)."""
    xp = namespace(q, k)
    scores = scale * (_grouped(q, k.shape[1]) @ xp.matrix_transpose(_shared(k)))
    if bias is None:
        return scores
    full = xp.broadcast_to(bias, (*q.shape[:3], k.shape[2]))
    return scores + _grouped(full, k.shape[1])
