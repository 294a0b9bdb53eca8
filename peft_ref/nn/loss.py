"""Cross-entropy with labels that do not count, as HF computes its losses.

    L = 1/n sum over counted rows i of   log sum_j e^{z_ij} - z_{i, label_i}          dz_i = dL / n (softmax(z_i) - onehot(label_i))

A row whose label is -100 does not count: not in the sum, not in n. Where no row counts, L is 0/0, NaN, as in torch.
"""

from __future__ import annotations

from peft_ref.arrays import Array, as_rows, column, namespace, one_hot, pad
from peft_ref.nn.functions import log_sum_exp, softmax

IGNORED = -100


def cross_entropy(logits: Array, labels: Array) -> Array:
    """The mean over the counted rows of logits (..., classes), labels (...); no axes."""
    xp = namespace(logits)
    z, counted = as_rows(logits), _counted(logits, labels)
    chosen = xp.sum(z * one_hot(labels, z.shape[1], z), axis=1)
    each = xp.reshape(log_sum_exp(z), (-1,)) - chosen
    return xp.sum(each * counted) / xp.sum(counted)


def cross_entropy_vjp(logits: Array, labels: Array, dloss: Array | float) -> Array:
    xp = namespace(logits)
    z, counted = as_rows(logits), _counted(logits, labels)
    dz = (softmax(z) - one_hot(labels, z.shape[1], z)) * column(counted) * (dloss / xp.sum(counted))
    return xp.reshape(dz, logits.shape)


def _counted(logits: Array, labels: Array) -> Array:
    """1 for a row that counts, 0 for one that does not, shape (rows,)."""
    xp = namespace(logits)
    return xp.astype(xp.reshape(labels, (-1,)) != IGNORED, logits.dtype)


def next_token_loss(logits: Array, labels: Array) -> Array:
    """The logits at t, (batch, T, vocabulary), judged by the label at t + 1, (batch, T)."""
    return cross_entropy(logits[:, :-1, :], labels[:, 1:])


def next_token_loss_vjp(logits: Array, labels: Array, dloss: Array | float) -> Array:
    return pad(cross_entropy_vjp(logits[:, :-1, :], labels[:, 1:], dloss), 1, 0, 1)
