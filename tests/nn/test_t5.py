"""What holds for T5 without another implementation: the cache, padding, the gradients, and one answer on every backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from peft_ref.backend import Backend
from peft_ref.errors import ConfigError, ShapeError
from peft_ref.nn import T5, Inputs, KeyValue, ModelGradients, Net, OutputGradient, as_cache, as_cache_vjp, model_of
from peft_ref.nn.relative import buckets, edges
from tests.nn.tiny import T5_MODEL, arrays, mapped, random_net, with_every_method

RNG = np.random.default_rng(4)
IDS, DECODER_IDS = RNG.integers(0, 11, (2, 5)), RNG.integers(0, 11, (2, 4))
MASK = np.asarray([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
DECODER_MASK = np.asarray([[0, 1, 1, 1], [1, 1, 1, 1]])
LABELS = np.where(DECODER_MASK == 0, -100, RNG.integers(0, 11, (2, 4)))
HALF = T5_MODEL.num_heads, T5_MODEL.d_kv


def adapted_net() -> Net:
    """T5 does not scale its scores, and these adapters are large: small norms keep the softmax away from 0 and 1."""
    net = with_every_method(random_net(T5_MODEL))
    return replace(net, weights={n: 0.03 * w if n.endswith(".layer_norm.weight") else w for n, w in net.weights.items()})


def prefix(length: int = 2) -> tuple[KeyValue, ...]:
    return as_cache(np.random.default_rng(5).normal(size=(2, 2, 2, HALF[0], length, HALF[1])), 2)


def every(d: ModelGradients) -> dict[str, Any]:
    found = arrays(d) | {"decoder_inputs_embeds": d.decoder_inputs_embeds}
    return found | {f"cross {n}.{kv}": a for n, both in enumerate(d.output.cross or ()) for kv, a in zip("kv", both, strict=True)}


def test_in_pieces_with_a_cache_as_in_one_pass() -> None:
    net = adapted_net()
    front = {"input_ids": IDS, "attention_mask": MASK}
    whole = T5_MODEL.forward(net, Inputs(decoder_input_ids=DECODER_IDS, decoder_attention_mask=DECODER_MASK, **front))
    past, cross, pieces = None, None, []
    for begin, end in ((0, 2), (2, 3), (3, 4)):
        ids, mask = DECODER_IDS[:, begin:end], DECODER_MASK[:, :end]
        given = front if cross is None else {"cross": cross, "attention_mask": MASK}
        step = T5_MODEL.forward(net, Inputs(decoder_input_ids=ids, decoder_attention_mask=mask, past=past, **given))
        past, cross, pieces = step.cache, step.cross, [*pieces, step.logits]
    seen = DECODER_MASK[:, :, None] == 1  # the query of a padding token averages over what is there, later tokens too
    np.testing.assert_allclose(np.where(seen, np.concat(pieces, axis=1), 0), np.where(seen, whole.logits, 0), rtol=0, atol=1e-13)
    assert past is not None
    assert whole.cache is not None
    np.testing.assert_allclose(past[1].v[:, :, 1:], whole.cache[1].v[:, :, 1:], rtol=0, atol=1e-13)


def test_padding_on_the_left_changes_nothing() -> None:
    """Positions are relative, so nothing has to be told about them."""
    net = random_net(T5_MODEL)
    alone = T5_MODEL.forward(net, Inputs(input_ids=IDS[:1, 1:], decoder_input_ids=DECODER_IDS[:1, 1:]))
    masks = {"attention_mask": MASK[:1], "decoder_attention_mask": DECODER_MASK[:1]}
    padded = T5_MODEL.forward(net, Inputs(input_ids=IDS[:1], decoder_input_ids=DECODER_IDS[:1], **masks))
    np.testing.assert_allclose(padded.logits[:, 1:], alone.logits, rtol=0, atol=1e-13)


@pytest.mark.parametrize("from_cross", [False, True])
def test_every_gradient_is_the_derivative_of_the_loss(from_cross: bool) -> None:
    """Along one direction through every array that has a gradient, DoRA's detached norm left out."""
    net = adapted_net()
    held = {n: a for n, a in net.adapters.items() if type(a[0].method).__name__ != "DoRA" and n != "shared"}
    free = frozenset(net.weights) - {net.ties.get(f"{n}.weight", f"{n}.weight") for n in held}
    net = replace(net, adapters=held, trainable=free)
    rng = np.random.default_rng(9)  # of this test alone: what another test drew before must not matter
    cross = as_cache(rng.normal(size=(2, 2, 2, HALF[0], 5, HALF[1])), 2) if from_cross else None
    embeds = None if from_cross else rng.normal(size=(2, 5, 8))
    inputs = Inputs(
        inputs_embeds=embeds,
        decoder_inputs_embeds=rng.normal(size=(2, 4, 8)),
        attention_mask=MASK,
        decoder_attention_mask=np.concat([np.ones((2, 2)), DECODER_MASK], axis=1),
        labels=LABELS,
        past=prefix(),
        cross=cross,
    )
    got = T5_MODEL.vjp(net, inputs, OutputGradient(loss=1.0))
    moves: dict[int, Any] = {}

    def moved(a: Any, h: float) -> Any:
        return None if a is None else a + h * moves.setdefault(id(a), rng.normal(size=a.shape))

    def loss(h: float) -> float:
        weights = {n: moved(w, h) if n in free else w for n, w in net.weights.items()}
        adapters = {
            n: tuple(s._replace(params=type(s.params)(*(moved(p, h) for p in s.params))) for s in stack) for n, stack in held.items()
        }
        there = {
            name: None if caches is None else tuple(KeyValue(*(moved(a, h) for a in kv)) for kv in caches)
            for name, caches in (("past", inputs.past), ("cross", inputs.cross))
        }
        there |= {name: moved(getattr(inputs, name), h) for name in ("inputs_embeds", "decoder_inputs_embeds")}
        return float(T5_MODEL.forward(replace(net, weights=weights, adapters=adapters), replace(inputs, **there)).loss)

    h = 1e-6  # the softmax bends sharply here: at 1e-5 the difference itself is off
    expected = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    pairs = [(got.inputs_embeds, inputs.inputs_embeds), (got.decoder_inputs_embeds, inputs.decoder_inputs_embeds)]
    for of_cache, cache in ((got.past, inputs.past), (got.cross, inputs.cross)):
        pairs += [(g, a) for kv, of in zip(of_cache or (), cache or (), strict=True) for g, a in zip(kv, of, strict=True)]
    pairs += [(g, net.weights[n]) for n, g in got.net.weights.items()]
    for n, stack in got.net.adapters.items():
        pairs += [(g, a) for gs, s in zip(stack, held[n], strict=True) for g, a in zip(gs, s.params, strict=True)]
    assert (got.inputs_embeds is None, got.cross is None) == (from_cross, not from_cross)
    if not from_cross:
        assert got.net.adapters.keys() == held.keys() - {"encoder.embed_tokens", "decoder.embed_tokens"}
    assert sum(float(np.sum(g * moves[id(a)])) for g, a in pairs if g is not None) == pytest.approx(expected, rel=1e-7)


def test_a_zero_gradient_gives_zeros_and_an_argument_is_never_written_into() -> None:
    def locked(a: Any) -> Any:
        a = np.array(a)
        a.setflags(write=False)
        return a

    net = mapped(adapted_net(), locked)
    inputs = Inputs(input_ids=locked(IDS), attention_mask=locked(MASK), labels=locked(LABELS))
    for what, value in every(T5_MODEL.vjp(net, inputs, OutputGradient())).items():
        if what not in ("logits", "loss") and not what.startswith(("cache", "cross")) and value is not None:
            assert not np.any(value), what


def test_a_backend_agrees_with_numpy(backend: Backend) -> None:
    model, net = T5_MODEL, adapted_net()
    if backend.name == "jax":  # It compiles every operation for every shape: few shapes, and its adapters are tested on layers.
        model = replace(T5_MODEL, d_model=6, num_decoder_layers=1)
        net = random_net(model)
    free = frozenset(net.weights) - {net.ties.get(f"{n}.weight", f"{n}.weight") for n in net.adapters}
    net = replace(net, trainable=free)
    behind = np.concat([np.ones((2, 2), dtype=int), DECODER_MASK], axis=1)
    given = {"input_ids": IDS[:, 1:], "attention_mask": DECODER_MASK, "labels": LABELS, "decoder_attention_mask": behind}
    front = prefix()[: model.num_decoder_layers]
    for dtype in backend.held[:1]:
        unit = np.finfo("float32" if backend.name == "mlx" else dtype).eps  # MLX's exp, sin and cos are right to float32 only

        def send(a: Any, dtype: str = dtype) -> Any:
            return backend.from_numpy(np.asarray(a), dtype)

        def run(put: Any) -> dict[str, Any]:
            inputs = Inputs(**{k: put(v) for k, v in given.items()}, past=tuple(KeyValue(*map(put, kv)) for kv in front))
            return every(model.vjp(mapped(net, put), inputs, OutputGradient(loss=1.0)))

        with backend.scope():
            got = run(send)
            got = dict(zip(got, backend.settle(list(got.values())), strict=True))
            assert {what: backend.dtype_of(a) for what, a in got.items()} == dict.fromkeys(got, dtype)
            back = {what: backend.to_numpy(a, dtype) for what, a in got.items()}
            expected = run(lambda a, send=send, dtype=dtype: backend.to_numpy(send(a), dtype))  # the same rounded numbers, in float64
        assert back.keys() == expected.keys()
        for what, value in expected.items():
            size = max(1.0, float(np.max(np.abs(value), initial=0.0)))
            assert np.max(np.abs(back[what] - value), initial=0.0) <= 1000 * unit * size, f"{what} in {dtype}"


def test_buckets_by_hand() -> None:
    """Eight for one direction, up to 16: 4 * 4^(i/4) is 4, 5.7, 8, 11.3. Both ways four each, up to 16: 2 * 8^(i/2) is 2, 5.7."""
    assert edges(8, 16) == (1, 2, 3, 4, 6, 8, 12)
    back = buckets(np.asarray([[-20, -12, -11, -8, -7, -6, -5, -3, 0, 2]]), 8, 16, both_ways=False)
    np.testing.assert_array_equal(back, [[7, 7, 6, 6, 5, 5, 4, 3, 0, 0]])
    around = buckets(np.asarray([-9, -6, -5, -2, -1, 0, 1, 2, 5, 6, 9]), 8, 16, both_ways=True)
    np.testing.assert_array_equal(around, [3, 3, 2, 2, 1, 0, 5, 6, 6, 7, 7])


def test_a_prefix_for_more_layers_than_there_are_gets_zeros_for_the_others() -> None:
    given = np.random.default_rng(6).normal(size=(3, 2, 2, 2, 1, 3))
    d = as_cache_vjp(given, 2, as_cache(given, 2))
    np.testing.assert_array_equal(d, np.concat([given[:2], 0 * given[2:]]))


def test_refusals() -> None:
    net, front = random_net(T5_MODEL), {"input_ids": IDS}
    cross = T5_MODEL.forward(net, Inputs(labels=LABELS, **front)).cross
    assert cross is not None
    with pytest.raises(ConfigError, match="input_ids or inputs_embeds, and not both"):
        T5_MODEL.forward(net, Inputs(labels=LABELS))
    with pytest.raises(ConfigError, match="or labels to shift"):
        T5_MODEL.forward(net, Inputs(**front))
    with pytest.raises(ConfigError, match="both given"):
        T5_MODEL.forward(net, Inputs(decoder_input_ids=IDS, decoder_inputs_embeds=IDS, **front))
    with pytest.raises(ConfigError, match="inputs of the encoder too"):
        T5_MODEL.forward(net, Inputs(cross=cross, labels=LABELS, **front))
    with pytest.raises(ConfigError, match="cross has keys and values for 1 layers, the decoder has 2"):
        T5_MODEL.forward(net, Inputs(cross=cross[:1], labels=LABELS))
    with pytest.raises(ConfigError, match="past has keys and values for 1 layers, the decoder has 2"):
        T5_MODEL.forward(net, Inputs(past=prefix()[:1], labels=LABELS, **front))
    with pytest.raises(ConfigError, match="no labels"):
        T5_MODEL.vjp(net, Inputs(decoder_input_ids=DECODER_IDS, **front), OutputGradient(loss=1.0))
    with pytest.raises(ShapeError, match=r"decoder_attention_mask is \(2, 4\), expected .* \(2, 6\)"):
        T5_MODEL.forward(net, Inputs(past=prefix(), decoder_attention_mask=DECODER_MASK, labels=LABELS, **front))
    with pytest.raises(ShapeError, match="are for 2 layers, the model has 3"):
        as_cache(np.zeros((2, 2, 1, 1, 1, 1)), 3)
    with pytest.raises(ConfigError, match="decoder_start_token_id=None"):
        replace(T5_MODEL, decoder_start_token_id=None).shift_right(LABELS)
    with pytest.raises(ConfigError, match="1 buckets for one direction"):
        T5(relative_attention_num_buckets=3)
    with pytest.raises(ConfigError, match="'twice-gelu'"):
        model_of({"architectures": ["T5ForConditionalGeneration"], "feed_forward_proj": "twice-gelu"})
