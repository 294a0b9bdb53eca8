"""The losses of HF's models, as HF computes them.

    cross_entropy          mean over counted rows of  log sum_j e^{z_j} - z_label        dz = (softmax(z) - onehot(label)) / n
    binary_cross_entropy   mean of  log(1 + e^z) - y z                                   dz = (sigmoid(z) - y) / n
    mean_squared_error     mean of  (z - y)^2                                            dz = 2 (z - y) / n
    weighted_cross_entropy sum over rows of  w (log sum_j e^{z_j} - z_label)             dz = w (softmax(z) - onehot(label))

A row whose label is -100 does not count: not in the sum, not in n. Where no row counts, L is 0/0, NaN, as in torch.
The last two take the mean over all numbers; y is of z's shape.
"""

from __future__ import annotations

import math

from peft_ref.arrays import Array, as_rows, column, namespace, one_hot, pad
from peft_ref.errors import ShapeError
from peft_ref.nn.functions import log_sum_exp, sigmoid, softmax

IGNORED = -100


def cross_entropy(logits: Array, labels: Array, *, ignored: int = IGNORED) -> Array:
    """The mean over the counted rows of logits (..., classes), labels (...); no axes."""
    xp = namespace(logits)
    counted, z = _counted(logits, labels, ignored), as_rows(logits)
    chosen = xp.sum(z * one_hot(labels, z.shape[1], z), axis=1)
    each = xp.reshape(log_sum_exp(z), (-1,)) - chosen
    return xp.sum(each * counted) / xp.sum(counted)


def cross_entropy_vjp(logits: Array, labels: Array, dloss: Array | float, *, ignored: int = IGNORED) -> Array:
    xp = namespace(logits)
    z, counted = as_rows(logits), _counted(logits, labels, ignored)
    dz = (softmax(z) - one_hot(labels, z.shape[1], z)) * column(counted) * (dloss / xp.sum(counted))
    return xp.reshape(dz, logits.shape)


def weighted_cross_entropy(logits: Array, labels: Array, weights: Array) -> Array:
    """The weighted sum over the rows of logits (..., classes), labels and weights (...); a row that does not count has weight 0."""
    xp, z = namespace(logits), as_rows(logits)
    _counted(logits, labels, IGNORED)
    each = xp.reshape(log_sum_exp(z), (-1,)) - xp.sum(z * one_hot(labels, z.shape[1], z), axis=1)
    return xp.sum(each * xp.reshape(weights, (-1,)))


def weighted_cross_entropy_vjp(logits: Array, labels: Array, weights: Array, dloss: Array | float) -> Array:
    xp, z = namespace(logits), as_rows(logits)
    _counted(logits, labels, IGNORED)
    dz = (softmax(z) - one_hot(labels, z.shape[1], z)) * column(xp.reshape(weights, (-1,)))
    return xp.reshape(dz * dloss, logits.shape)


def _counted(logits: Array, labels: Array, ignored: int) -> Array:
    """1 for a row that counts, 0 for one that does not, shape (rows,)."""
    xp = namespace(logits)
    if math.prod(labels.shape) != math.prod(logits.shape[:-1]):
        raise ShapeError(f"labels are {tuple(labels.shape)}, expected one for each row of the logits: {tuple(logits.shape[:-1])}.")
    return xp.astype(xp.reshape(labels, (-1,)) != ignored, logits.dtype)


def next_token_loss(logits: Array, labels: Array) -> Array:
    """The logits at t, (batch, T, vocabulary), judged by the label at t + 1, (batch, T)."""
    return cross_entropy(logits[:, :-1, :], labels[:, 1:])


def next_token_loss_vjp(logits: Array, labels: Array, dloss: Array | float) -> Array:
    return pad(cross_entropy_vjp(logits[:, :-1, :], labels[:, 1:], dloss), 1, 0, 1)


def weighted_next_token_loss(logits: Array, labels: Array, weights: Array) -> Array:
    """As `next_token_loss`, with a weight for every label, (batch, T), instead of the mean: what `splice` makes for CPT."""
    return weighted_cross_entropy(logits[:, :-1, :], labels[:, 1:], weights[:, 1:])


def weighted_next_token_loss_vjp(logits: Array, labels: Array, weights: Array, dloss: Array | float) -> Array:
    return pad(weighted_cross_entropy_vjp(logits[:, :-1, :], labels[:, 1:], weights[:, 1:], dloss), 1, 0, 1)


def binary_cross_entropy(logits: Array, labels: Array) -> Array:
    """log(1 + e^z) as max(z, 0) + log(1 + e^-|z|), which never overflows."""
    xp = namespace(logits)
    y, size = _targets(logits, labels), xp.abs(logits)
    return xp.mean(0.5 * (logits + size) + xp.log1p(xp.exp(-size)) - y * logits)


def binary_cross_entropy_vjp(logits: Array, labels: Array, dloss: Array | float) -> Array:
    return (sigmoid(logits) - _targets(logits, labels)) * (dloss / math.prod(logits.shape))


def mean_squared_error(logits: Array, labels: Array) -> Array:
    off = logits - _targets(logits, labels)
    return namespace(logits).mean(off * off)


def mean_squared_error_vjp(logits: Array, labels: Array, dloss: Array | float) -> Array:
    return (logits - _targets(logits, labels)) * (2 * dloss / math.prod(logits.shape))


def _targets(logits: Array, labels: Array) -> Array:
    if tuple(labels.shape) != tuple(logits.shape):
        raise ShapeError(f"labels are {tuple(labels.shape)}, expected the logits' shape {tuple(logits.shape)}.")
    return namespace(logits).astype(labels, logits.dtype)


REGRESSION, SINGLE_LABEL, MULTI_LABEL = "regression", "single_label_classification", "multi_label_classification"
PROBLEM_TYPES = (REGRESSION, SINGLE_LABEL, MULTI_LABEL)


def problem_type_of(logits: Array, labels: Array) -> str:
    """What HF takes a classifier for whose config does not say: one class is regression, integer labels name a class each."""
    if logits.shape[-1] == 1:
        return REGRESSION
    return SINGLE_LABEL if namespace(labels).isdtype(labels.dtype, "integral") else MULTI_LABEL


def classification_loss(logits: Array, labels: Array, problem_type: str) -> Array:
    """The loss of one answer for each row of logits (batch, classes)."""
    if problem_type == SINGLE_LABEL:
        return cross_entropy(logits, labels)
    loss = mean_squared_error if problem_type == REGRESSION else binary_cross_entropy
    return loss(logits, _beside(logits, labels))


def classification_loss_vjp(logits: Array, labels: Array, problem_type: str, dloss: Array | float) -> Array:
    if problem_type == SINGLE_LABEL:
        return cross_entropy_vjp(logits, labels, dloss)
    vjp = mean_squared_error_vjp if problem_type == REGRESSION else binary_cross_entropy_vjp
    return vjp(logits, _beside(logits, labels), dloss)


def _beside(logits: Array, labels: Array) -> Array:
    """One class may have labels (batch,)."""
    return namespace(labels).reshape(labels, logits.shape) if logits.shape[-1] == 1 and labels.ndim == 1 else labels


def span_loss(logits: Array, starts: Array, ends: Array) -> Array:
    """Question answering: the mean of two cross-entropies over the T tokens, of the answer's first token and of its last.

    logits (batch, T, 2), positions (batch,). As in HF a position behind the tokens does not count, and one before them is the first token.
    """
    T = logits.shape[1]
    each = [cross_entropy(z, _within(labels, T), ignored=T) for z, labels in zip(_sides(logits), (starts, ends), strict=True)]
    return (each[0] + each[1]) / 2


def span_loss_vjp(logits: Array, starts: Array, ends: Array, dloss: Array | float) -> Array:
    T = logits.shape[1]
    pairs = zip(_sides(logits), (starts, ends), strict=True)
    return namespace(logits).stack([cross_entropy_vjp(z, _within(labels, T), dloss / 2, ignored=T) for z, labels in pairs], axis=-1)


def _sides(logits: Array) -> tuple[Array, Array]:
    return logits[..., 0], logits[..., 1]


def _within(positions: Array, length: int) -> Array:
    return namespace(positions).clip(positions, 0, length)
