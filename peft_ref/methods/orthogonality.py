"""How far the rows of a matrix V (r, n) are from being orthonormal.

distance = |M|,   M = V V^T - 1,   |.| Frobenius's norm;      its gradient is 2 M V / |M|, and zero where M is
"""

from __future__ import annotations

from peft_ref.arrays import Array, eye_like, namespace


def distance(V: Array) -> Array:
    """(1, 1)."""
    return _norm(_excess(V))


def distance_vjp(V: Array) -> Array:
    """The gradient of `distance` for V. HF's is zero too where the norm has none."""
    M = _excess(V)
    size = _norm(M)
    xp = namespace(M)
    return 2 * ((M / xp.where(size == 0, xp.ones_like(size), size)) @ V)


def _excess(V: Array) -> Array:
    return V @ namespace(V).matrix_transpose(V) - eye_like(V.shape[0], V)


def _norm(M: Array) -> Array:
    xp = namespace(M)
    return xp.sqrt(xp.sum(M * M, keepdims=True))
