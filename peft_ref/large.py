"""What one adapter makes of a large matrix in NumPy, and its gradient: what its method says, with as little as can be of the size of W.

    by rows    a method whose rows are apart (`by_rows`) is asked for a tile of them at a time:  W'[t] = T(W[t])
    Scaled     W' = r k (W + B A),  u = x W'^T:   dx = dy W'   dr_i = sum_t dy_ti u_ti / r_i   dB = r k dy^T (x A^T)   dA = (dy r k B)^T x
    Turned     W' = W F,  t = dy W:               dx = t F     dF = the blocks of t^T x = F^-T times those of dx^T x

So the gradient of a product is read from u, dx and narrow products, and no dW is formed. The same numbers as `weight` and `weight_vjp`,
but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from peft_ref import dense
from peft_ref.arrays import Array, as_rows, column
from peft_ref.contracts import Factors, Scaled, Turned, WeightGradients, WeightMethod, declared
from peft_ref.layers import Layer, Linear

P = TypeVar("P", bound=tuple[Any, ...])
SMALL = 2.0**-40  # a row that is scaled by less says nothing of what it was
NEARLY = 0.5  # how far F^T F may be from 1: no direction is scaled by less than 0.7 or more than 1.3


class ProductGradients(NamedTuple):
    x: Array
    product: Scaled | Turned
    b: Array | None


def folded(s: Scaled | Turned, W: Array, b: Array | None) -> tuple[Scaled | Turned, tuple[Array, Array | None]]:
    """The product with what it holds constant, and (W', b')."""
    if isinstance(s, Turned):
        return s, (dense.turned(W, s.blocks), b)
    B, A, c = s.factors or (None, None, None)
    if s.unit:
        after, norms = dense.unit_scaled(W, s.rows, B, A)
        s = s._replace(held=1 / norms)
    else:
        after = dense.scaled(W, s.rows, B, A)
    b = _rows(s) * b if s.bias and b is not None else b
    return s, (after, c if b is None else b if c is None else b + c)


def folded_vjp(
    s: Scaled | Turned,
    W: Array,
    b: Array | None,
    folded: Array,
    x: Array,
    u: Array | None,
    dy: Array,
    db: Array | None,
    narrow: Sequence[tuple[Array, Array]] = (),
) -> ProductGradients:
    """The gradients of y = x W'^T + b' for x, for what the product is made of and for b: given W' (`folded`; W itself where x was turned
    instead), u = x W'^T where it is known, db', and what other paths of x add to dx."""
    if isinstance(s, Turned):
        return _turned_vjp(s.blocks, W, folded, x, dy, db, narrow)
    r, drows, dfactors = _rows(s), None, None
    if s.factors is not None:
        B, A, c = s.factors
        dB = dense.product_vjp(dense.product(x, A.T), dy)
        dA = dense.product_vjp(x, dense.product(dy, B if r is None else column(r) * B))
        dfactors = Factors(dB if r is None else column(r) * dB, dA, None if c is None else db)
    if r is not None:
        drows = _row_gradients(r, s.factors, W, x, dense.product(x, folded.T) if u is None else u, dy)
        if s.bias and b is not None and db is not None:
            drows, db = drows + db * b, db * r
        drows = drows if s.held is None else drows * s.held
    return ProductGradients(dense.sum_of_products([(dy, folded), *narrow]), Scaled(drows, factors=dfactors), db)


def _turned_vjp(
    F: Array, W: Array, folded: Array, x: Array, dy: Array, db: Array | None, narrow: Sequence[tuple[Array, Array]]
) -> ProductGradients:
    """Through W', where there is one and F is nearly orthogonal, so that nothing is lost in its inverse; else through t."""
    if folded is not W and np.max(np.sum(abs(F.mT @ F - np.eye(F.shape[1], dtype=F.dtype)), axis=2)) <= NEARLY:
        dx = dense.product(dy, folded)
        dF = np.linalg.solve(F.mT, dense.turned_vjp(dx, x, F.shape[0]))
    else:
        t = dense.product(dy, W)
        dx, dF = dense.turned(t, F), dense.turned_vjp(t, x, F.shape[0])
    return ProductGradients(sum((dense.product(h, A) for h, A in narrow), dx), Turned(dF), db)


def _row_gradients(r: Array, factors: Factors | None, W: Array, x: Array, u: Array, dy: Array) -> Array:
    """Of r, what scales the rows: what u would be without it, times dy. A row of next to nothing is computed anew."""
    tiny = abs(r) < SMALL
    d = dense.column_dots(dy, u) / np.where(tiny, 1, r)
    if tiny.any():
        V = W[tiny] if factors is None else W[tiny] + factors.B[tiny] @ factors.A
        d[tiny] = dense.column_dots(as_rows(dy)[:, tiny], as_rows(x) @ V.T)
    return d


def weight(layer: Layer, method: WeightMethod[P], p: P, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
    """`method.weight` of a method by rows."""
    biases: list[Array | None] = []

    def tile_of(tile: slice) -> Array:
        V, c = method.weight(part(layer, tile), cut(method, p, tile), W[tile], None if b is None else b[tile], W0[tile])
        biases.append(c)
        return V

    return dense.by_rows(tile_of, W), _joined(biases)


def weight_vjp(
    layer: Layer, method: WeightMethod[P], p: P, W: Array, b: Array | None, W0: Array, dW: Array, db: Array | None, wanted: bool
) -> WeightGradients[P]:
    """`method.weight_vjp` of a method by rows; the gradient of W only where it is wanted, else dW as it came."""
    parts = [
        method.weight_vjp(part(layer, t), cut(method, p, t), W[t], None if b is None else b[t], W0[t], dW[t], None if db is None else db[t])
        for t in dense.tiles(W.shape[0])
    ]
    values = {}
    for name, own in zip(declared(method.params_type), zip(*(g.params for g in parts), strict=True), strict=True):
        values[name] = None if own[0] is None else np.concatenate(own) if name in _by_rows(method) else np.sum(own, axis=0)
    return WeightGradients(method.to_params(**values), _joined([g.W for g in parts]) if wanted else dW, _joined([g.b for g in parts]))


def _rows(s: Scaled) -> Array | None:
    return s.rows if s.held is None or s.rows is None else s.rows * s.held


def _by_rows(method: WeightMethod[Any]) -> set[str]:
    """The parameters that have a row for every row of W."""
    return {name for name, (shape, _) in declared(method.params_type).items() if shape.split()[0] == "out"}


def cut(method: WeightMethod[P], p: P, tile: slice) -> P:
    """What of the parameters belongs to these rows of W: `part` of the layer's."""
    names = _by_rows(method)
    return method.to_params(
        **{n: v[tile] if n in names and v is not None else v for n, v in zip(declared(method.params_type), p, strict=True)}
    )


def part(layer: Layer, tile: slice) -> Linear:
    """The layer with these outputs alone."""
    assert isinstance(layer, Linear)
    return replace(layer, out_features=tile.stop - tile.start)


def _joined(parts: list[Any]) -> Array | None:
    return None if parts[0] is None else np.concatenate(parts)
