"""What holds for every model, without another implementation: the cache, the gradients, additivity, and one answer on every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from peft_ref.backend import Backend
from peft_ref.errors import ConfigError, KeyMismatchError, ShapeError
from peft_ref.nn import Gradients, Inputs, KeyValue, Net, Output, OutputGradient
from tests.nn.tiny import DECODERS, ENCODERS, IDS, LABELS, LLAMA, MASK, MODELS, arrays, mapped, prefix, random_net, with_every_method


def adapted_weights(net: Net) -> set[str]:
    """They cannot be trained beside their adapters."""
    return {net.ties.get(f"{name}.weight", f"{name}.weight") for name in net.adapters}


@pytest.mark.parametrize("name", DECODERS)
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


@pytest.mark.parametrize("name", DECODERS)
def test_left_padding_changes_nothing_but_the_positions(name: str) -> None:
    model = MODELS[name]
    net = random_net(model)
    alone = model.forward(net, Inputs(input_ids=IDS[:1, 1:]))
    padded = model.forward(net, Inputs(input_ids=IDS[:1], attention_mask=MASK[:1], position_ids=np.asarray([[0, 0, 1, 2, 3]])))
    np.testing.assert_allclose(padded.logits[:, 1:], alone.logits, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_behind_changes_nothing(name: str) -> None:
    model = MODELS[name]
    net = with_every_method(random_net(model))
    alone = model.forward(net, Inputs(input_ids=IDS[:1, :3]))
    padded = model.forward(net, Inputs(input_ids=IDS[:1], attention_mask=np.asarray([[1, 1, 1, 0, 0]])))
    assert alone.hidden is not None
    assert padded.hidden is not None
    np.testing.assert_allclose(padded.hidden[:, :3], alone.hidden, rtol=0, atol=1e-13)
    if model.pools:  # type: ignore[attr-defined]
        np.testing.assert_allclose(padded.pooled, alone.pooled, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_token_of_an_encoder_sees_every_other(name: str) -> None:
    model, net = MODELS[name], random_net(MODELS[name])
    other = np.concat([IDS[:, :4], (IDS[:, 4:] + 1) % 11], axis=1)
    here, there = (model.forward(net, Inputs(input_ids=ids)).hidden for ids in (IDS, other))
    assert np.all(np.max(np.abs(here - there), axis=2) > 1e-4)


def gradient_of_everything(output: Output) -> OutputGradient:
    """A random gradient for all that a model returned."""
    rng = np.random.default_rng(8)
    found = {what: getattr(output, what) for what in ("logits", "loss", "hidden", "pooled")}
    return OutputGradient(**{what: None if y is None else rng.normal(size=np.shape(y)) for what, y in found.items()})


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_is_the_derivative(name: str) -> None:
    """Of a number made of all outputs, along one direction through every array that has a gradient, DoRA's detached norm left out."""
    model = MODELS[name]
    net = with_every_method(random_net(model))
    held = {n: a for n, a in net.adapters.items() if type(a[0].method).__name__ != "DoRA"}
    net = replace(net, adapters=held)
    free = frozenset(net.weights) - adapted_weights(net)
    net = replace(net, trainable=free)
    past = prefix(name)
    mask = np.ones((2, 5 if past is None else 7))
    rng = np.random.default_rng(9)
    types = None if name == "llama" else rng.integers(0, 2, (2, 5))
    embeds = rng.normal(size=(2, 5, 8))
    inputs = Inputs(inputs_embeds=embeds, attention_mask=mask, past=past, token_type_ids=types, **LABELS[name])
    d = gradient_of_everything(model.forward(net, inputs))
    got = model.vjp(net, inputs, d)
    moves: dict[int, Any] = {}

    def direction(a: Any) -> Any:
        return moves.setdefault(id(a), rng.normal(size=a.shape))

    def gone_on(layer: Any, s: Any, h: float) -> Any:
        trained = {spec.field for spec in s.method.spec(layer) if spec.trained}
        return s._replace(params=s.params._replace(**{f: getattr(s.params, f) + h * direction(getattr(s.params, f)) for f in trained}))

    def number(h: float) -> float:
        weights = {n: w + h * direction(w) if n in free else w for n, w in net.weights.items()}
        adapters = {n: tuple(gone_on(net.layers[n], s, h) for s in stack) for n, stack in net.adapters.items()}
        past = tuple(KeyValue(*(a + h * direction(a) for a in kv)) for kv in inputs.past or ())
        embeds = inputs.inputs_embeds + h * direction(inputs.inputs_embeds)
        moved = replace(net, weights=weights, adapters=adapters)
        there = model.forward(moved, replace(inputs, inputs_embeds=embeds, past=past or None))
        return sum(float(np.sum(part * getattr(there, what))) for what, part in vars(d).items() if part is not None)

    h = 1e-5
    expected = (8 * (number(h) - number(-h)) - (number(2 * h) - number(-2 * h))) / (12 * h)
    pairs = [(got.inputs_embeds, inputs.inputs_embeds)]
    pairs += [(g, a) for kv, of in zip(got.past or (), inputs.past or (), strict=True) for g, a in zip(kv, of, strict=True)]
    pairs += [(g, net.weights[n]) for n, g in got.net.weights.items()]
    for n, stack in got.net.adapters.items():
        pairs += [(g, a) for gs, s in zip(stack, net.adapters[n], strict=True) for g, a in zip(gs, s.params, strict=True) if g is not None]
    assert held.keys() - got.net.adapters.keys() <= {model.embedding}  # no token was looked up, but GPT-2's types
    tables = {f"{model.embedding}.weight"} - got.net.weights.keys()
    assert got.net.weights.keys() == free - tables
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
        if what not in ("logits", "hidden", "pooled") and not what.startswith("cache") and value is not None:
            assert not np.any(value), what


COMPILED = ("jax", "dask", "mlx")  # several seconds a model: one of every architecture, and one head
ON_ALL = ("llama", "gpt2", "bert classifier")


def called(backend: Backend, run: Callable[[Any], dict[str, Any]], send: Callable[[Any], Any]) -> dict[str, Any]:
    """run(send). JAX compiles it whole, which is several times quicker than operation by operation, and finds who looks at a number."""
    if backend.name != "jax":
        return run(send)
    import jax

    sent: list[Any] = []

    def note(a: Any) -> Any:
        sent.append(send(a))
        return np.asarray(a)

    run(note)  # in the order in which `run` asks

    def traced(arrays: list[Any]) -> dict[str, Any]:
        left = iter(arrays)
        return run(lambda a: next(left))

    found: dict[str, Any] = jax.jit(traced)(sent)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_backend_agrees_with_numpy(backend: Backend, name: str) -> None:
    if backend.name in COMPILED and name not in ON_ALL:
        pytest.skip("numpy, strict and torch try every head")
    model = MODELS[name]
    net = with_every_method(random_net(model))
    net = replace(net, trainable=frozenset(net.weights) - adapted_weights(net))
    front = prefix(name)
    mask = MASK if front is None else np.concat([np.ones((2, 2), dtype=int), MASK], axis=1)
    given = {"input_ids": IDS, "attention_mask": mask, **LABELS[name]}
    d = gradient_of_everything(model.forward(net, Inputs(**given, past=front)))
    for dtype in backend.held[:1] if backend.name == "jax" else backend.held:
        unit = np.finfo("float32" if backend.name == "mlx" else dtype).eps  # MLX's exp, sin and cos are right to float32 only

        def send(a: Any, dtype: str = dtype) -> Any:
            return backend.from_numpy(np.asarray(a), dtype)

        def run(put: Any) -> dict[str, Any]:
            past = None if front is None else tuple(KeyValue(*map(put, kv)) for kv in front)
            inputs = Inputs(**{k: put(v) for k, v in given.items()}, past=past)
            return arrays(
                model.vjp(mapped(net, put), inputs, OutputGradient(**{k: None if a is None else put(a) for k, a in vars(d).items()}))
            )

        with backend.scope():
            got = called(backend, run, send)
            got = dict(zip(got, backend.settle(list(got.values())), strict=True))
            assert {what: backend.dtype_of(a) for what, a in got.items()} == dict.fromkeys(got, dtype)
            back = {what: backend.to_numpy(a, dtype) for what, a in got.items()}
            expected = run(lambda a, send=send, dtype=dtype: backend.to_numpy(send(a), dtype))  # the same rounded numbers, in float64
        assert back.keys() == expected.keys()
        size = max(
            1.0, *(float(np.max(np.abs(value), initial=0.0)) for value in expected.values())
        )  # a small gradient may be a difference of large ones
        for what, value in expected.items():
            assert np.max(np.abs(back[what] - value), initial=0.0) <= 1000 * unit * size, f"{what} in {dtype}"


def test_gradients_add_and_nothing_is_zero() -> None:
    model = LLAMA
    net = replace(with_every_method(random_net(model)), trainable=frozenset({"model.norm.weight"}))
    one, two = (model.vjp(net, Inputs(input_ids=IDS, labels=LABELS["llama"]["labels"]), OutputGradient(loss=d)).net for d in (1.0, 2.5))
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
    inputs = Inputs(input_ids=IDS, labels=LABELS["llama"]["labels"])
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
        LLAMA.forward(net, Inputs(input_ids=IDS, past=(prefix("llama") or ())[:1]))
    with pytest.raises(ConfigError, match="no labels"):
        LLAMA.vjp(net, Inputs(input_ids=IDS), OutputGradient(loss=1.0))
    with pytest.raises(KeyMismatchError, match="no layer 'lm_tail'"):
        net.apply("lm_tail", IDS)
    with pytest.raises(ShapeError, match="GPT2 has 9 positions, and there are 10 tokens, those in front counted in"):
        MODELS["gpt2"].forward(random_net(MODELS["gpt2"]), Inputs(inputs_embeds=np.zeros((2, 8, 8)), past=prefix("gpt2")))
    bert = random_net(MODELS["bert"])
    with pytest.raises(ConfigError, match="BertModel has no loss, and the inputs have labels"):
        MODELS["bert"].forward(bert, Inputs(input_ids=IDS, labels=IDS))
    with pytest.raises(ConfigError, match="a gradient came for the logits, and BertModel returns none"):
        MODELS["bert"].vjp(bert, Inputs(input_ids=IDS), OutputGradient(logits=np.ones((2, 5, 11))))
    tokens = MODELS["bert tokens"]
    with pytest.raises(ConfigError, match="BertForTokenClassification was given past keys and values"):
        tokens.forward(random_net(tokens), Inputs(input_ids=IDS, past=prefix("bert")))
