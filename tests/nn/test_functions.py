"""Every function's vjp is the transpose of its derivative, told by a central difference; and each has the values that calculus asks for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from peft_ref.errors import ConfigError, ShapeError
from peft_ref.nn import attention as at
from peft_ref.nn import functions as fn
from peft_ref.nn import loss
from peft_ref.nn.rope import Rope

Host = np.ndarray[Any, Any]
RNG = np.random.default_rng(11)


def numbers(*shape: int) -> Host:
    return RNG.normal(size=shape)


LABELS = np.asarray([[3, -100, 0, 4], [-100, -100, 1, 2]])
WEIGHTS = np.asarray([[0.0, 0.0, 0.5, 0.25], [0.0, 0.0, 0.125, 1.0]])
TARGETS = np.asarray([[1.0, 0.0, 0.25], [0.0, 0.5, 2.0]])
SPANS = np.asarray([0, 7, -3]), np.asarray([3, 2, 4])  # of 4 tokens: one behind them, one before
SEEN = np.where(RNG.random((2, 1, 3, 5)) < 0.7, 0.0, np.finfo(float).min)
POSITIONS = np.asarray([[0, 2, 9]])
FREQUENCIES = Rope(rope_theta=30.0).frequencies(6)
PAST = at.KeyValue(numbers(2, 2, 4, 3), numbers(2, 2, 4, 3))


def kept(past_k: Host, past_v: Host, k: Host, v: Host) -> tuple[Host, Host]:
    return tuple(at.append(at.KeyValue(past_k, past_v), at.KeyValue(k, v)))  # type: ignore[return-value]


def kept_vjp(past_k: Host, past_v: Host, k: Host, v: Host, d: tuple[Host, Host]) -> tuple[Host, ...]:
    past, new = at.append_vjp(at.KeyValue(past_k, past_v), at.KeyValue(k, v), at.KeyValue(*d))
    assert past is not None
    return *past, *new


# name -> f, its vjp (arguments of f, then the gradient of what it returned), arguments to differ in
CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Host, ...]]] = {
    "softmax": (fn.softmax, fn.softmax_vjp, (numbers(3, 4),)),
    "rms_norm": (lambda x, w: fn.rms_norm(x, w, 0.1), lambda x, w, d: fn.rms_norm_vjp(x, w, 0.1, d)[:2], (numbers(2, 3, 5), numbers(5))),
    "layer_norm": (
        lambda x, w, b: fn.layer_norm(x, w, b, 0.1),
        lambda x, w, b, d: fn.layer_norm_vjp(x, w, b, 0.1, d),
        (numbers(2, 3, 5), numbers(5), numbers(5)),
    ),
    **{name: (a.f, a.vjp, (3 * numbers(40),)) for name, a in fn.ACTIVATIONS.items()},
    "erf": (fn.erf, fn.erf_vjp, (numbers(20),)),
    "attention": (
        lambda q, k, v, m: at.attention(q, k, v, m, 0.7),
        lambda q, k, v, m, d: at.attention_vjp(q, k, v, m, 0.7, d),
        (numbers(2, 6, 3, 4), numbers(2, 3, 5, 4), numbers(2, 3, 5, 4), numbers(1, 6, 3, 5)),
    ),
    "masked attention": (
        lambda q, k, v: at.attention(q, k, v, SEEN, 0.7),
        lambda q, k, v, d: at.attention_vjp(q, k, v, SEEN, 0.7, d)[:3],
        (numbers(2, 4, 3, 4), numbers(2, 2, 5, 4), numbers(2, 2, 5, 3)),
    ),
    "rotate": (
        lambda x: at.rotate(x, POSITIONS, FREQUENCIES),
        lambda x, d: at.rotate_vjp(x, POSITIONS, FREQUENCIES, d),
        (numbers(2, 2, 3, 6),),
    ),
    "append": (kept, kept_vjp, (*PAST, numbers(2, 2, 1, 3), numbers(2, 2, 1, 3))),
    "cross_entropy": (lambda z: loss.cross_entropy(z, LABELS), lambda z, d: loss.cross_entropy_vjp(z, LABELS, d), (numbers(2, 4, 5),)),
    "next_token_loss": (
        lambda z: loss.next_token_loss(z, LABELS),
        lambda z, d: loss.next_token_loss_vjp(z, LABELS, d),
        (numbers(2, 4, 5),),
    ),
    "weighted_next_token_loss": (
        lambda z: loss.weighted_next_token_loss(z, LABELS, WEIGHTS),
        lambda z, d: loss.weighted_next_token_loss_vjp(z, LABELS, WEIGHTS, d),
        (numbers(2, 4, 5),),
    ),
    "cross_entropy, 3 ignored": (
        lambda z: loss.cross_entropy(z, LABELS, ignored=3),
        lambda z, d: loss.cross_entropy_vjp(z, LABELS, d, ignored=3),
        (numbers(2, 4, 5),),
    ),
    "binary_cross_entropy": (
        lambda z: loss.binary_cross_entropy(z, TARGETS),
        lambda z, d: loss.binary_cross_entropy_vjp(z, TARGETS, d),
        (3 * numbers(2, 3),),
    ),
    "mean_squared_error": (
        lambda z: loss.mean_squared_error(z, TARGETS),
        lambda z, d: loss.mean_squared_error_vjp(z, TARGETS, d),
        (numbers(2, 3),),
    ),
    **{
        f"classification_loss, {kind}": (
            lambda z, kind=kind, y=y: loss.classification_loss(z, y, kind),
            lambda z, d, kind=kind, y=y: loss.classification_loss_vjp(z, y, kind, d),
            (numbers(2, 3),),
        )
        for kind, y in zip(loss.PROBLEM_TYPES, (TARGETS, np.asarray([2, 0]), TARGETS), strict=True)
    },
    "classification_loss, one class": (
        lambda z: loss.classification_loss(z, TARGETS[:, 0], loss.REGRESSION),
        lambda z, d: loss.classification_loss_vjp(z, TARGETS[:, 0], loss.REGRESSION, d),
        (numbers(2, 1),),
    ),
    "span_loss": (lambda z: loss.span_loss(z, *SPANS), lambda z, d: loss.span_loss_vjp(z, *SPANS, d), (numbers(3, 4, 2),)),
    "broadcasting": (lambda x: np.broadcast_to(x, (2, 3, 4)) + 0, lambda x, d: fn.sum_to(d, x.shape), (numbers(3, 1),)),
    "split_heads": (lambda x: at.split_heads(x, 3), lambda x, d: at.join_heads(d), (numbers(2, 4, 6),)),
    "join_heads": (at.join_heads, lambda x, d: at.split_heads(d, 3), (numbers(2, 3, 4, 2),)),
}


def several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("name", CASES)
def test_the_vjp_is_the_transpose_of_the_derivative(name: str) -> None:
    """<dy, f'(x) v> = <vjp(dy), v>. The difference of step h, taken at h and 2 h, is right to h^4."""
    f, vjp, args = CASES[name]
    rng = np.random.default_rng(12)
    dys = [np.asarray(rng.normal(size=np.shape(y))) for y in several(f(*args))]
    directions = [rng.normal(size=a.shape) for a in args]
    d = tuple(dys) if len(dys) > 1 else dys[0]
    got = several(vjp(*args, d))
    assert [np.shape(g) for g in got] == [a.shape for a in args]

    def along(h: float) -> float:
        moved = several(f(*(a + h * v for a, v in zip(args, directions, strict=True))))
        return sum(float(np.sum(dy * y)) for dy, y in zip(dys, moved, strict=True))

    h = 1e-3
    expected = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    assert sum(float(np.sum(g * v)) for g, v in zip(got, directions, strict=True)) == pytest.approx(expected, rel=1e-8, abs=1e-9)


def test_erf_is_right_to_the_last_digits() -> None:
    x = np.concat([np.linspace(-8, 8, 801), np.asarray([1e-300, -1e-9, 1e-3, 700.0, -np.inf, np.inf])])
    expected = np.asarray([math.erf(v) for v in x])
    assert np.max(np.abs(fn.erf(x) - expected)) <= 1e-15
    small = np.asarray([1e-300, -1e-9, 1e-3])
    assert np.max(np.abs(fn.erf(small) / np.asarray([math.erf(v) for v in small]) - 1)) <= 1e-14


def test_activations_at_the_ends_neither_overflow_nor_warn() -> None:
    with np.errstate(all="raise", under="ignore"):
        for name, a in fn.ACTIVATIONS.items():
            y = a.f(np.asarray([-1e4, 0.0, 1e4]))
            np.testing.assert_array_equal(y, [-1.0, 0.0, 1.0] if name == "tanh" else [0.0, 0.0, 1e4], err_msg=name)


def test_softmax_and_loss_stand_large_numbers() -> None:
    with np.errstate(all="raise", under="ignore"):
        assert fn.softmax(np.asarray([1e4, 1e4, -1e4])).tolist() == [0.5, 0.5, 0.0]
        assert loss.cross_entropy(np.asarray([[1e4, 0.0]]), np.asarray([1])) == 1e4
        assert loss.binary_cross_entropy(np.asarray([[1e4, -1e4]]), np.asarray([[0.0, 0.0]])) == 0.5e4


def test_losses_by_hand() -> None:
    even = np.zeros((2, 4, 2))
    assert loss.span_loss(even, np.asarray([1, 9]), np.asarray([-1, 0])) == pytest.approx(math.log(4), rel=1e-14)
    assert loss.binary_cross_entropy(np.zeros((2, 3)), TARGETS) == pytest.approx(math.log(2), rel=1e-14)
    assert loss.mean_squared_error(TARGETS + 2, TARGETS) == 4
    with np.errstate(invalid="ignore"):
        assert np.isnan(loss.span_loss(even, np.asarray([9, 9]), np.asarray([1, 1])))


def test_labels_say_what_a_classifier_is_for() -> None:
    three, one = np.zeros((2, 3)), np.zeros((2, 1))
    assert loss.problem_type_of(one, np.asarray([1, 0])) == "regression"
    assert loss.problem_type_of(three, np.asarray([1, 0])) == "single_label_classification"
    assert loss.problem_type_of(three, TARGETS) == "multi_label_classification"


def test_attention_on_equal_keys_averages_the_values() -> None:
    v = numbers(1, 1, 4, 3)
    y = at.attention(numbers(1, 2, 2, 3), np.ones((1, 1, 4, 3)), v, None, 0.5)
    np.testing.assert_allclose(y, np.broadcast_to(np.mean(v, axis=2, keepdims=True), (1, 2, 2, 3)), rtol=1e-14)


def test_heads_that_lie_side_by_side_share_keys_and_values() -> None:
    q, k, v = numbers(2, 6, 3, 4), numbers(2, 2, 5, 4), numbers(2, 2, 5, 4)
    each = [at.attention(q[:, h : h + 1], k[:, h // 3 : h // 3 + 1], v[:, h // 3 : h // 3 + 1], None, 0.5) for h in range(6)]
    np.testing.assert_allclose(at.attention(q, k, v, None, 0.5), np.concat(each, axis=1), rtol=1e-13)


def test_the_product_of_rotated_vectors_depends_on_the_distance_alone() -> None:
    q, k = numbers(1, 1, 1, 6), numbers(1, 1, 1, 6)

    def product(m: int, n: int) -> float:
        turned = (at.rotate(x, np.asarray([[p]]), FREQUENCIES) for x, p in ((q, m), (k, n)))
        return float(np.sum(next(turned) * next(turned)))

    assert product(9, 4) == pytest.approx(product(5, 0), rel=1e-12)
    assert product(9, 4) != pytest.approx(product(9, 5), rel=1e-3)


def test_a_mask_lets_nobody_look_ahead_or_at_padding() -> None:
    x = np.zeros((2, 3, 1))
    bias = at.mask_bias(x, np.asarray([[1, 0, 1, 1], [1, 1, 1, 1]]), 1, causal=True)
    assert (bias == 0).astype(int).tolist() == [[[[1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]], [[[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]]]
    assert np.unique(bias).tolist() == [np.finfo(float).min, 0.0]
    both_ways = at.mask_bias(x, np.asarray([[1, 0, 1], [1, 1, 1]]), causal=False)
    assert (np.broadcast_to(both_ways, (2, 1, 3, 3)) == 0).astype(int).tolist() == [[[[1, 0, 1]] * 3], [[[1, 1, 1]] * 3]]


def test_refusals() -> None:
    with pytest.raises(ShapeError, match=r"attention_mask is \(2, 3\), expected .* = \(2, 4\)"):
        at.mask_bias(np.zeros((2, 3, 1)), np.ones((2, 3)), 1, causal=True)
    with pytest.raises(ShapeError, match=r"labels are \(2, 4\), expected one for each row of the logits: \(2, 6\)"):
        loss.cross_entropy(np.zeros((2, 6, 5)), LABELS)  # a prompt in front, and labels without it
    with pytest.raises(ShapeError, match=r"labels are \(2,\), expected the logits' shape \(2, 3\)"):
        loss.mean_squared_error(np.zeros((2, 3)), np.zeros(2))
    with pytest.raises(ConfigError, match="activation 'mish' is not known"):
        fn.activation("mish")
    with pytest.raises(ConfigError, match="rope_type='yarn'"):
        Rope.from_config({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}})
    with pytest.raises(ConfigError, match="lack factor"):
        Rope.from_config({"rope_scaling": {"type": "linear"}})


def test_rope_reads_the_old_spelling_as_the_new_one() -> None:
    old = Rope.from_config({"rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert old == Rope.from_config(
        {"rope_parameters": {"rope_theta": 50.0, "rope_type": "linear", "factor": 2.0}, "max_position_embeddings": 2048}
    )
    assert old.frequencies(4) == pytest.approx((0.5, 0.5 / math.sqrt(50.0)))
