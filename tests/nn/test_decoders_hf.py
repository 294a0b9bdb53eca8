"""Llama and GPT-2 compute what transformers' do, and their gradients are PEFT's, in float64 to nine digits and more."""

from __future__ import annotations

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
from transformers.cache_utils import DynamicCache  # noqa: E402

from peft_ref.nn import Inputs, KeyValue, Net, OutputGradient  # noqa: E402
from tests.nn.beside_hf import Pair, adapted, all_close, check_outputs, close, float64, live_gradients, our_gradients, pair, to_torch  # noqa: E402

SIZES = {"vocab_size": 17, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2, "pad_token_id": None}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}  # heads of 2 numbers: the least that can turn
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,  # so that the six waves fit 6.4 to 0.2 times
}
LLAMAS: dict[str, dict[str, Any]] = {
    "grouped": HEADS,
    "tied": {**HEADS, "tie_word_embeddings": True},
    "biases": {**HEADS, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-2},
    "wide heads, gelu": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6, "hidden_act": "gelu"},
    "linear rope": {"num_attention_heads": 2, "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}},
    "llama3 rope": {"num_attention_heads": 1, "rope_parameters": LLAMA3},
}
GPT2 = {"vocab_size": 17, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 31, "pad_token_id": None}
GPT2S: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2 untied": {"tie_word_embeddings": False, "n_inner": 7, "activation_function": "relu", "layer_norm_epsilon": 1e-2},
    "gpt2 scales": {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu"},
    "gpt2 no scale": {"scale_attn_weights": False, "reorder_and_upcast_attn": True},
}
CONFIGS = [*LLAMAS, *GPT2S]
PADDING = {
    "none": None,
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]],
    "holes": [[1, 0, 1, 1, 0], [0, 1, 0, 1, 1], [1, 1, 1, 0, 1]],
}


@cache
def plain(name: str) -> Pair:
    """Shared: do not change it."""
    return fresh(name)


def fresh(name: str) -> Pair:
    if name in GPT2S:
        return pair(transformers.GPT2LMHeadModel, **GPT2, **GPT2S[name])
    return pair(transformers.LlamaForCausalLM, **SIZES, **LLAMAS[name])


def tokens(padding: str = "none", seed: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    ids, labels = rng.integers(0, 17, (3, 5)), rng.integers(0, 17, (3, 5))
    labels[0, :3] = labels[2, 4] = -100
    mask = PADDING[padding]
    return {"input_ids": ids, "labels": labels} | ({} if mask is None else {"attention_mask": np.asarray(mask)})


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_loss(name: str, padding: str) -> None:
    check_outputs(plain(name), tokens(padding))


@pytest.mark.parametrize("name", ["grouped", "gpt2"])
def test_position_ids_and_a_mask_of_four_axes_are_taken_as_they_are(name: str) -> None:
    both, given = plain(name), tokens()
    rng = np.random.default_rng(5)
    given |= {"position_ids": rng.integers(0, 30, (3, 5)), "attention_mask": rng.normal(size=(3, 1, 5, 5))}
    with float64(), torch.no_grad():
        expected = both.live(**to_torch(given))
    close(both.model.forward(both.net, Inputs(**given)).logits, expected.logits, "logits", 1e-12)


def test_no_label_that_counts_makes_the_loss_nan_as_in_torch() -> None:
    both, given = plain("grouped"), tokens()
    given["labels"] = np.full((3, 5), -100)
    with float64(), torch.no_grad():
        assert bool(torch.isnan(both.live(**to_torch(given)).loss))
    with np.errstate(invalid="ignore"):
        assert np.isnan(both.model.forward(both.net, Inputs(**given)).loss)


def test_float32_is_near_what_transformers_computes_when_nothing_is_changed() -> None:
    """The other tests change what torch.float32 means; this one does not."""
    both, given = fresh("biases"), tokens("left")
    live = both.live.to(torch.float32)
    live.model.rotary_emb.inv_freq = live.model.rotary_emb.inv_freq.to(torch.float32)
    with torch.no_grad():
        expected = live(**to_torch(given))
    net = both.model.net({name: w.astype(np.float32) for name, w in both.net.weights.items()})
    got = both.model.forward(net, Inputs(**given))
    assert got.logits.dtype == np.float32
    close(got.logits, expected.logits, "logits", 1e-5)
    close(got.loss, expected.loss, "loss", 1e-5)


EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]
ADAPTERS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=EVERY, task_type="CAUSAL_LM"),
    "lora on embedding and head": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj", "lm_head"]),
    "lora ranks": lambda: peft.LoraConfig(r=2, target_modules="all-linear", rank_pattern={"1.mlp.up_proj": 4}, use_rslora=True),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["embed_tokens", "lm_head", *EVERY]),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=[*EVERY, "lm_head"]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=[*EVERY, "lm_head"]),
}
ON_GPT2: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=CONV1D, fan_in_fan_out=True, task_type="CAUSAL_LM"),
    "lora on positions": lambda: peft.LoraConfig(r=2, target_modules=["wpe", "wte"]),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["wpe", "wte", "lm_head", *CONV1D]),
    "loha on the head": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=["lm_head"]),
    "ia3": lambda: peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
    "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=CONV1D, fan_in_fan_out=True),
}
PLACED = [(name, adapter) for name in ("grouped", "tied", "biases") for adapter in ADAPTERS]
PLACED += [(name, adapter) for name in ("gpt2", "gpt2 untied") for adapter in ON_GPT2]


@pytest.mark.parametrize(("name", "adapter"), PLACED)
def test_every_adapter_gradient(name: str, adapter: str, tmp_path: Path) -> None:
    both = adapted(fresh(name), (ON_GPT2 if name in GPT2S else ADAPTERS)[adapter](), tmp_path)
    given = tokens("left")
    with float64():
        expected = both.inner(**to_torch(given))
        expected.loss.backward()
    got = both.model.vjp(both.net, Inputs(**given), OutputGradient(loss=1.0))
    close(got.output.logits, expected.logits.detach(), "logits", 1e-12)
    all_close(our_gradients(both, got.net), live_gradients(both))
    without = both.model.forward(Net(weights=both.net.weights, layers=both.net.layers, ties=both.net.ties), Inputs(**given))
    assert np.max(np.abs(without.logits - got.output.logits)) > 1e-3, "the adapter does nothing: the test sees nothing"


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_for_every_base_parameter_the_embeddings_and_a_prefix(name: str, padding: str) -> None:
    """The output's gradient is given for the logits and for the loss at once."""
    both, given = plain(name), tokens(padding)
    rng = np.random.default_rng(7)
    groups, d = (3, 4) if name in GPT2S else (both.live.config.num_key_value_heads, both.live.config.head_dim)
    prefix = [rng.normal(size=(3, groups, 2, d)) for _ in range(4)]
    dlogits = rng.normal(size=(3, 5, 17))
    del given["input_ids"]
    if "attention_mask" in given:
        given["attention_mask"] = np.concat([np.ones((3, 2), dtype=int), given["attention_mask"]], axis=1)
    embeds = rng.normal(size=(3, 5, 12))

    with float64():
        leaves = [torch.tensor(a, requires_grad=True) for a in (embeds, *prefix)]
        front = DynamicCache()
        for layer in range(2):
            front.update(leaves[1 + 2 * layer], leaves[2 + 2 * layer], layer)
        both.live.zero_grad()
        expected = both.live(inputs_embeds=leaves[0], cache=front, **to_torch(given))
        (1.5 * expected.loss + torch.sum(torch.tensor(dlogits) * expected.logits)).backward()
    past = (KeyValue(*prefix[:2]), KeyValue(*prefix[2:]))
    net = Net(weights=both.net.weights, layers=both.net.layers, ties=both.net.ties, trainable=frozenset(both.net.weights))
    got = both.model.vjp(net, Inputs(inputs_embeds=embeds, past=past, **given), OutputGradient(logits=dlogits, loss=1.5))

    close(got.output.logits, expected.logits.detach(), "logits", 1e-12)
    close(got.output.loss, expected.loss.detach(), "loss", 1e-12)
    close(got.inputs_embeds, leaves[0].grad, "inputs_embeds")
    assert got.past is not None
    for mine, leaf in zip([a for kv in got.past for a in kv], leaves[1:], strict=True):
        close(mine, leaf.grad, "prefix")
    # No token was looked up, so only a tied head asks anything of the table.
    grads = {n: p.grad.numpy() for n, p in both.live.named_parameters() if p.grad is not None}
    all_close(dict(got.net.weights), grads)
    assert len(grads) == len(net.weights) - (not both.net.ties)


@pytest.mark.parametrize("name", ["grouped", "tied", "gpt2", "gpt2 untied"])
def test_the_gradient_of_the_embedding_table_from_its_tokens(name: str) -> None:
    """GPT-2 looks its token types up in the same table."""
    both, given = plain(name), tokens("right")
    if name in GPT2S:
        given["token_type_ids"] = np.random.default_rng(6).integers(0, 17, (3, 5))
    table = f"{both.model.embedding}.weight"  # type: ignore[attr-defined]
    net = Net(weights=both.net.weights, layers=both.net.layers, ties=both.net.ties, trainable=frozenset({table}))
    with float64():
        both.live.zero_grad()
        expected = both.live(**to_torch(given))
        expected.loss.backward()
    got = both.model.vjp(net, Inputs(**given), OutputGradient(loss=1.0))
    close(got.output.logits, expected.logits.detach(), "logits", 1e-12)
    all_close(dict(got.net.weights), {table: both.live.get_input_embeddings().weight.grad})


def test_biases_trained_beside_an_adapter(tmp_path: Path) -> None:
    """PEFT's bias="lora_only": the bias of every adapted layer."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], bias="lora_only")
    both = adapted(fresh("biases"), config, tmp_path)
    wanted = {f"{name}.bias" for name in both.net.adapters}
    # PEFT's random biases, which `adapted` left to the adapter's file
    held = {**both.net.weights}
    for name, p in both.inner.named_parameters():
        if (plain_name := name.replace(".base_layer", "")) in wanted:
            held[plain_name] = p.detach().numpy()
    net = Net(weights=held, layers=both.net.layers, ties=both.net.ties, adapters=both.net.adapters, trainable=frozenset(wanted))
    given = tokens("left")
    with float64():
        expected = both.inner(**to_torch(given))
        expected.loss.backward()
    got = both.model.vjp(net, Inputs(**given), OutputGradient(loss=1.0))
    close(got.output.logits, expected.logits.detach(), "logits", 1e-12)
    live = {n.replace(".base_layer", ""): p.grad for n, p in both.inner.named_parameters() if p.grad is not None and n.endswith("bias")}
    all_close(dict(got.net.weights), live)
    assert len(live) == 4


@pytest.mark.parametrize("name", ["grouped", "llama3 rope", "gpt2", "gpt2 scales"])
def test_one_token_after_another_with_a_cache_as_transformers_does(name: str) -> None:
    both, given = plain(name), tokens("left")
    ids, mask = given["input_ids"], given["attention_mask"]
    theirs: Any = None
    ours: Any = None
    for t in range(5):
        step = {"input_ids": ids[:, t : t + 1], "attention_mask": mask[:, : t + 1]}
        with float64(), torch.no_grad():
            expected = both.live(cache=theirs, use_cache=True, **to_torch(step))
            theirs = expected.cache
        got = both.model.forward(both.net, Inputs(past=ours, **step))
        ours = got.cache
        close(got.logits, expected.logits, f"step {t}", 1e-12)
        assert got.cache is not None
        close(got.cache[1].k, theirs.layers[1].keys, f"keys of step {t}", 1e-12)
