"""Rotations out of skew matrices Q (k, b, b), by Cayley.

    cayley    R = (I - Q) (I + Q)^-1 = 2 A - I,  A = (I + Q)^-1        dQ = -2 A^T dR A^T
    neumann   R = c_0 I + c_1 Q + c_2 Q^2 + ...,  c = 1, 2, ..., 2, 1  dQ by the product rule, from the last power down

The plus signs tell `check.exact` that these numbers are computed as they stand.
Of three terms c is 1, 2, 2, 1 too, as of four; of two 1, 2; of one or less 1.
"""

from __future__ import annotations

from peft_ref.arrays import Array, eye_like, namespace, pad, zeros_like


def skew(vectors: Array, b: int) -> Array:
    """T - T^T (k, b, b), T the strict upper triangle with the numbers of `vectors` (k, b (b - 1) / 2) in reading order."""
    xp, k = namespace(vectors), vectors.shape[0]
    rows, at = [], 0
    for i in range(b - 1):
        rows.append(pad(vectors[:, at : at + b - 1 - i], 1, i + 1, 0))
        at += b - 1 - i
    T = xp.stack([*rows, zeros_like((k, b), vectors)], axis=1)
    return T - xp.matrix_transpose(T)


def skew_vjp(dQ: Array) -> Array:
    xp, b = namespace(dQ), dQ.shape[1]
    d = dQ - xp.matrix_transpose(dQ)
    return xp.concat([d[:, i, i + 1 :] for i in range(b - 1)], axis=1) if b > 1 else zeros_like((dQ.shape[0], 0), dQ)


def inverse(A: Array) -> Array:
    """A^-1 (k, b, b) by elimination without a choice of pivots: for matrices whose symmetric part is positive definite."""
    xp, b = namespace(A), A.shape[1]
    start = xp.concat([A, A * 0.0 + eye_like(b, A)], axis=2)
    rows = [start[:, i, :] for i in range(b)]
    for j in range(b):
        row = rows[j] / rows[j][:, j : j + 1]
        rows = [row if i == j else +(rows[i] - rows[i][:, j : j + 1] * row) for i in range(b)]
    return xp.stack(rows, axis=1)[:, :, b:]


def cayley(Q: Array) -> Array:
    one = eye_like(Q.shape[1], Q)
    return +(2.0 * inverse(one + Q) - one)


def cayley_vjp(Q: Array, dR: Array) -> Array:
    transposed = inverse(eye_like(Q.shape[1], Q) - Q)
    return -2.0 * (transposed @ dR @ transposed)


def coefficients(terms: int) -> list[float]:
    """Of Q, Q^2, ..."""
    if terms <= 2:
        return [2.0] * (terms - 1)
    return [2.0] * max(terms - 2, 2) + [1.0]


def neumann(Q: Array, terms: int) -> Array:
    R, power = Q * 0.0 + eye_like(Q.shape[1], Q), None
    for c in coefficients(terms):
        power = Q if power is None else power @ Q
        R = R + c * power
    return +R


def neumann_vjp(Q: Array, terms: int, dR: Array) -> Array:
    c, powers, mT = coefficients(terms), [Q], namespace(Q).matrix_transpose
    if not c:
        return Q * 0.0
    for _ in c[2:]:
        powers.append(powers[-1] @ Q)
    dpower, dQ = c[-1] * dR, Q * 0.0
    for k in reversed(range(1, len(c))):
        dQ = dQ + mT(powers[k - 1]) @ dpower
        dpower = c[k - 1] * dR + dpower @ mT(Q)
    return dQ + dpower
