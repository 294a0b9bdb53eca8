"""What holds for an adaption prompt in a model without another implementation: the gradient, swapping, refusals, every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from peft_ref import stack
from peft_ref.attending import AttentionAdapter, AttentionBlock
from peft_ref.backend import Backend
from peft_ref.errors import ConfigError, KeyMismatchError, NotMergeableError, ShapeError
from peft_ref.methods import AdaptionPrompt
from peft_ref.methods.adaption_prompt import Params
from peft_ref.nn import Inputs, Net, OutputGradient
from tests.nn.test_models import called
from tests.nn.tiny import IDS, LABELS, MASK, MODELS, mapped, random_net, with_every_method

METHOD = AdaptionPrompt(adapter_len=3, adapter_layers=2)
BLOCKS = {
    "llama": ("model.layers.0.self_attn", "model.layers.1.self_attn"),
    "gpt2": ("transformer.h.0.attn", "transformer.h.1.attn"),
}


def attending(net: Net, name: str, seed: int = 5) -> Net:
    rng = np.random.default_rng(seed)
    blocks = {block: AttentionAdapter(METHOD, Params(E=rng.normal(size=(1, 3, 8)), g=rng.normal(size=1))) for block in BLOCKS[name]}
    return replace(net, attention=blocks)


def inputs(name: str, put: Callable[[Any], Any] = np.asarray) -> Inputs:
    return Inputs(input_ids=put(IDS), attention_mask=put(MASK), labels=put(LABELS[name]["labels"]))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_gradient_is_the_difference_quotient_of_the_loss(name: str) -> None:
    """Without a mask: where a whole row is masked, rounding hides the scores from the loss, and not from the gradient, as in HF."""
    model = MODELS[name]
    net, given = attending(random_net(model), name), replace(inputs(name), attention_mask=None)
    got = model.vjp(net, given, OutputGradient(loss=1.0)).net
    rng = np.random.default_rng(1)
    for block, adapter in net.attention.items():
        direction = Params(*(rng.normal(size=p.shape) for p in adapter.params))

        def loss(step: float, block: str = block, adapter: Any = adapter, direction: Params = direction) -> float:
            moved = Params(*(p + step * d for p, d in zip(adapter.params, direction, strict=True)))
            other = replace(net, attention={**net.attention, block: adapter._replace(params=moved)})
            return float(model.forward(other, given).loss)

        want = (loss(1e-5) - loss(-1e-5)) / 2e-5
        found = sum(float(np.sum(g * d)) for g, d in zip(got.adapters[block][0], direction, strict=True))
        assert found == pytest.approx(want, rel=1e-6, abs=1e-9)
        assert abs(want) > 1e-4


@pytest.mark.parametrize("name", BLOCKS)
def test_adapters_of_the_projections_act_on_the_prompt_too(name: str) -> None:
    """So merging them changes nothing."""
    model = MODELS[name]
    net = attending(with_every_method(random_net(model)), name)
    weights = dict(net.weights)
    inside = {layer: adapters for layer, adapters in net.adapters.items() if "attn" in layer}
    for layer, adapters in inside.items():
        at, first = net.layers[layer], f"{layer}.weight"
        W, b = stack.merge(at, at.fold(weights[first]), weights.get(f"{layer}.bias"), adapters)
        weights |= {first: at.unfold(W)} | ({} if b is None else {f"{layer}.bias": b})
    others = {layer: adapters for layer, adapters in net.adapters.items() if layer not in inside}
    got, same = (model.forward(n, inputs(name)).logits for n in (net, replace(net, weights=weights, adapters=others)))
    np.testing.assert_allclose(got, same, rtol=0, atol=1e-9 * np.max(np.abs(got)))
    assert len(inside) > 3


@pytest.mark.parametrize("name", BLOCKS)
def test_a_closed_gate_changes_nothing_and_learns_first(name: str) -> None:
    model, plain = MODELS[name], random_net(MODELS[name])
    plain = replace(plain, weights={k: 0 * w if k.endswith("o_proj.bias") else w for k, w in plain.weights.items()})
    rng = np.random.default_rng(3)
    fresh = {block: AttentionAdapter(METHOD, METHOD.init(8, np.zeros(1), rng)) for block in BLOCKS[name]}
    net = replace(plain, attention=fresh)
    got = model.vjp(net, inputs(name), OutputGradient(loss=1.0))
    np.testing.assert_array_equal(got.output.logits, model.forward(plain, inputs(name)).logits)
    for (params,) in got.net.adapters.values():
        assert not np.any(params.E)
        assert np.all(params.g != 0)


@pytest.mark.parametrize("name", BLOCKS)
def test_in_pieces_with_a_cache_as_in_one_pass(name: str) -> None:
    model = MODELS[name]
    net = attending(random_net(model), name)
    whole = model.forward(net, Inputs(input_ids=IDS)).logits
    cache, pieces = None, []
    for begin, end in ((0, 2), (2, 5)):
        step = model.forward(net, Inputs(input_ids=IDS[:, begin:end], past=cache))
        cache, pieces = step.cache, [*pieces, step.logits]
    np.testing.assert_allclose(np.concat(pieces, axis=1), whole, rtol=0, atol=1e-12)


def test_swapping_is_replacing() -> None:
    """The order in which adapters came, and what was active before, leave no trace."""
    model, plain = MODELS["llama"], random_net(MODELS["llama"])
    one, two = (attending(plain, "llama", seed).attention for seed in (1, 2))
    top = {BLOCKS["llama"][1]: two[BLOCKS["llama"][1]]}
    there_and_back = replace(replace(replace(plain, attention=one), attention=top), attention=one)
    logits = [model.forward(net, Inputs(input_ids=IDS)).logits for net in (replace(plain, attention=one), there_and_back)]
    np.testing.assert_array_equal(*logits)
    other = model.forward(replace(plain, attention=top), Inputs(input_ids=IDS)).logits
    assert np.max(np.abs(other - logits[0])) > 1e-3


@pytest.mark.parametrize("name", BLOCKS)
def test_a_backend_agrees_with_numpy(backend: Backend, name: str) -> None:
    model = MODELS[name]
    net = attending(random_net(model), name)
    for dtype in backend.held[:1] if backend.name == "jax" else backend.held:
        unit = np.finfo("float32" if backend.name == "mlx" else dtype).eps  # MLX's sin and cos are right to float32 only

        def send(a: Any, dtype: str = dtype) -> Any:
            return backend.from_numpy(np.asarray(a), dtype)

        def run(put: Any) -> dict[str, Any]:
            blocks = {block: a._replace(params=Params(*map(put, a.params))) for block, a in net.attention.items()}
            got = model.vjp(replace(mapped(net, put), attention=blocks), inputs(name, put), OutputGradient(loss=1.0))
            found = {f"{block}.{f}": v for block in blocks for f, v in got.net.adapters[block][0]._asdict().items()}
            return {**found, "logits": got.output.logits, "inputs_embeds": got.inputs_embeds}

        with backend.scope():
            got = called(backend, run, send)
            got = dict(zip(got, backend.settle(list(got.values())), strict=True))
            assert {what: backend.dtype_of(a) for what, a in got.items()} == dict.fromkeys(got, dtype)
            back = {what: backend.to_numpy(a, dtype) for what, a in got.items()}
            expected = run(lambda a, send=send, dtype=dtype: backend.to_numpy(send(a), dtype))
        size = max(1.0, *(float(np.max(np.abs(value))) for value in expected.values()))
        for what, value in expected.items():
            assert np.max(np.abs(back[what] - value)) <= 1000 * unit * size, f"{what} in {dtype}"


def test_what_does_not_fit_is_refused() -> None:
    net = random_net(MODELS["llama"])
    right = attending(net, "llama").attention[BLOCKS["llama"][0]]
    with pytest.raises(KeyMismatchError, match=r"at 'model\.layers\.7\.self_attn': no attention block.*\n  There are model\.layers\.0"):
        replace(net, attention={"model.layers.7.self_attn": right})
    with pytest.raises(KeyMismatchError, match="There are none: the architecture has none"):
        replace(random_net(MODELS["bert"]), attention={"bert.encoder": right})
    wide = right._replace(params=Params(E=np.zeros((1, 3, 9)), g=np.zeros(1)))
    with pytest.raises(ShapeError, match=r"adaption_prompt is \(1, 3, 9\), expected \(1, 3, 8\) \(1 n hidden\)"):
        replace(net, attention={BLOCKS["llama"][0]: wide})
    with pytest.raises(ConfigError, match="adapter_len is not given"):
        AdaptionPrompt().spec(8)
    with pytest.raises(ConfigError, match="4 heads do not share 3"):
        AttentionBlock(hidden_size=8, num_attention_heads=4, num_key_value_heads=3, head_dim=2)
    with pytest.raises(NotMergeableError):
        METHOD.merge()
    whole = METHOD.pack(right.params)
    for tensors, says in (({"adaption_gate": np.zeros(1)}, "adaption_prompt missing"), ({"x": 1, **whole}, "unexpected x")):
        with pytest.raises(KeyMismatchError, match=says):
            METHOD.unpack(8, tensors)
