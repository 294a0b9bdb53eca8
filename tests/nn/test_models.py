"""What holds for every model, without another implementation: the cache, the gradients, additivity, and one answer on every backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from peft_ref.backend import Backend
from peft_ref.errors import ConfigError, KeyMismatchError
from peft_ref.nn import Gradients, Inputs, KeyValue, Net, OutputGradient
from tests.nn.tiny import LLAMA, MODELS, arrays, mapped, random_net, with_every_method

RNG = np.random.default_rng(4)
IDS = RNG.integers(0, 11, (2, 5))
MASK = np.asarray([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
LABELS = np.where(MASK == 0, -100, RNG.integers(0, 11, (2, 5)))


def adapted_weights(net: Net) -> set[str]:
    """They cannot be trained beside their adapters."""
    return {net.ties.get(f"{name}.weight", f"{name}.weight") for name in net.adapters}


def prefix(length: int = 2) -> tuple[KeyValue, ...]:
    return tuple(KeyValue(*RNG.normal(size=(2, 2, 2, length, 2))) for _ in range(2))


@pytest.mark.parametrize("name", MODELS)
def test_in_pieces_with_a_cache_as_in_one_pass(name: str) -> None:
    model = MODELS[name]
    net = with_every_method(random_net(model))
    whole = model.forward(net, Inputs(input_ids=IDS, attention_mask=MASK))
    cache, pieces = None, []
    for begin, end in ((0, 2), (2, 3), (3, 5)):
        step = model.forward(net, Inputs(input_ids=IDS[:, begin:end], attention_mask=MASK[:, :end], past=cache))
        cache, pieces = step.cache, [*pieces, step.logits]
    seen = MASK[:, :, None] == 1  # the query of a padding token averages over what is there, later tokens too
    np.testing.assert_allclose(np.where(seen, np.concat(pieces, axis=1), 0), np.where(seen, whole.logits, 0), rtol=0, atol=1e-13)
    assert cache is not None
    assert whole.cache is not None
    np.testing.assert_allclose(cache[1].v[:, :, 1:], whole.cache[1].v[:, :, 1:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", MODELS)
def test_left_padding_changes_nothing_but_the_positions(name: str) -> None:
    model = MODELS[name]
    net = random_net(model)
    alone = model.forward(net, Inputs(input_ids=IDS[:1, 1:]))
    padded = model.forward(net, Inputs(input_ids=IDS[:1], attention_mask=MASK[:1], position_ids=np.asarray([[0, 0, 1, 2, 3]])))
    np.testing.assert_allclose(padded.logits[:, 1:], alone.logits, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_is_the_derivative_of_the_loss(name: str) -> None:
    """Along one direction through every array that has a gradient, DoRA's detached norm left out."""
    model = MODELS[name]
    net = with_every_method(random_net(model))
    held = {n: a for n, a in net.adapters.items() if type(a[0].method).__name__ != "DoRA"}
    net = replace(net, adapters=held)
    free = frozenset(net.weights) - adapted_weights(net)
    net = replace(net, trainable=free)
    inputs = Inputs(inputs_embeds=RNG.normal(size=(2, 5, 8)), labels=LABELS, attention_mask=np.ones((2, 7)), past=prefix())
    got = model.vjp(net, inputs, OutputGradient(loss=1.0))
    rng = np.random.default_rng(9)
    moves: dict[int, Any] = {}

    def direction(a: Any) -> Any:
        return moves.setdefault(id(a), rng.normal(size=a.shape))

    def loss(h: float) -> float:
        there = mapped(net, lambda a: a)
        weights = {n: w + h * direction(w) if n in free else w for n, w in net.weights.items()}
        adapters = {
            n: tuple(s._replace(params=type(s.params)(*(None if p is None else p + h * direction(p) for p in s.params))) for s in stack)
            for n, stack in net.adapters.items()
        }
        past = tuple(KeyValue(*(a + h * direction(a) for a in kv)) for kv in inputs.past or ())
        embeds = inputs.inputs_embeds + h * direction(inputs.inputs_embeds)
        moved = replace(there, weights=weights, adapters=adapters)
        return float(model.forward(moved, replace(inputs, inputs_embeds=embeds, past=past)).loss)

    h = 2e-4
    expected = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    pairs = [(got.inputs_embeds, inputs.inputs_embeds)]
    pairs += [(g, a) for kv, of in zip(got.past or (), inputs.past or (), strict=True) for g, a in zip(kv, of, strict=True)]
    pairs += [(g, net.weights[n]) for n, g in got.net.weights.items()]
    for n, stack in got.net.adapters.items():
        pairs += [(g, a) for gs, s in zip(stack, net.adapters[n], strict=True) for g, a in zip(gs, s.params, strict=True) if a is not None]
    assert got.net.adapters.keys() == held.keys() - {"model.embed_tokens"}
    assert sum(float(np.sum(g * moves[id(a)])) for g, a in pairs) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_a_zero_gradient_gives_zeros_and_an_argument_is_never_written_into(name: str) -> None:
    def locked(a: Any) -> Any:
        a = np.array(a)
        a.setflags(write=False)
        return a

    model = MODELS[name]
    net = mapped(with_every_method(random_net(model)), locked)
    got = model.vjp(net, Inputs(input_ids=locked(IDS), attention_mask=locked(MASK)), OutputGradient())
    for what, value in arrays(got).items():
        if what != "logits" and not what.startswith("cache") and value is not None:
            assert not np.any(value), what


@pytest.mark.parametrize("name", MODELS)
def test_a_backend_agrees_with_numpy(backend: Backend, name: str) -> None:
    model = MODELS[name]
    net = with_every_method(random_net(model))
    net = replace(net, trainable=frozenset(net.weights) - adapted_weights(net))
    given = {"input_ids": IDS, "attention_mask": np.concat([np.ones((2, 2), dtype=int), MASK], axis=1), "labels": LABELS}
    front = prefix()
    for dtype in backend.held[:1] if backend.name == "jax" else backend.held:  # JAX compiles every operation for every shape and dtype
        unit = np.finfo("float32" if backend.name == "mlx" else dtype).eps  # MLX's exp, sin and cos are right to float32 only

        def send(a: Any, dtype: str = dtype) -> Any:
            return backend.from_numpy(np.asarray(a), dtype)

        def run(put: Any) -> dict[str, Any]:
            inputs = Inputs(**{k: put(v) for k, v in given.items()}, past=tuple(KeyValue(*map(put, kv)) for kv in front))
            return arrays(model.vjp(mapped(net, put), inputs, OutputGradient(loss=1.0)))

        with backend.scope():
            got = run(send)
            got = dict(zip(got, backend.settle(list(got.values())), strict=True))
            assert {what: backend.dtype_of(a) for what, a in got.items()} == dict.fromkeys(got, dtype)
            back = {what: backend.to_numpy(a, dtype) for what, a in got.items()}
            expected = run(lambda a, send=send, dtype=dtype: backend.to_numpy(send(a), dtype))  # the same rounded numbers, in float64
        assert back.keys() == expected.keys()
        for what, value in expected.items():
            size = max(1.0, float(np.max(np.abs(value))))
            assert np.max(np.abs(back[what] - value)) <= 1000 * unit * size, f"{what} in {dtype}"


def test_gradients_add_and_nothing_is_zero() -> None:
    model = LLAMA
    net = replace(with_every_method(random_net(model)), trainable=frozenset({"model.norm.weight"}))
    one, two = (model.vjp(net, Inputs(input_ids=IDS, labels=LABELS), OutputGradient(loss=d)).net for d in (1.0, 2.5))
    total = one + Gradients() + two
    assert total.weights["model.norm.weight"] == pytest.approx(3.5 * one.weights["model.norm.weight"], rel=1e-12)
    for name, (params,) in total.adapters.items():
        for got, single in zip(params, one.adapters[name][0], strict=True):
            assert (got is None) == (single is None)
            if got is not None:
                np.testing.assert_allclose(got, 3.5 * single, rtol=1e-9, atol=1e-12)


def test_a_copy_under_a_tied_name_hides_the_tie() -> None:
    """What PEFT does with modules_to_save: the head trained apart from the embedding it is tied to."""
    net = random_net(LLAMA)
    copy = 2 * net.weights["model.embed_tokens.weight"]
    apart = replace(net, weights={**net.weights, "lm_head.weight": copy}, trainable=frozenset({"lm_head.weight"}))
    inputs = Inputs(input_ids=IDS, labels=LABELS)
    np.testing.assert_allclose(LLAMA.forward(apart, inputs).logits, 2 * LLAMA.forward(net, inputs).logits, rtol=1e-12)
    assert LLAMA.vjp(apart, inputs, OutputGradient(loss=1.0)).net.weights.keys() == {"lm_head.weight"}


def test_refusals() -> None:
    net = random_net(LLAMA)
    with pytest.raises(KeyMismatchError, match="adapters at 'nowhere'"):
        replace(net, adapters={"nowhere": ()})
    with pytest.raises(KeyMismatchError, match=r"It is tied: ask for 'model\.embed_tokens\.weight'"):
        replace(net, trainable=frozenset({"lm_head.weight"}))
    with pytest.raises(ConfigError, match="to be trained and has adapters"):
        replace(with_every_method(net), trainable=frozenset({"model.layers.0.mlp.up_proj.weight"}))
    with pytest.raises(ConfigError, match="and not both"):
        LLAMA.forward(net, Inputs())
    with pytest.raises(ConfigError, match="values for 1 layers, the model has 2"):
        LLAMA.forward(net, Inputs(input_ids=IDS, past=prefix()[:1]))
    with pytest.raises(ConfigError, match="no labels"):
        LLAMA.vjp(net, Inputs(input_ids=IDS), OutputGradient(loss=1.0))
    with pytest.raises(KeyMismatchError, match="no layer 'lm_tail'"):
        net.apply("lm_tail", IDS)
