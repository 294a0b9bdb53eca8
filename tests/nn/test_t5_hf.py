"""T5 computes what transformers' does, and its gradients are PEFT's, in float64 to nine digits and more. Prompts: test_t5_prompts_hf.py."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.hf

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.cache_utils import DynamicCache, EncoderDecoderCache  # noqa: E402
from transformers.modeling_outputs import BaseModelOutput  # noqa: E402
from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402

from peft_ref.nn import Inputs, KeyValue, OutputGradient  # noqa: E402
from peft_ref.nn.relative import buckets  # noqa: E402
from tests.nn.beside_hf import Pair, adapted, all_close, check_outputs, close, float64, live_gradients, our_gradients, pair, to_torch  # noqa: E402

S, T, VOCABULARY, WIDTH, HEADS, HEAD = 7, 5, 17, 12, 2, 5
SIZES = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": HEAD, "d_ff": 10, "num_heads": HEADS, "decoder_start_token_id": 2}
FEW = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 6}  # so that 7 tokens see every bucket
CONFIGS: dict[str, dict[str, Any]] = {
    "relu": {"num_layers": 2, "num_decoder_layers": 3, **FEW},
    "gated gelu, unscaled": {"num_layers": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, **FEW},
    "gelu, every default": {"num_layers": 1, "feed_forward_proj": "gelu", "pad_token_id": 3},
    "gated silu": {"num_layers": 3, "num_decoder_layers": 1, "feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-2, **FEW},
}
PADDING: dict[str, Any] = {
    "none": (None, None),
    "left": ([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]], [[0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1]]),
    "right, the encoder's alone": ([[1, 1, 1, 0, 0, 0, 0], [1] * 7, [1, 1, 1, 1, 1, 1, 0]], None),
    "holes": ([[1, 0, 1, 1, 0, 1, 0], [0] * 7, [1, 1, 1, 0, 1, 1, 1]], [[1, 0, 1, 1, 0], [0, 1, 0, 1, 1], [1, 1, 1, 0, 1]]),
}


@cache
def plain(name: str) -> Pair:
    """Shared: do not change it."""
    return fresh(name)


def fresh(name: str) -> Pair:
    return pair(transformers.T5ForConditionalGeneration, **SIZES, **CONFIGS[name])


def tokens(padding: str = "none", seed: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    ids, labels = rng.integers(0, VOCABULARY, (3, S)), rng.integers(0, VOCABULARY, (3, T))
    labels[0, :3] = labels[2, 4] = -100
    masks = zip(("attention_mask", "decoder_attention_mask"), PADDING[padding], strict=True)
    return {"input_ids": ids, "labels": labels} | {name: np.asarray(m) for name, m in masks if m is not None}


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_loss(name: str, padding: str) -> None:
    """The decoder gets the labels shifted, in which -100 has become the padding token."""
    check_outputs(plain(name), tokens(padding))


@pytest.mark.parametrize("name", ["relu", "gated gelu, unscaled"])
def test_decoder_ids_beside_labels_are_not_shifted(name: str) -> None:
    both, given = plain(name), tokens("left")
    given["decoder_input_ids"] = np.random.default_rng(5).integers(0, VOCABULARY, (3, T))
    with float64(), torch.no_grad():
        expected = both.live(**to_torch(given))
    got = both.model.forward(both.net, Inputs(**given))
    close(got.logits, expected.logits, "logits", 1e-12)
    close(got.loss, expected.loss, "loss", 1e-12)


def test_float32_is_near_what_transformers_computes_when_nothing_is_changed() -> None:
    both, given = fresh("gated gelu, unscaled"), tokens("left")
    live = both.live.to(torch.float32)
    with torch.no_grad():
        expected = live(**to_torch(given))
    got = both.model.forward(both.model.net({name: w.astype(np.float32) for name, w in both.net.weights.items()}), Inputs(**given))
    assert got.logits.dtype == np.float32
    close(got.logits, expected.logits, "logits", 1e-5)
    close(got.loss, expected.loss, "loss", 1e-5)


@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_are_transformers_float32_ones_at_every_distance(both_ways: bool) -> None:
    ahead = np.arange(-1100, 1101)
    for n in (4, 5, 6, 7, 8, 12, 16, 32, 64, 128):
        for most in (33, 64, 100, 128, 256, 500, 1000):
            if most > n // 2:
                live = T5Attention._relative_position_bucket(torch.tensor(ahead), both_ways, n, most)
                np.testing.assert_array_equal(buckets(ahead, n, most, both_ways=both_ways), live.numpy(), f"{n} buckets up to {most}")


EVERY = ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"]
TABLES = ["embed_tokens", "relative_attention_bias", "lm_head"]
ADAPTERS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=EVERY, task_type="SEQ_2_SEQ_LM"),
    "lora on the tables": lambda: peft.LoraConfig(r=2, target_modules=["shared", *TABLES, "q"]),
    "lora, all linear": lambda: peft.LoraConfig(r=2, target_modules="all-linear", rank_pattern={"decoder.*wo": 4}, use_rslora=True),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=[*TABLES, *EVERY]),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=[*EVERY, "lm_head"]),
    "ia3": lambda: peft.IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"], task_type="SEQ_2_SEQ_LM"),
    "ia3, PEFT's own targets": lambda: peft.IA3Config(),
    "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=[*EVERY, "lm_head"]),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", ["relu", "gated gelu, unscaled"])
def test_every_adapter_gradient(name: str, adapter: str, tmp_path: Path) -> None:
    both = adapted(fresh(name), ADAPTERS[adapter](), tmp_path)
    given = tokens("left")
    with float64():
        expected = both.inner(**to_torch(given))
        expected.loss.backward()
    got = both.model.vjp(both.net, Inputs(**given), OutputGradient(loss=1.0))
    close(got.output.logits, expected.logits.detach(), "logits", 1e-12)
    # An adapter on "shared" stands beside the table, not in it: the stacks look tokens up in modules of their own, and it does nothing.
    all_close(our_gradients(both, got.net), live_gradients(both))
    assert got.net.adapters.keys() == both.net.adapters.keys() - {"shared"}
    without = both.model.forward(replace(both.net, adapters={}), Inputs(**given))
    assert np.max(np.abs(without.logits - got.output.logits)) > 1e-3, "the adapter does nothing: the test sees nothing"


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_for_every_base_parameter_both_embeddings_and_a_prefix(name: str, padding: str) -> None:
    """The output's gradient is given for the logits and for the loss at once."""
    both, given = plain(name), tokens(padding)
    rng = np.random.default_rng(7)
    layers = both.live.config.num_decoder_layers
    prefix = [rng.normal(size=(3, HEADS, 2, HEAD)) for _ in range(2 * layers)]
    dlogits, embeds, decoder_embeds = (rng.normal(size=shape) for shape in ((3, T, VOCABULARY), (3, S, WIDTH), (3, T, WIDTH)))
    del given["input_ids"]
    if "decoder_attention_mask" in given:
        given["decoder_attention_mask"] = np.concat([np.ones((3, 2), dtype=int), given["decoder_attention_mask"]], axis=1)

    with float64():
        leaves = [torch.tensor(a, requires_grad=True) for a in (embeds, decoder_embeds, *prefix)]
        front = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for layer in range(layers):
            front.self_attention_cache.update(*leaves[2 + 2 * layer : 4 + 2 * layer], layer)
        both.live.zero_grad()
        expected = both.live(inputs_embeds=leaves[0], decoder_inputs_embeds=leaves[1], cache=front, **to_torch(given))
        (1.5 * expected.loss + torch.sum(torch.tensor(dlogits) * expected.logits)).backward()
    past = tuple(KeyValue(*prefix[2 * layer : 2 * layer + 2]) for layer in range(layers))
    net = replace(both.net, trainable=frozenset(both.net.weights))
    inputs = Inputs(inputs_embeds=embeds, decoder_inputs_embeds=decoder_embeds, past=past, **given)
    got = both.model.vjp(net, inputs, OutputGradient(logits=dlogits, loss=1.5))

    close(got.output.logits, expected.logits.detach(), "logits", 1e-12)
    close(got.output.loss, expected.loss.detach(), "loss", 1e-12)
    close(got.inputs_embeds, leaves[0].grad, "inputs_embeds")
    close(got.decoder_inputs_embeds, leaves[1].grad, "decoder_inputs_embeds")
    assert got.past is not None
    assert got.cross is None
    for mine, leaf in zip([a for kv in got.past for a in kv], leaves[2:], strict=True):
        close(mine, leaf.grad, "prefix")
    all_close(dict(got.net.weights), {n: p.grad.numpy() for n, p in both.live.named_parameters() if p.grad is not None})
    assert got.net.weights.keys() == net.weights.keys()  # the head asks something of the table
    biases = [n for n in got.net.weights if "relative" in n]
    assert len(biases) == 2
    assert all(np.any(got.net.weights[n] != 0) for n in biases)


def test_the_gradient_of_the_shared_table_from_both_sides_and_the_head() -> None:
    both, given = plain("relu"), tokens("left")
    net = replace(both.net, trainable=frozenset({"shared.weight"}))
    with float64():
        both.live.zero_grad()
        both.live(**to_torch(given)).loss.backward()
    got = both.model.vjp(net, Inputs(**given), OutputGradient(loss=1.0))
    all_close(dict(got.net.weights), {"shared.weight": both.live.shared.weight.grad})


def test_the_gradient_of_keys_and_values_that_stand_for_the_encoder() -> None:
    both, given = plain("relu"), tokens("left")
    whole = both.model.forward(both.net, Inputs(**given))
    assert whole.cross is not None
    del given["input_ids"]
    with float64():
        leaves = [torch.tensor(a, requires_grad=True) for kv in whole.cross for a in kv]
        held = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for layer in range(3):
            held.cross_attention_cache.update(*leaves[2 * layer : 2 * layer + 2], layer)
            held.is_updated[layer] = True
        unread = BaseModelOutput(last_hidden_state=torch.zeros(3, S, WIDTH))
        expected = both.live(encoder_outputs=unread, cache=held, **to_torch(given))
        expected.loss.backward()
    got = both.model.vjp(both.net, Inputs(cross=whole.cross, **given), OutputGradient(loss=1.0))
    close(got.output.logits, expected.logits.detach(), "logits", 1e-12)
    assert got.inputs_embeds is None
    assert got.cross is not None
    for mine, leaf in zip([a for kv in got.cross for a in kv], leaves, strict=True):
        close(mine, leaf.grad, "cross")


@pytest.mark.parametrize("name", ["relu", "gated silu"])
def test_one_token_after_another_with_a_cache_as_transformers_does(name: str) -> None:
    both, given = plain(name), tokens("left")
    ids, mask = np.random.default_rng(5).integers(0, VOCABULARY, (3, T)), given["decoder_attention_mask"]
    theirs: Any = None
    ours: Any = None
    cross: Any = None
    front = {"input_ids": given["input_ids"]}
    for t in range(T):
        step = {
            "decoder_input_ids": ids[:, t : t + 1],
            "decoder_attention_mask": mask[:, : t + 1],
            "attention_mask": given["attention_mask"],
        }
        with float64(), torch.no_grad():
            expected = both.live(cache=theirs, use_cache=True, input_ids=torch.tensor(given["input_ids"]), **to_torch(step))
            theirs = expected.cache
        got = both.model.forward(both.net, Inputs(past=ours, cross=cross, **front, **step))
        ours, cross, front = got.cache, got.cross, {}
        close(got.logits, expected.logits, f"step {t}", 1e-12)
        assert got.cache is not None
        close(got.cache[-1].k, theirs.self_attention_cache.layers[-1].keys, f"keys of step {t}", 1e-12)


def greedy(both: Pair, given: dict[str, Any], length: int, past: Any = None) -> Any:
    """The tokens that are likeliest one after another, a prefix's keys and values before them."""
    ids = np.full((len(given["input_ids"]), 1), SIZES["decoder_start_token_id"])
    got = both.model.forward(both.net, Inputs(decoder_input_ids=ids, past=past, **given))
    for _ in range(length - 1):
        ids = np.concat([ids, np.argmax(got.logits[:, -1:], axis=-1)], axis=1)
        again = Inputs(decoder_input_ids=ids[:, -1:], past=got.cache, cross=got.cross, attention_mask=given["attention_mask"])
        got = both.model.forward(both.net, again)
    return np.concat([ids, np.argmax(got.logits[:, -1:], axis=-1)], axis=1)


def generated(live: Any, given: dict[str, Any], length: int) -> Any:
    with float64(), torch.no_grad():
        return live.generate(**to_torch(given), max_new_tokens=length, do_sample=False, eos_token_id=None).numpy()


@pytest.mark.parametrize("name", ["gated silu", "gated gelu, unscaled"])  # transformers cannot generate where the decoder is the deeper one
def test_greedy_decoding(name: str, tmp_path: Path) -> None:
    given = {k: v for k, v in tokens("left").items() if k in ("input_ids", "attention_mask")}
    before = greedy(plain(name), given, 8)
    np.testing.assert_array_equal(before, generated(plain(name).live, given, 8))
    both = adapted(fresh(name), ADAPTERS["lora"](), tmp_path)
    after = greedy(both, given, 8)
    np.testing.assert_array_equal(after, generated(both.live, given, 8))
    assert np.any(before != after)
