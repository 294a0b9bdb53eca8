"""The tokens are those that transformers and PEFT generate, and what sampling leaves of the logits is what their warpers leave."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.hf

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from peft_ref.errors import ConfigError, ShapeError  # noqa: E402
from peft_ref.files.adapter import load_adapter  # noqa: E402
from peft_ref.model import adapt, load, merge  # noqa: E402
from peft_ref.nn import generate as generation  # noqa: E402
from peft_ref.nn.functions import softmax  # noqa: E402
from peft_ref.nn.generate import Front, Sampling, draw, generate, replayed, sampler, warp  # noqa: E402
from peft_ref.prompts import Context, Prompt  # noqa: E402
from peft_ref.train import net_of  # noqa: E402
from tests.nn.beside_hf import Pair, float64, pair, scatter, to_torch  # noqa: E402

SPECIAL = {"vocab_size": 29, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
LLAMA = {
    **SPECIAL,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
GPT2 = {**SPECIAL, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 61, "tie_word_embeddings": False}
T5 = {
    **SPECIAL,
    "d_model": 12,
    "d_kv": 4,
    "d_ff": 10,
    "num_layers": 2,
    "num_heads": 3,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
}
MODELS: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", LLAMA, "CAUSAL_LM"),
    "gpt2": ("GPT2LMHeadModel", GPT2, "CAUSAL_LM"),
    "t5": ("T5ForConditionalGeneration", T5, "SEQ_2_SEQ_LM"),
}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "t5": ["q", "v", "wo"]}
IDS = np.random.default_rng(0).integers(1, 29, (3, 5))
LEFT = np.asarray([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
NEW = 12
GQA = {"num_attention_heads": 2, "token_dim": 4}  # of a prefix before grouped queries


def fresh(name: str) -> Pair:
    """A random model that does not say one token for ever: what a block adds weighs more than what was there, positions count."""
    cls, sizes, _ = MODELS[name]
    both = pair(getattr(transformers, cls), **sizes)
    for key, p in both.live.named_parameters():
        if key.endswith(".bias"):
            p.data -= 1
        elif key.endswith((".wo.weight", ".o.weight", ".wpe.weight", "relative_attention_bias.weight")):
            p.data *= 20 if name == "t5" else 4
    held = {key: p.detach().numpy().copy() for key, p in both.live.named_parameters()}
    return both._replace(net=both.model.net(held), graph=replace(both.graph, weights=held))


@cache
def plain(name: str) -> Pair:
    """Shared: do not change it."""
    return fresh(name)


def live_tokens(live: Any, **options: Any) -> Any:
    mask = options.pop("mask", None)
    given = {"input_ids": IDS} | ({} if mask is None else {"attention_mask": mask})
    with float64(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return live.generate(**to_torch(given), **{"max_new_tokens": NEW, "do_sample": False, **options}).numpy()


def same(got: Any, expected: Any) -> None:
    assert np.array_equal(got, expected), f"{got}\nexpected\n{expected}"
    assert len(np.unique(expected[:, -NEW:])) > 3, "too monotonous to tell anything"


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy(name: str, mask: Any, use_cache: bool) -> None:
    both = plain(name)
    expected = live_tokens(both.live, mask=mask)
    same(generate(both.model, both.net, IDS, new_tokens=NEW, attention_mask=mask, use_cache=use_cache), expected)


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_are_through_go_on_with_padding_and_all_of_them_end_it(name: str) -> None:
    both = plain(name)
    said = generate(both.model, both.net, IDS, new_tokens=NEW)[:, -NEW:]
    padded = False
    for eos in ([int(said[0, 2])], [int(said[0, 1]), int(said[1, 2]), int(said[2, 4])]):
        expected = live_tokens(both.live, eos_token_id=eos, pad_token_id=0)
        got = generate(both.model, both.net, IDS, new_tokens=NEW, eos=eos, pad=0)
        assert np.array_equal(got, expected)
        padded |= bool(np.any(got[:, 1 - NEW :] == 0))
    assert got.shape[1] < IDS.shape[1] + NEW
    assert padded


@pytest.mark.parametrize("name", MODELS)
def test_with_adapters_merged_and_not(name: str, tmp_path: Path) -> None:
    both = fresh(name)
    with float64():
        config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS[name], task_type=MODELS[name][2])
        live = peft.get_peft_model(both.live, config).eval()
        scatter(live, 2)
        live.save_pretrained(tmp_path)
    adapted = load(adapt(both.graph), tmp_path)
    for mask in (None, LEFT):
        expected = live_tokens(live, mask=mask)
        assert not np.array_equal(expected, live_tokens(plain(name).live, mask=mask))
        for model in (adapted, merge(adapted)):
            same(generate(both.model, net_of(both.model, model), IDS, new_tokens=NEW, attention_mask=mask), expected)


class Prompted(NamedTuple):
    live: Any
    both: Pair
    front: Front


def prompted(name: str, config: Callable[..., Any], folder: Path, **options: Any) -> Prompted:
    both = fresh(name)
    with float64(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = peft.get_peft_model(both.live, config(num_virtual_tokens=3, task_type=MODELS[name][2], **options)).eval()
        scatter(live.prompt_encoder, 2)
        live.save_pretrained(folder)
    read = load_adapter(folder)
    assert isinstance(read.config.method, Prompt)
    ctx = Context(batch=3, task_ids=np.asarray([1, 0, 1]))
    return Prompted(live, both, Front(read.config.method, read.config.method.prompt(read.prompt, ctx)))


def as_pefts_generate_was_meant(live: Any) -> None:
    """transformers 5.24 calls `cache` what PEFT 0.21.2 looks for as `past_key_values` when it generates. It finds none, and puts the prompt
    before every single token. Here the old name is given back to it."""
    inner = live.base_model_prepare_inputs_for_generation

    def renamed(*args: Any, **kwargs: Any) -> Any:
        made = inner(*args, **kwargs)
        return {("past_key_values" if name == "cache" else name): value for name, value in made.items()}

    live.base_model_prepare_inputs_for_generation = renamed


PROMPTS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama prompt": ("llama", peft.PromptTuningConfig, {}),
    "llama p-tuning": ("llama", peft.PromptEncoderConfig, {"encoder_hidden_size": 5}),
    "llama multitask": ("llama", peft.MultitaskPromptTuningConfig, {"num_tasks": 2}),
    "llama prefix": ("llama", peft.PrefixTuningConfig, GQA),
    "gpt2 prompt": ("gpt2", peft.PromptTuningConfig, {}),
    "gpt2 prefix": ("gpt2", peft.PrefixTuningConfig, {}),
}


@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
@pytest.mark.parametrize("case", PROMPTS)
def test_behind_a_prompt(case: str, mask: Any, tmp_path: Path) -> None:
    name, config, options = PROMPTS[case]
    live, both, front = prompted(name, config, tmp_path, **options)
    as_pefts_generate_was_meant(live)
    tasks = {"task_ids": torch.tensor([1, 0, 1])} if "multitask" in case else {}
    expected = live_tokens(live, mask=mask, **tasks)
    assert not np.array_equal(expected, live_tokens(plain(name).live, mask=mask))
    for use_cache in (True, False):
        same(generate(both.model, both.net, IDS, new_tokens=NEW, attention_mask=mask, front=front, use_cache=use_cache), expected)


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_t5_behind_a_prompt(config: Any, tmp_path: Path) -> None:
    live, both, front = prompted("t5", config, tmp_path)
    as_pefts_generate_was_meant(live)
    for mask in (None, LEFT):
        expected = live_tokens(live, mask=LEFT * 0 + 1 if mask is None else mask)
        for use_cache in (True, False):
            same(generate(both.model, both.net, IDS, new_tokens=NEW, attention_mask=mask, front=front, use_cache=use_cache), expected)


def test_a_multitask_prompt_before_t5_is_refused(tmp_path: Path) -> None:
    _, both, front = prompted("t5", peft.MultitaskPromptTuningConfig, tmp_path, num_tasks=2)
    with pytest.raises(ConfigError, match="half of a multitask prompt"):
        generate(both.model, both.net, IDS, new_tokens=1, front=front)


SAMPLINGS = [Sampling(temperature=0.3), Sampling(top_k=5), Sampling(top_p=0.6), Sampling(temperature=1.7, top_k=20, top_p=0.8)]
SAMPLINGS += [Sampling(top_p=1e-6), Sampling(top_k=1), Sampling(top_k=99)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sampling_leaves_what_the_warpers_of_transformers_leave(sampling: Sampling) -> None:
    logits = 3 * np.random.default_rng(4).normal(size=(40, 29))
    processors = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k is not None:
        processors.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(transformers.TopPLogitsWarper(sampling.top_p))
    expected = processors(torch.zeros((40, 1), dtype=torch.int64), torch.tensor(logits)).softmax(-1).numpy()
    np.testing.assert_allclose(softmax(warp(logits, sampling)), expected, rtol=1e-12, atol=0)


def test_draws_follow_the_probabilities() -> None:
    """Evenly spaced u draw every token as often as its probability says, to one draw."""
    logits = np.random.default_rng(5).normal(size=(1, 29))
    sampling, n = Sampling(temperature=0.8, top_k=9, top_p=0.9), 5000
    probabilities = softmax(warp(logits, sampling))[0]
    drawn = draw(np.repeat(logits, n, axis=0), sampling, (np.arange(n) + 0.5) / n)
    assert np.all(np.abs(np.bincount(drawn, minlength=29) - n * probabilities) <= 1)
    ends = draw(np.repeat(logits, 3, axis=0), sampling, np.asarray([0.0, np.nextafter(1.0, 0.0), 1.0]))  # 1 is what float32 makes of it
    possible = np.flatnonzero(probabilities)
    assert ends.tolist() == [possible[0], possible[-1], possible[-1]]


def test_sampled_tokens_are_possible_and_the_same_for_the_same_uniforms() -> None:
    both, sampling = plain("llama"), Sampling(temperature=1.5, top_k=4)
    uniforms = np.random.default_rng(7).random((NEW, 3))
    given = generate(both.model, both.net, IDS, new_tokens=NEW, attention_mask=LEFT, choose=replayed(sampling, uniforms))
    drawn = generate(
        both.model, both.net, IDS, new_tokens=NEW, attention_mask=LEFT, choose=sampler(sampling, np.random.default_rng(7)), use_cache=False
    )
    same(given, drawn)
    assert not np.array_equal(given, generate(both.model, both.net, IDS, new_tokens=NEW, attention_mask=LEFT))
    coldest = sampler(replace(sampling, top_k=1), np.random.default_rng(8))
    same(generate(both.model, both.net, IDS, new_tokens=NEW, choose=coldest), live_tokens(both.live))


def test_what_makes_no_sense_is_refused() -> None:
    both = plain("llama")
    for wrong in ({"temperature": 0.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ConfigError, match="transformers refuses it too"):
            Sampling(**wrong)
    with pytest.raises(ShapeError, match="at least one new token"):
        generation.generate(both.model, both.net, IDS, new_tokens=0)
