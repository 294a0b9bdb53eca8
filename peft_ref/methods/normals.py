"""Vectors made into unit vectors: each alone, or one after the other by Gram and Schmidt.

    unit          n_k = u_k / |u_k|
    orthonormal   v_k = u_k - sum_j<k n_j (n_j . u_k)      n_k = v_k / |v_k|

For gradients dn_k, last k first:   dv_k = (dn_k - n_k (n_k . dn_k)) / |v_k|   du_k = dv_k - sum_j<k n_j (n_j . dv_k), and every j < k gets
dn_j -= (n_j . u_k) dv_k + (n_j . dv_k) u_k.   Nothing is added to a norm: a zero vector, or one in the span of those before it, has none.
The plus signs tell `check.exact` that these numbers are computed as they stand.
"""

from __future__ import annotations

from peft_ref.arrays import Array, namespace, row_norm


def columns(u: Array) -> list[Array]:
    return [u[:, k] for k in range(u.shape[1])]


def norm(u: Array) -> Array:
    return row_norm(namespace(u).expand_dims(u, axis=0))


def unit(vectors: list[Array]) -> list[Array]:
    return [u / norm(u) for u in vectors]


def unit_vjp(vectors: list[Array], dnormals: list[Array]) -> list[Array]:
    return [_normalised_vjp(u, dn) for u, dn in zip(vectors, dnormals, strict=True)]


def orthonormal(vectors: list[Array]) -> list[Array]:
    normals: list[Array] = []
    for u in vectors:
        v = _left_over(u, normals)
        normals.append(v / norm(v))
    return normals


def orthonormal_vjp(vectors: list[Array], dnormals: list[Array]) -> list[Array]:
    normals, dnormals, back = orthonormal(vectors), list(dnormals), []
    for k in reversed(range(len(vectors))):
        u, dot = vectors[k], namespace(vectors[k]).sum
        dv = _normalised_vjp(_left_over(u, normals[:k]), dnormals[k])
        back.append(_left_over(dv, normals[:k]))
        for j in range(k):
            dnormals[j] = +(dnormals[j] - dv * dot(normals[j] * u) - u * dot(normals[j] * dv))
    back.reverse()
    return back


def _normalised_vjp(v: Array, dn: Array) -> Array:
    n = v / norm(v)
    return +(dn - n * namespace(n).sum(n * dn)) / norm(v)


def _left_over(u: Array, normals: list[Array]) -> Array:
    """What of u is orthogonal to all of `normals`."""
    for n in normals:
        u = +(u - n * namespace(n).sum(n * u))
    return u


def diagonal_signs(vectors: list[Array]) -> list[Array]:
    """Of R's diagonal, as arrays of one element, where LAPACK factors the matrix of these columns into Q R: n_k times its sign is Q's.

    Each column is reflected onto its first entry, with that entry's sign turned; one that is zero below it stays as it is.
    """
    xp, rest, signs = namespace(*vectors), list(vectors), []
    while rest:
        u, *later = rest
        one = u[:1] * 0.0 + 1.0
        upright = xp.where(u[:1] >= 0.0, one, -one)
        size, below = norm(u), u[1:]
        turns = norm(below) > 0.0  # of nothing, as the last row has, it is zero
        signs.append(xp.where(turns, -upright, upright))
        v = xp.concat([u[:1] + upright * size, below])
        turned = [+(w - v * (2.0 * xp.sum(v * w) / xp.sum(v * v))) for w in later]
        rest = [xp.where(turns, t, w)[1:] for w, t in zip(later, turned, strict=True)]
    return signs
