"""Any static change of a weight as a LoRA: HF's convert_to_lora, of one layer.

    dW = W' - W,    dW = U S V^T    ->    B = U_k S_k  (out, k)    A = V_k^T  (k, in)    s = 1        b' = b + c

    rank     k is at most this, and no more than dW has: no matrix of rank k is nearer to dW (Eckart-Young)
    energy   the smallest k with  sum_{i<=k} S_i^2 >= energy * sum_i S_i^2
    neither  every S_i above what rounding makes of zero: nothing is lost

    lost = |dW - B A|^2 / |dW|^2 = sum_{i>k} S_i^2 / sum_i S_i^2        Frobenius

A delta that is factors already (`LowRank`: LoRA, AdaLoRA) keeps them, the scale in B, while k reaches their rank. Below, the SVD is that of
two small triangles, B = Q R and A^T = P T, so dW = Q (R T^T) P^T is never formed. A grouped convolution is converted group by group, each
to k / groups. Where a method changes the bias, its change is LoRA's own bias c.

HF      peft.convert_to_lora, of linear layers and without biases. An int is the rank and has to fit every layer; a float is the energy. It
        takes the singular values in float32. MiSS keeps its own rank whatever rank is asked for.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any, NamedTuple

from peft_ref.arrays import Array, namespace, pad, thin_svd, zeros_like
from peft_ref.contracts import Additive, Delta, LowRank, WeightMethod
from peft_ref.errors import ConfigError
from peft_ref.layers import Layer
from peft_ref.methods.lora import LoRA, Params

NEEDS = frozenset({"linalg"})  # of the array API's extensions


class Converted(NamedTuple):
    method: LoRA
    params: Params
    lost: float  # the share of the delta's energy that the factors have not


class _Block(NamedTuple):
    """The delta of one group as U S V^T."""

    U: Array
    S: Array
    Vh: Array


def to_lora(
    method: WeightMethod[Any],
    layer: Layer,
    params: Any,
    W: Array | None = None,
    b: Array | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> Converted:
    """What `params` do to W (out, in) and b, as a LoRA of scale 1 on that layer. W may be left out where the delta is without it."""
    check_asked(rank, energy)
    method.check_layer(layer)
    g = layer.groups
    if rank is not None and rank % g:
        raise ConfigError(f"rank={rank} on a convolution with groups={g}: the rank must be divisible by the groups.")
    if isinstance(method, LowRank):
        f = method.factors(params)
        own = f.B.shape[1]  # of each group
        if own == 0 or (energy is None and (rank is None or rank // g >= own)):
            return _converted(*((f.A, f.B) if own else _nothing(layer, f.B)), f.b, 0.0)
        rows, ranks = f.B.shape[0] // g, [slice(i * own, (i + 1) * own) for i in range(g)]
        blocks = [_of_factors(f.B[i * rows : (i + 1) * rows, :], f.A[ranks[i], :]) for i in range(g)]
        return _cut(layer, blocks, f.b, rank, energy, 0.0)
    delta, size = _delta(method, layer, params, W, b)
    rows = delta.W.shape[0] // g
    blocks = [_Block(*thin_svd(delta.W[i * rows : (i + 1) * rows, :])) for i in range(g)]
    return _cut(layer, blocks, delta.b, rank, energy, size)


def check_asked(rank: int | None, energy: float | None) -> None:
    if rank is not None and energy is not None:
        raise ConfigError(f"rank={rank} and energy={energy}: each decides how many ranks are kept.\n  Give one of them.")
    if rank is not None and (isinstance(rank, bool) or rank < 1):
        raise ConfigError(f"rank={rank}: a positive integer is needed (HF PEFT refuses it too).")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy={energy}: a share above 0 and at most 1 is needed (HF PEFT refuses it too).")


def _delta(method: WeightMethod[Any], layer: Layer, params: Any, W: Array | None, b: Array | None) -> tuple[Delta, float]:
    """The change of (W, b), and the size of the numbers that it is the difference of: what rounds is that."""
    if isinstance(method, Additive):
        return method.delta(layer, params), 0.0
    if W is None:
        raise ConfigError(f"{type(method).__name__} changes a weight by what depends on it.\n  Give the frozen weight, or the model.")
    changed, bias = method.weight(layer, params, W, b, W)
    return Delta(changed - W, None if bias is None or bias is b or b is None else bias - b), _norm(W)


def _of_factors(B: Array, A: Array) -> _Block:
    xp = namespace(A)
    Q, R = xp.linalg.qr(B)
    P, T = xp.linalg.qr(xp.matrix_transpose(A))
    U, S, Vh = thin_svd(R @ xp.matrix_transpose(T))
    return _Block(Q @ U, S, Vh @ xp.matrix_transpose(P))


def _cut(layer: Layer, blocks: list[_Block], c: Array | None, rank: int | None, energy: float | None, size: float) -> Converted:
    xp, g = namespace(blocks[0].S), layer.groups
    squares = xp.sum(xp.stack([block.S * block.S for block in blocks]), axis=0)
    n = squares.shape[0]
    total = float(xp.sum(squares))
    noise = float(xp.finfo(squares.dtype).eps) * max(layer.shape) * max(size, math.sqrt(total))
    k = int(xp.sum(xp.astype(squares > noise * noise, squares.dtype)))
    if rank is not None:
        k = min(rank // g, k)
    elif energy is not None:
        k = min(1 + bisect_left(range(1, n + 1), energy * total, key=lambda m: float(xp.sum(squares[:m]))), k)
    k = max(1, k)
    A = xp.concat([_in_place(layer, block.Vh[:k, :], i) for i, block in enumerate(blocks)])
    B = xp.concat([block.U[:, :k] * block.S[:k] for block in blocks])
    return _converted(A, B, c, float(xp.sum(squares[k:])) / total if total > noise * noise else 0.0)


def _nothing(layer: Layer, like: Array) -> tuple[Array, Array]:
    """A and B of the least rank there is, for a delta of rank zero: AdaLoRA may prune a layer altogether."""
    return zeros_like((layer.groups, layer.fan_in), like), zeros_like((layer.shape[0], 1), like)


def _in_place(layer: Layer, A: Array, group: int) -> Array:
    """A group's rows as rows over all inputs, of which a frozen grouped kernel sees only its own."""
    if A.shape[1] == layer.fan_in:
        return A
    before = group * A.shape[1]
    return pad(A, 1, before, layer.fan_in - before - A.shape[1])


def _converted(A: Array, B: Array, c: Array | None, lost: float) -> Converted:
    r = A.shape[0]
    return Converted(LoRA(r=r, lora_alpha=r, lora_bias=c is not None), Params(A, B, c), lost)


def _norm(x: Array) -> float:
    xp = namespace(x)
    return float(xp.sqrt(xp.sum(x * x)))
