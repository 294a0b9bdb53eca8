"""What a layer computes with several active adapters: forward, gradient, merge and unmerge.

    y_0 = layer(x; W_0, b_0),    (W_k, b_k) = T_k(W_{k-1}, b_{k-1}),    y = layer(x; W_n, b_n)

Low-rank adapters are not folded into the weight: their path is  up(down(x; A), B).  It is the same function, costs less, and is the only
one where a grouped convolution's weight cannot hold the delta. (It costs more where one is alone on a large layer and x has as many rows as
W: there what it adds is added to W.) An adapter with dropout adds  layer(drop(x); T(W_0) - W_0, b' - b_0);  one whose rows drop out adds
layer(x; m * (T(W_0) - W_0), b' - b_0). One that is drawn anew in training acts with the noise it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from peft_ref import dense, large
from peft_ref.arrays import Array, as_rows, column, is_integer, namespace, zeros_like
from peft_ref.conditioned import Conditioned
from peft_ref.contracts import Additive, Factors, LowRank, Reweight, Scaled, Turned, WeightGradients, WeightMethod
from peft_ref.errors import ConfigError, NotMergeableError
from peft_ref.layers import Layer, Linear


class Dropout(NamedTuple):
    """An explicit dropout mask: 1 keeps, 0 drops, in the shape of x; what is kept is divided by 1 - p."""

    mask: Array
    p: float


class RowDropout(NamedTuple):
    """What each row of a delta is multiplied by, for all inputs alike: `rank_dropout` and `module_dropout` of LoHa and LoKr in training."""

    factors: Array  # m (out,)

    @classmethod
    def of(cls, mask: Array, *, scaled: bool) -> RowDropout:
        """HF's rank_dropout, given what stays: LoHa divides by how much that is, LoKr where rank_dropout_scale is on. Of no row 0 / 0."""
        return cls(mask / namespace(mask).mean(mask) if scaled else mask)


class BlockDropout(NamedTuple):
    """Which blocks of which factors act, the others being the identity: `boft_dropout` in training."""

    keep: Array  # (factors, blocks) of zeros and ones


class Drawn(NamedTuple):
    """The noise of one forward pass in training, as the method takes it: MonteCLoRA's `noisy`, PVeRA's `sampled`."""

    noise: Any
    input: Dropout | None = None


@runtime_checkable
class NoisyParameters(Protocol):
    def noisy(self, p: Any, noise: Any, /) -> Any: ...
    def noisy_vjp(self, p: Any, noise: Any, d: Any, /) -> Any: ...


@runtime_checkable
class NoisyOutput(Protocol):
    def sampled(self, layer: Layer, p: Any, x: Array, noise: Array, /) -> Array: ...
    def sampled_vjp(self, layer: Layer, p: Any, x: Array, noise: Array, dy: Array, /) -> Any: ...


Drops: TypeAlias = Dropout | RowDropout | BlockDropout | Drawn


class Adapter(NamedTuple):
    method: WeightMethod[Any]
    params: Any
    dropout: Drops | None = None


class StackGradients(NamedTuple):
    x: Array | None
    params: tuple[Any, ...]  # one Params per adapter
    b: Array | None = None  # the frozen bias's, which HF trains with bias="all" and "lora_only"; None where there is none


def forward(layer: Layer, W: Array, b: Array | None, adapters: Sequence[Adapter], x: Array) -> Array:
    """y for input x, frozen matrix W (out, in), bias b (out,) or None, and the active adapters in order."""
    return _output(_set_up(layer, W, b, _all_parts(adapters), x), x)


def vjp(layer: Layer, W: Array, b: Array | None, adapters: Sequence[Adapter], x: Array, dy: Array) -> StackGradients:
    """The gradients of `forward` for x, for every adapter's parameters and for b, given dy in the shape of y."""
    return _pulled_back(b, adapters, _set_up(layer, W, b, _all_parts(adapters), x), x, dy)


def forward_and_vjp(
    layer: Layer, W: Array, b: Array | None, adapters: Sequence[Adapter], x: Array
) -> tuple[Array, Callable[[Array], StackGradients]]:
    """`forward`, and `vjp` as a function of dy. What both make of the adapters is made once. y may be read again: leave it as it is."""
    at = _set_up(layer, W, b, _all_parts(adapters), x)
    u = dense.product(x, at.Ws[-1].T) if isinstance(at.product, Scaled) else None
    return _output(at, x, u), lambda dy: _pulled_back(b, adapters, at, x, dy, u)


def _pulled_back(b: Array | None, adapters: Sequence[Adapter], at: _SetUp, x: Array, dy: Array, u: Array | None = None) -> StackGradients:
    """The gradients, of every adapter as it was given, and of b where there is one."""
    d = _gradients(at, x, dy, u)
    each = iter(d.params)
    params = tuple(_whole(a, [next(each) for _ in _parts(a)]) for a in adapters)
    return StackGradients(d.x, params, None if b is None else d.b)


def merge(layer: Layer, W: Array, b: Array | None, adapters: Sequence[Adapter]) -> tuple[Array, Array | None]:
    """The weight and bias that do alone what the frozen ones do with the adapters."""
    W0, b0 = W, b
    for a in adapters:
        W, b = step(layer, a, W, b, W0, b0)
    return W, b


def unmerge(
    layer: Layer, W: Array, b: Array | None, adapters: Sequence[Adapter], W0: Array, b0: Array | None = None
) -> tuple[Array, Array | None]:
    """Undoes `merge`, last adapter first. W0 is the frozen weight, where DoRA's norm was measured; b0 the frozen bias that GLoRA reads."""
    for k in reversed(range(len(adapters))):
        a = adapters[k]
        if isinstance(a.method, Conditioned):
            W, b = a.method.unmerge(layer, a.params, W, b, W0, b0)
        else:
            before, b_before = merge(layer, W0, b0, adapters[:k]) if a.method.replaces else (W0, b0)
            W, b = a.method.unmerge(layer, a.params, W, b, before)
            b = _put_back(a.method, b, b_before) if a.method.swaps else b
    return W, b


def _put_back(method: WeightMethod[Any], b: Array | None, before: Array | None) -> Array | None:
    if b is not None and before is None:
        raise NotMergeableError(f"{type(method).__name__}: the bias was replaced, and the frozen one did not come.\n  Pass b0.")
    return before


def step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array, b0: Array | None) -> tuple[Array, Array | None]:
    """What one adapter makes of the weight and bias below it; W0 and b0 are those under the whole stack."""
    if isinstance(a.method, Conditioned):
        return a.method.weight(layer, a.params, W, b, W0, b0)
    return a.method.weight(layer, a.params, W, b, W0)


def _step_vjp(at: _SetUp, k: int, dW: Array, db: Array | None) -> WeightGradients[Any]:
    a, W, b, (W0, b0) = at.adapters[k], at.Ws[k], at.bs[k], (at.Ws[0], at.bs[0])
    if isinstance(a.method, Conditioned):
        return a.method.weight_vjp(at.layer, a.params, W, b, W0, dW, db, b0)
    if at.is_large and a.method.by_rows:
        return large.weight_vjp(at.layer, a.method, a.params, W, b, W0, dW, db, wanted=k > 0)
    return a.method.weight_vjp(at.layer, a.params, W, b, W0, dW, db)


def _parts(a: Adapter) -> tuple[Adapter, ...]:
    """An adapter as two where dropout reaches a part of it; as another one where blocks of it drop out or noise is on its parameters."""
    if isinstance(a.dropout, Drawn) and isinstance(a.method, NoisyParameters):
        return (Adapter(a.method, a.method.noisy(a.params, a.dropout.noise), a.dropout.input),)
    if isinstance(a.dropout, BlockDropout):
        return (Adapter(a.method, a.method.thinned(a.params, a.dropout.keep)),)
    apart = a.method.apart(a.params) if isinstance(a.dropout, Dropout) else None
    return (a,) if apart is None else (Adapter(a.method, apart[0]), Adapter(a.method, apart[1], a.dropout))


def _all_parts(adapters: Sequence[Adapter]) -> list[Adapter]:
    return [part for a in adapters for part in _parts(a)]


def _whole(a: Adapter, grads: Sequence[Any]) -> Any:
    """The gradient of an adapter's parameters, given those of its `_parts`."""
    if isinstance(a.dropout, Drawn) and isinstance(a.method, NoisyParameters):
        return a.method.noisy_vjp(a.params, a.dropout.noise, grads[0])
    if isinstance(a.dropout, BlockDropout):
        return a.method.thinned(grads[0], a.dropout.keep)
    return grads[0] if len(grads) == 1 else a.method.together(*grads)


def _sides(layer: Layer, adapters: Sequence[Adapter]) -> list[bool]:
    """Which adapters run beside the layer; the others are folded into its weight."""
    sides = [False] * len(adapters)
    reweighted_later = False
    for k in reversed(range(len(adapters))):
        a = adapters[k]
        sides[k] = a.dropout is not None or (isinstance(a.method, LowRank) and not reweighted_later)
        if a.dropout is not None and reweighted_later:
            raise ConfigError(
                f"adapter {k} ({type(a.method).__name__}) has dropout and a reweighting adapter without dropout follows it:"
                " its effect is no weight that could be reweighted.\n  Put it last, or give it no dropout mask."
            )
        if isinstance(a.dropout, Drawn) and not isinstance(a.method, NoisyOutput):
            raise ConfigError(f"adapter {k} ({type(a.method).__name__}) is given noise, and takes none.\n  Give a Dropout, or none.")
        if isinstance(a.dropout, RowDropout) and isinstance(a.method, LowRank):
            raise ConfigError(
                f"adapter {k} ({type(a.method).__name__}) forms no delta whose rows could drop out.\n  HF PEFT drops out its input: give a"
                " Dropout."
            )
        if isinstance(a.dropout, Dropout) and layer.kind == "embedding":
            raise ConfigError(
                f"adapter {k} ({type(a.method).__name__}) has a dropout mask on an embedding, whose input is integers.\n"
                "  HF PEFT applies no dropout there: pass none."
            )
        reweighted_later |= isinstance(a.method, Reweight) and not sides[k]
    return sides


def _bias(layer: Layer, W: Array, b: Array | None, adapters: Sequence[Adapter]) -> Array | None:
    """The bias to run with: zeros where there is none and an adapter has something to add to it. Merging has no place for that."""
    wanted = b is None and any(isinstance(a.method, Additive) and a.method.adds_bias for a in adapters)
    return zeros_like((layer.shape[0],), W) if wanted else b


class _SetUp(NamedTuple):
    """What the adapters make of a layer, before there is an input."""

    layer: Layer
    adapters: Sequence[Adapter]
    sides: list[bool]
    Ws: list[Array]  # the weight under the stack and after each adapter; a side adapter leaves it as it is
    bs: list[Array | None]
    is_large: bool  # whether it is a linear layer with a large matrix in NumPy, and all numbers are of one precision
    product: Scaled | Turned | None  # what acts on the weight, where that is one adapter of a large layer and a product
    turns_input: bool  # x (W F)^T is (x F^T) W^T: what has fewer rows is turned, and an input's is not in Ws


def _set_up(layer: Layer, W: Array, b: Array | None, adapters: Sequence[Adapter], x: Array) -> _SetUp:
    sides = _sides(layer, adapters)
    b = _bias(layer, W, b, adapters)
    floats = [p for a in adapters for p in a.params if p is not None and not is_integer(p)]
    is_large = isinstance(layer, Linear) and dense.is_large(W, b, x, *floats)
    is_long = is_large and as_rows(x).shape[0] >= W.shape[0]
    if is_long and len(adapters) == 1 and isinstance(adapters[0].method, LowRank) and adapters[0].dropout is None:
        sides = [False]
    acting = [a for a, side in zip(adapters, sides, strict=True) if not side]
    product = acting[0].method.product(layer, acting[0].params) if is_large and len(acting) == 1 else None
    turns_input = isinstance(product, Turned) and not is_long
    Ws, bs = [W], [b]
    for a, side in zip(adapters, sides, strict=True):
        if side or turns_input:
            after = Ws[-1], bs[-1]
        elif product is not None:
            product, after = large.folded(product, W, b)
        elif is_large and a.method.by_rows:
            after = large.weight(layer, a.method, a.params, Ws[-1], bs[-1], W)
        else:
            after = step(layer, a, Ws[-1], bs[-1], W, b)
        Ws.append(after[0])
        bs.append(after[1])
    return _SetUp(layer, adapters, sides, Ws, bs, is_large, product, turns_input)


def _output(at: _SetUp, x: Array, u: Array | None = None) -> Array:
    """y; u is what the weight makes of x, where it is known."""
    W, b = at.Ws[-1], at.bs[-1]
    beside = [a for a, side in zip(at.adapters, at.sides, strict=True) if side]
    if u is not None:
        y = at.layer.add_bias(u, b)
    elif at.is_large:
        low = [(a, a.method.factors(a.params)) for a in beside if isinstance(a.method, LowRank)]
        narrow = [(dense.product(_drop(a, x), f.A.T), f.B.T) for a, f in low]
        seen = dense.turned(x, at.product.blocks.mT) if at.turns_input and isinstance(at.product, Turned) else x
        y = dense.sum_of_products([(seen, W.T), *narrow], [c for c in (b, *(f.b for _, f in low)) if c is not None])
        beside = [a for a in beside if not isinstance(a.method, LowRank)]
    else:
        y = at.layer.apply(x, W, b)
    for a in beside:
        y = y + _side(at.layer, at.Ws[0], at.bs[0], a, x)
    return y


def _gradients(at: _SetUp, x: Array, dy: Array, u: Array | None = None) -> StackGradients:
    """With that of the bias the layer runs with, which may be zeros that were not there."""
    layer, (W, b) = at.layer, (at.Ws[0], at.bs[0])
    db = layer.bias_vjp(dy) if at.bs[-1] is not None else None
    dx, known, db = _large_gradients(at, x, u, dy, db) if at.is_large else (layer.input_vjp(x, at.Ws[-1], dy), {}, db)
    dW = None if all(side or k in known for k, side in enumerate(at.sides)) else layer.weight_vjp(x, dy)
    beside: list[Array] = []
    grads: list[Any] = [known.get(k) for k in range(len(at.adapters))]
    for k in reversed(range(len(at.adapters))):
        a = at.adapters[k]
        if k in known:
            continue
        if at.sides[k]:
            side_dx, grads[k], side_db = _side_vjp(layer, W, b, a, x, dy)
            dx = None if dx is None or side_dx is None else dx + side_dx
            beside = beside if side_db is None else [*beside, side_db]
        else:
            g = _step_vjp(at, k, dW, db)
            grads[k], dW, db = g.params, g.W, g.b
            beside = beside if g.b0 is None else [*beside, g.b0]
    return StackGradients(dx, tuple(grads), None if db is None else sum(beside, db))


def _large_gradients(at: _SetUp, x: Array, u: Array | None, dy: Array, db: Array | None) -> tuple[Array, dict[int, Any], Array | None]:
    """Of a large layer: dx, by place the gradients for which no dW is needed, and that of the bias under a product."""
    known: dict[int, Any] = {}
    narrow, dropped = [], []
    for k, a in enumerate(at.adapters):
        if not (at.sides[k] and isinstance(a.method, LowRank)):
            continue
        B, A, c = a.method.factors(a.params)
        seen, dh, dc = _drop(a, x), dense.product(dy, B), None if c is None else at.layer.bias_vjp(dy)
        d = Factors(dense.product_vjp(dense.product(seen, A.T), dy), dense.product_vjp(seen, dh), dc)
        known[k] = a.method.factors_vjp(a.params, d)
        if a.dropout is None:
            narrow.append((dh, A))
        else:
            dropped.append((a, dense.product(dh, A)))
    if at.product is None:
        dx = dense.sum_of_products([(dy, at.Ws[-1]), *narrow])
    else:
        dx, product, db = large.folded_vjp(at.product, at.Ws[0], at.bs[0], at.Ws[-1], x, u, dy, db, narrow)
        k = at.sides.index(False)
        method = at.adapters[k].method
        known[k] = method.product_vjp(at.layer, at.adapters[k].params, product)
    for a, side_dx in dropped:
        dx = dx + _drop(a, side_dx)
    return dx, known, db


def _drop(a: Adapter, x: Array) -> Array:
    """Dropout on the input, and its own gradient: a diagonal map is its own transpose."""
    dropout = a.dropout.input if isinstance(a.dropout, Drawn) else a.dropout
    if not isinstance(dropout, Dropout):
        return x
    xp = namespace(x)
    return x * xp.astype(dropout.mask, x.dtype) / (1 - dropout.p)


def _rows(a: Adapter, delta: Array) -> Array:
    """The rows that stay, and its own gradient."""
    if not isinstance(a.dropout, RowDropout):
        return delta
    return column(namespace(delta).astype(a.dropout.factors, delta.dtype)) * delta


def _side(layer: Layer, W: Array, b0: Array | None, a: Adapter, x: Array) -> Array:
    x = _drop(a, x)
    if isinstance(a.method, LowRank):
        B, A, b = a.method.factors(a.params)
        return layer.add_bias(layer.up(layer.down(A.shape[0]).apply(x, A, None), B), b)
    if isinstance(a.dropout, Drawn) and isinstance(a.method, NoisyOutput):
        return a.method.sampled(layer, a.params, x, a.dropout.noise)
    effective, b = a.method.weight(layer, a.params, W, b0, W)
    return layer.apply(x, _rows(a, effective - W), None if b is None or b0 is None else b - b0)


def _side_vjp(layer: Layer, W: Array, b0: Array | None, a: Adapter, x: Array, dy: Array) -> tuple[Array | None, Any, Array | None]:
    x, db0 = _drop(a, x), None
    if isinstance(a.method, LowRank):
        B, A, b = a.method.factors(a.params)
        down = layer.down(A.shape[0])
        dh, dB = layer.up_vjp(down.apply(x, A, None), B, dy)
        db = None if b is None else layer.bias_vjp(dy)
        grads = a.method.factors_vjp(a.params, Factors(dB, down.weight_vjp(x, dh), db))
        dx = down.input_vjp(x, A, dh)
    elif isinstance(a.dropout, Drawn) and isinstance(a.method, NoisyOutput):
        sampled = a.method.sampled_vjp(layer, a.params, x, a.dropout.noise, dy)
        grads, dx = sampled.params, sampled.x
    else:
        effective, b = a.method.weight(layer, a.params, W, b0, W)
        db = None if b is None else layer.bias_vjp(dy)
        d = a.method.weight_vjp(layer, a.params, W, b0, W, _rows(a, layer.weight_vjp(x, dy)), db)
        grads, dx = d.params, layer.input_vjp(x, _rows(a, effective - W), dy)
        db0 = None if d.b is None or db is None or b0 is None else d.b - db  # it reads b' - b0
    return None if dx is None else _drop(a, dx), grads, db0
