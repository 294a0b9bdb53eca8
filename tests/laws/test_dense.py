"""Large matrices in NumPy: tiled, folded and product ways give what the plain formulas give.

Small layers are called large here, and tiles are two or three rows high, so that every border is met. Where nothing rounds, bits are the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_ref import dense, large, stack
from peft_ref.contracts import WeightMethod
from peft_ref.errors import ConfigError, NotMergeableError
from peft_ref.layers import Linear
from peft_ref.methods import IA3, METHODS, FourierFT, HiRA, LoHa, LoRA, half_spectrum
from peft_ref.stack import Adapter, Dropout, StackGradients
from tests.laws.compare import assert_close, assert_same_bits
from tests.laws.strategies import LAW, PAIRS, Case, Host, cases, companion, map_params

LINEAR = [pair for pair in PAIRS if pair[1] in ("linear", "transposed_linear")]
BY_ROWS = [pair for pair in LINEAR if METHODS.weights[pair[0]].by_rows]
PRODUCTS = [(name, kind) for name, kind in LINEAR if METHODS.weights[name].product is not WeightMethod.product]
# A chain of some ten sums of a few numbers each, of size one to ten, in float64: below 100 x 2^-53 of the largest. Methods that divide or
# take powers lose two or three more digits at times, in either way.
ROUNDING = 1e-11


@contextmanager
def called_large(rows: int = 2) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "LEAST", 0)
        patch.setattr(dense, "TILE", rows)
        patch.setattr(half_spectrum, "TILE", rows)
        yield


Numbers = tuple[Host, StackGradients]


def both_ways(case: Case, adapters: list[Adapter], x: Host, W: Host) -> tuple[Numbers, list[Numbers]]:
    """y and the gradients: plain, and of a layer that is called large, each function alone and both together."""
    at = (case.layer, W, case.b, adapters, x)
    plain = stack.forward(*at), stack.vjp(*at, case.dy)
    with called_large():
        alone = stack.forward(*at), stack.vjp(*at, case.dy)
        y, pull = stack.forward_and_vjp(*at)
        before = y.copy()
        together = y, pull(case.dy)
        assert_same_bits(y, before, "y, after its gradients were asked for")
    return plain, [alone, together]


def compare(plain: Numbers, others: list[Numbers], check: Callable[[Any, Any, str], None]) -> None:
    (y, d), sizes = plain, []
    for got_y, got in others:
        check(got_y, y, "y")
        check(got.x, d.x, "dx")
        assert (got.b is None) == (d.b is None)
        if d.b is not None:
            check(got.b, d.b, "db")
        for k, (params, want) in enumerate(zip(got.params, d.params, strict=True)):
            for field in want._fields:
                value = getattr(want, field)
                assert (getattr(params, field) is None) == (value is None), f"adapter {k}: d{field}"
                if value is not None:
                    check(getattr(params, field), value, f"adapter {k}: d{field}")
                    sizes.append(value.size)
    assert sizes or all(v is None for params in d.params for v in params)  # GLoRA may have none


def laid_out(array: Host, how: str) -> Host:
    """The same numbers elsewhere in memory, where nobody may write."""
    if how == "columns first":
        array = np.asfortranarray(array)
    elif how == "every other":
        wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
        wide[..., ::2] = array
        array = wide[..., ::2]
    else:
        array = array.copy()
    array.setflags(write=False)
    return array


LAYOUTS = st.sampled_from(("rows first", "columns first", "every other"))


@pytest.mark.parametrize(("name", "kind"), LINEAR)
@given(data=st.data())
@LAW
def test_a_large_layer_computes_what_a_small_one_does(name: str, kind: str, data: st.DataObject) -> None:
    """Under up to two other adapters, each with dropout or without; the arrays laid out in memory any way and not to be written into."""
    case = data.draw(cases(name, kind))
    adapters = [Adapter(case.method, case.params())]
    for stream in range(data.draw(st.integers(0, 2))):
        adapters.insert(data.draw(st.integers(0, 1)), companion(data, case, 21 + stream))
    masks = (np.random.default_rng([case.seed, 40 + k]).random(case.shape) >= 0.25 for k in range(3))
    adapters = [
        a._replace(dropout=Dropout(mask, 0.25)) if data.draw(st.booleans()) else a for a, mask in zip(adapters, masks, strict=False)
    ]
    frozen = map_params(lambda value: laid_out(value, data.draw(LAYOUTS)), adapters[0].params)
    adapters[0] = adapters[0]._replace(params=frozen)
    x, W = laid_out(case.x, data.draw(LAYOUTS)), laid_out(case.W, data.draw(LAYOUTS))
    try:
        stack.forward(case.layer, W, case.b, adapters, x)
    except (ConfigError, NotMergeableError) as refused:
        with called_large(), pytest.raises(type(refused)):
            stack.forward(case.layer, W, case.b, adapters, x)
        return
    plain, others = both_ways(case, adapters, x, W)
    size = max(
        float(np.max(np.abs(v), initial=0)) for v in (plain[0], plain[1].x, *(v for p in plain[1].params for v in p if v is not None))
    )
    compare(plain, others, lambda got, want, what: assert_close(got, want, what, rounding=ROUNDING, scale=size))


@pytest.mark.parametrize("method", [LoRA(r=2, lora_alpha=4), IA3(), IA3(is_feedforward=True), LoHa(r=2, alpha=1), HiRA(r=2)], ids=str)
@given(data=st.data())
@LAW
def test_where_nothing_rounds_a_large_layer_has_the_same_bits(method: WeightMethod[Any], data: st.DataObject) -> None:
    name = next(name for name, cls in METHODS.weights.items() if cls is type(method))
    case = replace(data.draw(cases(name, "linear", dyadic=True)), method=method)
    plain, others = both_ways(case, [Adapter(method, case.params())], case.x, case.W)
    compare(plain, others, lambda got, want, what: assert_same_bits(got + 0.0, want + 0.0, what))  # + 0.0: no sign of zero


@pytest.mark.parametrize(("name", "kind"), LINEAR)
@given(data=st.data())
@LAW
def test_a_large_layer_stays_in_float32(name: str, kind: str, data: st.DataObject) -> None:
    """And is called large only where every number is of one kind."""
    case = data.draw(cases(name, kind, few=True))

    def narrow(value: Host) -> Host:
        return value.astype(np.float32)

    adapters = [Adapter(case.method, map_params(narrow, case.params()))]
    W, b, x = narrow(case.W), None if case.b is None else narrow(case.b), narrow(case.x)
    with called_large():
        assert stack._set_up(case.layer, W, b, adapters, x).is_large
        assert not stack._set_up(case.layer, W, b, adapters, case.x).is_large
        assert not stack._set_up(case.layer, W, np.zeros(case.layer.shape[0]), adapters, x).is_large
        if any(p is not None and p.dtype.kind == "f" for p in adapters[0].params):
            assert not stack._set_up(case.layer, W, b, [Adapter(case.method, case.params())], x).is_large
        y, pull = stack.forward_and_vjp(case.layer, W, b, adapters, x)
        d = pull(narrow(case.dy))
    floats = [v for v in (y, d.x, d.b, *d.params[0]) if v is not None and v.dtype.kind == "f"]
    assert {v.dtype for v in floats} == {np.dtype(np.float32)}


@pytest.mark.parametrize(("name", "kind"), BY_ROWS)
@given(data=st.data())
@LAW
def test_a_method_by_rows_is_its_rows(name: str, kind: str, data: st.DataObject) -> None:
    """Every row of the weight, and of its gradients, on what an adapter below made of the frozen weight."""
    case = data.draw(cases(name, kind))
    W, dW = case.W + case.numbers(9, case.layer.shape) / 2, case.numbers(10, case.layer.shape)
    db = None if case.b is None else case.numbers(11, case.b.shape)
    at = (case.layer, case.method, case.params(), W, case.b, case.W)
    want, g = case.method.weight(case.layer, *at[2:]), case.method.weight_vjp(case.layer, *at[2:], dW, db)
    with called_large(rows=1):
        got, d = large.weight(*at), large.weight_vjp(*at, dW, db, wanted=True)
    for one, other, what in [
        *zip(got, want, "Wb", strict=True),
        (d.W, g.W, "dW"),
        (d.b, g.b, "db"),
        *zip(d.params, g.params, g.params._fields, strict=True),
    ]:
        assert (one is None) == (other is None), what
        if other is not None:
            assert_close(one, other, what)


@pytest.mark.parametrize(("name", "kind"), PRODUCTS)
@given(data=st.data())
@LAW
def test_a_product_is_the_weight_and_its_gradient(name: str, kind: str, data: st.DataObject) -> None:
    """x = 1 and dy = G^T make y = W'^T, so that any G is the gradient of the weight; rows or inputs scaled by nothing among them."""
    case = data.draw(cases(name, kind))
    params = case.params()
    if scale := next((field for field in ("m", "l") if hasattr(params, field) and data.draw(st.booleans())), None):
        nothing = data.draw(st.sampled_from((0.0, 1e-30)))
        params = params._replace(**{scale: np.concatenate([[nothing], getattr(params, scale)[1:]])})
    at = (case.layer, params, case.W, case.b, case.W)
    G, db = case.numbers(10, case.layer.shape), None if case.b is None else case.numbers(11, case.b.shape)
    try:
        want, g = case.method.weight(*at), case.method.weight_vjp(*at, G, db)
    except NotMergeableError:
        return  # what is added to the bias of a layer without one
    product = case.method.product(case.layer, params)
    assert product is not None
    with called_large():
        s, (W, b) = large.folded(product, case.W, case.b)
        got = large.folded_vjp(s, case.W, case.b, W, np.eye(case.layer.shape[1]), None, np.ascontiguousarray(G.T), db)
    assert_close(W, want[0], "W'")
    assert_close(got.x, G.T @ want[0], "dx")
    of_params = case.method.product_vjp(case.layer, params, got.product)
    for one, other, what in ((b, want[1], "b'"), (got.b, g.b, "db"), *zip(of_params, g.params, g.params._fields, strict=True)):
        assert (one is None) == (other is None), what
        if one is not None and other is not None:
            assert_close(one, other, what, rounding=1e-11)


def exact(f: Callable[..., Any], *arrays: Host) -> tuple[Host, Host]:
    """f in extended precision, and of the sizes of all numbers: what its terms add up to in size."""
    return f(*(a.astype(np.longdouble) for a in arrays)), f(*(abs(a).astype(np.longdouble) for a in arrays))


def diagonal(M: Host, b: int) -> Host:
    return np.stack([M[i : i + b, i : i + b] for i in range(0, M.shape[1], b)])


def block_diagonal(F: Host) -> Host:
    n, b, _ = F.shape
    return np.concatenate([np.pad(F[i], ((0, 0), (i * b, (n - 1 - i) * b))) for i in range(n)], axis=0)


KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "sum_of_products": (
        lambda x, dy, h, A, B, W, F, b: dense.sum_of_products([(x, W.T), (h, B.T)], [b, b]),
        lambda x, dy, h, A, B, W, F, b: x @ W.T + h @ B.T + b + b,
    ),
    "product_vjp": (lambda x, dy, *_: dense.product_vjp(x, dy), lambda x, dy, *_: dy.T @ x),
    "column_dots": (lambda x, dy, *_: dense.column_dots(dy, dy), lambda x, dy, *_: (dy * dy).sum(0)),
    "scaled": (
        lambda x, dy, h, A, B, W, F, b: dense.scaled(W, b, B, A),
        lambda x, dy, h, A, B, W, F, b: (W + B @ A) * b[:, None],
    ),
    "unit_scaled": (
        lambda x, dy, h, A, B, W, F, b: dense.unit_scaled(W, b, B, A)[0] * dense.unit_scaled(W, b, B, A)[1][:, None],
        lambda x, dy, h, A, B, W, F, b: (W + B @ A) * b[:, None],
    ),
    "unit_scaled, norms": (
        lambda x, dy, h, A, B, W, F, b: dense.unit_scaled(W, b, B, A)[1] ** 2,
        lambda x, dy, h, A, B, W, F, b: ((W + B @ A) ** 2).sum(1),
    ),
    "turned": (lambda x, dy, h, A, B, W, F, b: dense.turned(x, F), lambda x, dy, h, A, B, W, F, b: x @ block_diagonal(F)),
    "turned_vjp": (
        lambda x, dy, h, A, B, W, F, b: dense.turned_vjp(dy @ W, x, len(F)),
        lambda x, dy, h, A, B, W, F, b: diagonal((dy @ W).T @ x, F.shape[1]),
    ),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("rows", [1, 255, 256, 257, 700])
def test_a_kernel_computes_its_plain_line(kernel: str, dtype: Any, block: int, rows: int) -> None:
    """As far off as sums of so many terms may be in any order, one inside the other: depth u times the sizes of the terms."""
    rng = np.random.default_rng([rows, block])
    n_in, out, r = 12, 300, 2
    shapes = ((rows, n_in), (rows, out), (rows, r), (r, n_in), (out, r), (out, n_in), (n_in // block, block, block), (out,))
    arrays = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    kept = [laid_out(a, how) for a, how in zip(arrays, ("columns first", "every other", "rows first") * 3, strict=False)]
    ours, plain = KERNELS[kernel]
    got, (want, size) = ours(*kept), exact(plain, *arrays)
    depth = rows + out + n_in + r + 5
    assert got.shape == want.shape
    assert got.dtype == dtype
    assert np.all(abs(got - want) <= depth * np.finfo(dtype).eps / 2 * size)


def test_room_for_a_tile_is_of_the_precision_of_its_numbers() -> None:
    """Twice as wide, it would fit half of the caches."""
    made, empty = [], np.empty
    x, h, A, F = (np.ones(shape, np.float32) for shape in ((5, 6), (5, 2), (2, 6), (2, 3, 3)))

    def watched(*given: Any) -> Host:
        made.append(empty(*given))
        return made[-1]

    with called_large(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "empty", watched)
        dense.sum_of_products([(x, np.eye(6, dtype=np.float32)), (h, A)])
        dense.turned(x, F)
        dense.turned_vjp(x, x, 2)
    assert len(made) == 6
    assert {array.dtype for array in made} == {np.dtype(np.float32)}


@pytest.mark.parametrize("shape", [(65, 128), (64, 65), (130, 2), (1, 70), (70, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_waves_are_sums_of_cosines_and_their_gradient_is_the_transpose(shape: tuple[int, int], dtype: Any) -> None:
    """Each wave alone, the mirror images of others and those at half of a size among them. A transform of n numbers rounds log2 n times in
    a row, and so do its tables and the sum over rows."""
    rng, (out, n_in) = np.random.default_rng(shape), shape
    u, v = np.divmod(rng.permutation(out * n_in)[:60], n_in)
    c, G = rng.normal(size=len(u)).astype(dtype), rng.normal(size=shape).astype(dtype)
    i, j = np.arange(out)[:, None], np.arange(n_in)
    each = [np.cos(2 * np.pi * ((a * i % out) / out + (b * j % n_in) / n_in)) for a, b in zip(u, v, strict=True)]
    unit = np.finfo(dtype).eps / 2 * 8 * np.log2(out * n_in)
    D, dc = half_spectrum.waves(c, u, v, shape), half_spectrum.waves_vjp(G, u, v)
    assert D.dtype == dc.dtype == dtype
    assert np.max(abs(D - sum(float(a) * wave for a, wave in zip(c, each, strict=True)))) <= unit * np.sum(abs(c))
    assert np.max(abs(dc - [np.sum(G * wave) for wave in each])) <= unit * np.sum(abs(G))


def test_waves_are_computed_in_the_precision_of_their_numbers() -> None:
    """In float32 every tile and every transform is of float32, which is what they are fast by."""
    seen, tiles, irfft = set(), half_spectrum._tiles, np.fft.irfft
    c, u, v = np.ones(3, np.float32), np.array([0, 1, 2]), np.array([1, 2, 2])

    def watched(*given: Any) -> Any:
        for rows, E in tiles(*given):
            seen.add(E.dtype)
            yield rows, E

    def transformed(here: Any, **options: Any) -> Any:
        seen.add(here.dtype)
        return irfft(here, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(half_spectrum, "_tiles", watched)
        patch.setattr(np.fft, "irfft", transformed)
        D = half_spectrum.waves(c, u, v, (5, 6))
        half_spectrum.waves_vjp(D, u, v)
    assert seen == {np.dtype(np.complex64)}


def test_fourierft_of_a_large_weight_is_transformed() -> None:
    layer, method = Linear(in_features=6, out_features=5), FourierFT(n_frequency=7)
    params = method.init(layer, np.zeros((5, 6)), np.random.default_rng(0)).params
    plain, G = method.delta(layer, params), np.random.default_rng(1).normal(size=(5, 6))
    dc = method.delta_vjp(layer, params, plain._replace(W=G)).c
    with called_large(), pytest.MonkeyPatch.context() as patch:
        patch.delattr(FourierFT, "_waves")
        assert_close(method.delta(layer, params).W, plain.W, "the delta")
        assert_close(method.delta_vjp(layer, params, plain._replace(W=G)).c, dc, "dc")


def test_a_small_matrix_is_not_large() -> None:
    """So what is judged and frozen keeps its bits; and so does every other library."""
    assert not dense.is_large(np.zeros((255, 256)))
    assert dense.is_large(np.zeros((256, 256)))
    assert not dense.is_large(np.zeros((256, 256), np.float16))
    assert not dense.is_large(np.zeros((256, 256)), np.zeros(1, np.float32))
    assert not dense.is_large(np.zeros((256, 256), dtype=object))
