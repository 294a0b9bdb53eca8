"""Adaption prompts through the whole of Llama and GPT-2: outputs, loss, cache and every gradient are live PEFT's, in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from peft_ref.attending import AttentionAdapter  # noqa: E402
from peft_ref.methods import AdaptionPrompt  # noqa: E402
from peft_ref.nn import Inputs, Net, OutputGradient  # noqa: E402
from tests.nn.beside_hf import Pair, all_close, close, float64, pair, to_torch  # noqa: E402

LLAMA = {"vocab_size": 17, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 3, "pad_token_id": None}
GPT2 = {"vocab_size": 17, "n_embd": 12, "n_layer": 3, "n_head": 3, "n_positions": 31, "pad_token_id": None}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 3},
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "biases": {"num_attention_heads": 6, "num_key_value_heads": 3, "attention_bias": True},
    "gpt2": {},
    "gpt2 scales": {"scale_attn_by_inverse_layer_idx": True},
    "gpt2 no scale": {"scale_attn_weights": False},
}
N, LAYERS = 5, 2


@cache
def adapted(name: str) -> tuple[Any, Pair]:
    """PEFT's model with two adapters, the second on all three layers, and ours with the first. Shared: do not change it."""
    cls, sizes = (transformers.GPT2LMHeadModel, GPT2) if "gpt2" in name else (transformers.LlamaForCausalLM, LLAMA)
    both = pair(cls, **sizes, **MODELS[name])
    with float64():
        live = peft.get_peft_model(
            both.live, peft.AdaptionPromptConfig(adapter_len=N, adapter_layers=LAYERS, task_type="CAUSAL_LM"), "first"
        ).eval()
        live.add_adapter("second", peft.AdaptionPromptConfig(adapter_len=N + 2, adapter_layers=3, task_type="CAUSAL_LM"))
        for seed, adapter in enumerate(("first", "second")):
            live.base_model.set_adapter(adapter)
            rng = np.random.default_rng(seed)
            for key, p in live.named_parameters():
                if "adaption_" in key:
                    p.data = torch.tensor(rng.normal(size=tuple(p.shape)))
    return live, both


def ours(name: str, adapter: str) -> tuple[Any, Net]:
    """PEFT's model with that adapter active, and our net with its numbers."""
    live, both = adapted(name)
    live.base_model.set_adapter(adapter)
    held = {key: p.detach().numpy() for key, p in live.named_parameters() if "adaption_" in key}
    modules: dict[str, dict[str, Any]] = {}
    for key, value in held.items():
        path, _, last = key.removeprefix("base_model.model.").rpartition(".")
        modules.setdefault(path, {})[last] = value
    n, layers = (N, LAYERS) if adapter == "first" else (N + 2, 3)
    method = AdaptionPrompt(adapter_len=n, adapter_layers=layers)
    assert len(modules) == layers
    return live, replace(both.net, attention={m: AttentionAdapter(method, method.unpack(12, t, m)) for m, t in modules.items()})


def tokens() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    mask = np.asarray([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    return {"input_ids": rng.integers(0, 17, (3, 5)), "labels": rng.integers(0, 17, (3, 5)), "attention_mask": mask}


def flat(net: Net, gradients: Any) -> dict[str, Any]:
    return {f"{m}.{key}": d for m, (p,) in gradients.adapters.items() for key, d in net.attention[m].method.pack(p).items()}


@pytest.mark.parametrize("adapter", ["first", "second"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_every_gradient(name: str, adapter: str) -> None:
    live, net = ours(name, adapter)
    both, given = adapted(name)[1], tokens()
    embeds = np.random.default_rng(8).normal(size=(3, 5, 12))
    del given["input_ids"]
    with float64():
        leaf = torch.tensor(embeds, requires_grad=True)
        live.zero_grad()
        for key, p in live.named_parameters():
            p.requires_grad_("adaption_" in key)
        expected = live(inputs_embeds=leaf, **to_torch(given))
        expected.loss.backward()
    got = both.model.vjp(net, Inputs(inputs_embeds=embeds, **given), OutputGradient(loss=1.0))
    close(got.output.logits, expected.logits.detach(), "logits", 1e-12)
    close(got.output.loss, expected.loss.detach(), "loss", 1e-12)
    close(got.inputs_embeds, leaf.grad, "inputs_embeds")
    theirs = {k.removeprefix("base_model.model."): p.grad for k, p in live.named_parameters() if "adaption_" in k}
    all_close(flat(net, got.net), theirs)
    without = both.model.forward(replace(net, attention={}), Inputs(inputs_embeds=embeds, **given))
    assert np.max(np.abs(without.logits - got.output.logits)) > 1e-2, "the adapter does nothing: the test sees nothing"


@pytest.mark.parametrize("name", ["biases", "gpt2"])
def test_the_gradients_of_the_blocks_own_weights_pass_through_what_is_added(name: str) -> None:
    """PEFT freezes them; let loose they are reached by both ways, the attention's and the prompt's."""
    live, net = ours(name, "second")
    both, given = adapted(name)[1], tokens()
    wanted = frozenset(key for key in net.weights if "attn" in key)
    with float64():
        live.zero_grad()
        for key, p in live.named_parameters():
            p.requires_grad_("attn" in key)
        live(**to_torch(given)).loss.backward()
    got = both.model.vjp(replace(net, trainable=wanted), Inputs(**given), OutputGradient(loss=1.0))
    theirs = {
        k.removeprefix("base_model.model.").replace("attn.model.", "attn."): p.grad
        for k, p in live.named_parameters()
        if "attn" in k and "adaption_" not in k
    }
    all_close(dict(got.net.weights), theirs)


@pytest.mark.parametrize("name", ["grouped", "gpt2"])
def test_one_token_after_another_with_a_cache(name: str) -> None:
    live, net = ours(name, "first")
    both, given = adapted(name)[1], tokens()
    theirs: Any = None
    mine: Any = None
    with float64(), torch.no_grad():
        whole = live(**to_torch(given)).logits
    for t in range(5):
        step = {"input_ids": given["input_ids"][:, t : t + 1], "attention_mask": given["attention_mask"][:, : t + 1]}
        with float64(), torch.no_grad():
            expected = live(past_key_values=theirs, use_cache=True, **to_torch(step))
            theirs = expected.past_key_values
        got = both.model.forward(net, Inputs(past=mine, **step))
        mine = got.cache
        close(got.logits, expected.logits, f"step {t}", 1e-12)
    close(got.logits[1:, 0], whole[1:, -1], "the last step as in one pass", 1e-9)
