"""Merged equals unmerged, unmerging undoes merging, and several adapters act in the order the contract says."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_ref import stack
from peft_ref.contracts import Additive, LowRank
from peft_ref.errors import ConfigError, NotMergeableError
from peft_ref.layers import Conv, Embedding, Linear
from peft_ref.methods import IA3, METHODS, DoRA, LoHa, LoRA
from peft_ref.stack import Adapter, Dropout
from tests.laws.compare import assert_close, assert_same_bits
from tests.laws.strategies import LAW, PAIRS, Case, Host, cases, companion
from tests.laws.test_dense import called_large
from tests.methods import made

ADDITIVE = [(name, kind) for name, kind in PAIRS if issubclass(METHODS[name], LowRank | Additive)]
PARTLY = {"supertuning"}  # whose alpha scales the low-rank part alone
SCALED = [
    (name, kind) for name, kind in ADDITIVE if name not in PARTLY and {f.name for f in fields(METHODS[name])} & {"alpha", "lora_alpha"}
]  # type: ignore[arg-type]


def merged(case: Case, adapters: list[Adapter]) -> tuple[Host, Host | None] | None:
    """The merged weight and bias, or None where the frozen ones cannot hold the adapters."""
    try:
        return stack.merge(case.layer, case.W, case.b, adapters)
    except NotMergeableError:
        return None


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_merged_equals_unmerged(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind))
    adapters = [Adapter(case.method, case.params())]
    if (after := merged(case, adapters)) is not None:
        y = stack.forward(case.layer, case.W, case.b, adapters, case.x)
        assert_close(y, case.layer.apply(case.x, *after), "the unmerged output")


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_merged_equals_unmerged_for_several_adapters(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind))
    adapters = [Adapter(case.method, case.params()), companion(data, case, 21), companion(data, case, 22)]
    if (after := merged(case, adapters)) is not None:
        y = stack.forward(case.layer, case.W, case.b, adapters, case.x)
        assert_close(y, case.layer.apply(case.x, *after), "the unmerged output", rounding=1e-11)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_unmerge_undoes_merge(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind))
    adapters = [Adapter(case.method, case.params()), companion(data, case, 21)]
    if (after := merged(case, adapters)) is not None:
        W, b = stack.unmerge(case.layer, *after, adapters, case.W, case.b)
        assert_close(W, case.W, "the weight", rounding=1e-8)
        if case.b is not None:
            assert b is not None
            assert_close(b, case.b, "the bias", rounding=1e-8)


@pytest.mark.parametrize("name", [name for name, cls in METHODS.weights.items() if cls.replaces])
def test_what_takes_the_weights_place_is_undone_to_what_stood_there_before(name: str) -> None:
    layer, rng = Embedding(num_embeddings=5, embedding_dim=3), np.random.default_rng(0)
    W, replacing, lora = rng.normal(size=layer.shape), made(name), LoRA(r=2)
    first = Adapter(lora, lora.to_params(A=rng.normal(size=(2, 5)), B=rng.normal(size=(3, 2))))
    second = Adapter(replacing, replacing.init(layer, rng.normal(size=layer.shape), rng).params)
    merged_W, b = stack.merge(layer, W, None, [first, second])
    assert_close(stack.unmerge(layer, merged_W, b, [first, second], W, None)[0], W, "the weight")


@pytest.mark.parametrize(("name", "kind"), ADDITIVE)
@given(data=st.data())
@LAW
def test_unmerge_gives_the_same_bits_back_where_nothing_is_rounded(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind, dyadic=True))
    adapters = [Adapter(case.method, case.params())]
    after = merged(case, adapters)
    if after is None or not all(_short(part) for part in case.method.delta(case.layer, case.params()) if part is not None):
        return  # a scale like 1/3: W + dW is rounded
    W, b = stack.unmerge(case.layer, *after, adapters, case.W, case.b)
    assert_same_bits(W, case.W, "the weight")
    if case.b is not None:
        assert b is not None
        assert_same_bits(b, case.b, "the bias")


def _short(delta: Host) -> bool:
    grid = delta * 2.0**30
    return bool(np.all(grid == np.round(grid)) and np.all(np.abs(delta) < 2.0**20))


@pytest.mark.parametrize(("name", "kind"), SCALED)
@given(data=st.data())
@LAW
def test_doubling_alpha_doubles_what_is_added(name: str, kind: str, data: st.DataObject) -> None:
    """On a weight of zeros the output is what the adapter adds, and a factor of two rounds nothing: the bits must match."""
    case = data.draw(cases(name, kind))
    alpha = "alpha" if "alpha" in {f.name for f in fields(case.method)} else "lora_alpha"  # type: ignore[arg-type]
    twice = replace(case.method, **{alpha: 2 * getattr(case.method, alpha)})  # type: ignore[type-var]
    p, zero = case.params(), np.zeros_like(case.W)
    b = None if case.b is None else np.zeros_like(case.b)
    once = stack.forward(case.layer, zero, b, [Adapter(case.method, p)], case.x)
    assert_same_bits(stack.forward(case.layer, zero, b, [Adapter(twice, p)], case.x), 2 * once, "the output at twice alpha")


@pytest.mark.parametrize(("name", "kind"), ADDITIVE)
@given(data=st.data())
@LAW
def test_additive_adapters_add_up_in_any_order(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind))
    first, second = Adapter(case.method, case.params()), Adapter(case.method, case.params(21))

    def y(*adapters: Adapter) -> Host:
        return stack.forward(case.layer, case.W, case.b, adapters, case.x)

    assert_close(y(first, second), y(first) + y(second) - y(), "the output of both")
    assert_close(y(second, first), y(first, second), "the output in the other order")


@pytest.mark.parametrize("kind", sorted(DoRA.kinds))
@given(data=st.data())
@LAW
def test_dora_after_another_adapter_scales_its_weight_by_the_norm_at_the_frozen_weight(kind: str, data: st.DataObject) -> None:
    """W2 = m / |W0 + s B A| (W1 + s B A), the norm taken row by row, whatever made W1 out of W0."""
    case = data.draw(cases("dora", kind))
    p, below = case.params(), companion(data, case, 21)
    under = merged(case, [below])
    if under is None:
        return
    assert isinstance(case.method, DoRA)
    s = case.method.lora_alpha / (case.method.r ** (0.5 if case.method.use_rslora else 1))
    delta = s * p.B @ p.A
    gain = p.m / np.linalg.norm(case.W + delta, axis=1)
    expected = gain[:, np.newaxis] * (under[0] + delta)
    got, _ = stack.merge(case.layer, case.W, case.b, [below, Adapter(case.method, p)])
    assert_close(got, expected, "the weight")


def test_the_order_of_a_reweighting_and_an_additive_adapter_matters() -> None:
    layer = Linear(in_features=3, out_features=2)
    case = Case(LoRA(r=2), layer, True, (4, 3), 5)
    dora = DoRA(r=2)
    lora = Adapter(case.method, case.params())
    reweight = Adapter(dora, replace(case, method=dora).params(21))
    one = stack.forward(layer, case.W, case.b, [lora, reweight], case.x)
    other = stack.forward(layer, case.W, case.b, [reweight, lora], case.x)
    assert np.max(np.abs(one - other)) > 1e-3


@given(data=st.data())
@LAW
def test_lora_on_a_grouped_convolution_is_not_mergeable_and_runs_unmerged(data: st.DataObject) -> None:
    """Unmerged it is the convolution with A, all channels in one group, followed by the grouped 1x1 convolution with B."""
    kind = data.draw(st.sampled_from(("conv1d", "conv2d", "conv3d")))
    case = data.draw(cases("lora", kind).filter(lambda c: c.layer.groups > 1))
    p = case.params()
    adapter = Adapter(case.method, p)
    with pytest.raises(NotMergeableError, match="groups"):
        stack.merge(case.layer, case.W, case.b, [adapter])
    with pytest.raises(NotMergeableError, match="groups"):
        stack.unmerge(case.layer, case.W, case.b, [adapter], case.W)
    layer, method = case.layer, case.method
    assert isinstance(layer, Conv)
    assert isinstance(method, LoRA)
    down = replace(layer, out_channels=method.r, groups=1)
    ones = (1,) * len(layer.kernel_size)
    up = Conv(in_channels=method.r, out_channels=layer.out_channels, kernel_size=ones, groups=layer.groups)
    change = method.scale * up.apply(down.apply(case.x, p.A, None), p.B, p.c)
    got = stack.forward(layer, case.W, case.b, [adapter], case.x) - layer.apply(case.x, case.W, case.b)
    assert_close(got, change, "what the adapter adds")


@pytest.mark.parametrize("kind", sorted(LoRA.kinds - {"embedding"}))
@given(data=st.data())
@LAW
def test_lora_bias_on_a_layer_without_bias_is_not_mergeable(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases("lora", kind).filter(lambda c: not c.bias and c.layer.groups == 1))
    case = replace(case, method=replace(case.method, lora_bias=True))  # type: ignore[type-var]
    adapter = Adapter(case.method, case.params())
    for change in (stack.merge, lambda *at: stack.unmerge(*at, case.W)):
        with pytest.raises(NotMergeableError, match=r"^LoRA adds to the bias"):
            change(case.layer, case.W, None, [adapter])


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[1] != "embedding"])
@given(data=st.data())
@LAW
def test_dropout_that_keeps_everything_changes_nothing(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind))
    p, layer = case.params(), case.layer
    plain, kept = Adapter(case.method, p), Adapter(case.method, p, Dropout(np.ones(case.shape), 0.0))
    got = stack.forward(layer, case.W, case.b, [kept], case.x)
    assert_close(got, stack.forward(layer, case.W, case.b, [plain], case.x), "the output")
    expected = stack.vjp(layer, case.W, case.b, [plain], case.x, case.dy)
    gradients = stack.vjp(layer, case.W, case.b, [kept], case.x, case.dy)
    assert gradients.x is not None
    assert expected.x is not None
    assert_close(gradients.x, expected.x, "the gradient of x")
    for field in case.trained:
        assert_close(getattr(gradients.params[0], field), getattr(expected.params[0], field), f"the gradient of {field}", rounding=1e-11)


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[1] != "embedding"])
@given(data=st.data())
@LAW
def test_dropout_that_drops_everything_leaves_only_what_does_not_see_the_input(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind))
    dropped = Adapter(case.method, case.params(), Dropout(np.zeros(case.shape), 0.5))
    got = stack.forward(case.layer, case.W, case.b, [dropped], case.x)
    apart = case.method.apart(dropped.params)
    kept = [] if apart is None else [Adapter(case.method, apart[0])]  # what dropout does not reach
    change = got - stack.forward(case.layer, case.W, case.b, kept, case.x)
    at_zero = stack.forward(case.layer, case.W, case.b, [dropped], np.zeros(case.shape))
    assert_close(change, at_zero - stack.forward(case.layer, case.W, case.b, kept, np.zeros(case.shape)), "what the adapter adds")


def test_dropout_before_a_reweighting_adapter_is_refused() -> None:
    layer = Linear(in_features=3, out_features=2)
    case = Case(LoRA(r=2), layer, False, (4, 3), 5)
    lora = Adapter(case.method, case.params(), Dropout(np.ones((4, 3)), 0.0))
    dora = Adapter(DoRA(r=2), replace(case, method=DoRA(r=2)).params(21))
    with pytest.raises(ConfigError, match="reweighting"):
        stack.forward(layer, case.W, None, [lora, dora], case.x)


@pytest.mark.parametrize("first", [DoRA(r=2), LoHa(r=2), LoRA(r=2), IA3()], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("dropped", [DoRA(r=2), LoHa(r=2), LoRA(r=2), IA3()], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("large", [False, True])
def test_what_an_adapter_with_dropout_adds_is_measured_at_the_frozen_layer(first: Any, dropped: Any, large: bool) -> None:
    """layer(x; T_1(W_0)) + layer(drop(x); T_2(W_0) - W_0, b_2 - b_0), and its gradient, whatever T_1 is."""
    layer = Linear(in_features=3, out_features=2)
    one, two = (Case(method, layer, True, (4, 3), seed) for method, seed in ((first, 5), (dropped, 6)))
    mask, W, b, x, dy = np.random.default_rng(1).random((4, 3)) > 0.4, one.W, one.b, one.x, one.dy
    below, beside = Adapter(first, one.params()), Adapter(dropped, two.params(21))
    (W1, b1), (W2, b2) = (stack.merge(layer, W, b, [a]) for a in (below, beside))
    assert b is not None
    assert b1 is not None
    assert b2 is not None
    seen = x * mask / 0.6
    with called_large() if large else nullcontext():
        y = stack.forward(layer, W, b, [below, beside._replace(dropout=Dropout(mask, 0.4))], x)
        d = stack.vjp(layer, W, b, [below, beside._replace(dropout=Dropout(mask, 0.4))], x, dy)
    assert_close(y, x @ W1.T + b1 + seen @ (W2 - W).T + b2 - b, "y")
    assert_close(d.x, dy @ W1 + (dy @ (W2 - W)) * mask / 0.6, "dx")
    for k, (a, rows) in enumerate(((below, x), (beside, seen))):
        g = a.method.weight_vjp(layer, a.params, W, b, W, dy.T @ rows, dy.sum(0))
        for got, want, field in zip(d.params[k], g.params, g.params._fields, strict=True):
            assert (got is None) == (want is None), field
            if want is not None:
                assert_close(got, want, f"adapter {k}: d{field}", rounding=1e-11)


@pytest.mark.parametrize("name", [name for name, kind in PAIRS if kind == "embedding"])
def test_dropout_on_an_embedding_is_refused(name: str) -> None:
    layer = Embedding(num_embeddings=4, embedding_dim=3)
    case = Case(made(name), layer, False, (5,), 5)
    with pytest.raises(ConfigError, match="embedding"):
        stack.forward(layer, case.W, None, [Adapter(case.method, case.params(), Dropout(np.ones(5), 0.0))], case.x)
