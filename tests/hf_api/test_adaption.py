"""Adaption prompts under PeftModel, step by step beside live PEFT: outputs, names, counts, files, tokens, and what both refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
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

from peft_ref import hf  # noqa: E402
from peft_ref.errors import ConfigError, KeyMismatchError, NotMergeableError, TargetError  # noqa: E402
from peft_ref.hf import BaseModel  # noqa: E402
from tests.hf_api.sides import GIVEN, GPT2, SIZES, bases, called, live, pair, printed, same_folder, same_output, scatter, their_state  # noqa: E402

FIRST = {"adapter_len": 3, "adapter_layers": 1}
SECOND = {"adapter_len": 4, "adapter_layers": 2}
ARCHITECTURES = ["llama", "gpt2"]


def both(model: str, name: str = "default") -> tuple[Any, Any]:
    """PEFT's model and ours with the same first adapter and the same "other", the first active."""
    base, our_base = bases(model)
    with live():
        theirs = peft.get_peft_model(base, peft.AdaptionPromptConfig(**FIRST, task_type="CAUSAL_LM"), name)
        theirs.add_adapter("other", peft.AdaptionPromptConfig(**SECOND, task_type="CAUSAL_LM"))
        for seed, each in enumerate((name, "other")):
            theirs.set_adapter(each)
            scatter(theirs, seed)
        theirs.set_adapter(name)
        theirs.eval()
    ours = hf.get_peft_model(our_base, hf.AdaptionPromptConfig(**FIRST, task_type="CAUSAL_LM"), name)
    ours.add_adapter("other", hf.AdaptionPromptConfig(**SECOND, task_type="CAUSAL_LM"))
    for each in (name, "other"):
        hf.set_peft_model_state_dict(ours, their_state(theirs, each), each)
    return theirs, ours


STEPS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda m: None,
    "other": lambda m: m.set_adapter("other"),
    "off": lambda m: m.disable_adapter_layers(),
    "another while off": lambda m: m.set_adapter("default"),
    "on": lambda m: m.enable_adapter_layers(),
    "other again": lambda m: m.set_adapter("other"),
    "deleted": lambda m: m.delete_adapter("other"),
    "deleted, all": lambda m: m.delete_adapter("default"),
}


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_step_by_step(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = both(model)
    seen = []
    for name, step in STEPS.items():
        with live():
            step(theirs)
        step(ours)
        if theirs.active_adapters:  # without one PEFT fails: it asks for its configuration
            same_output(theirs, ours, called(model), name)
        seen.append(float(ours(**called(model)).loss))
        assert ours.active_adapters == theirs.active_adapters, name
        assert list(ours.peft_config) == list(theirs.peft_config), name
        if name not in ("off", "another while off", "deleted, all"):  # PEFT's knows of its context alone
            assert ours.has_active_enabled_adapter == theirs.has_active_enabled_adapter, name
        assert printed(ours, capsys) == printed(theirs, capsys), name
        if "off" in name or "all" in name:
            continue  # PEFT's context fails on what is off already
        with live(), theirs.disable_adapter(), ours.disable_adapter():
            same_output(theirs, ours, called(model), f"{name}, disabled")
            assert printed(ours, capsys) == printed(theirs, capsys), name
    assert seen[0] != seen[1] != seen[2] == seen[3] == seen[7] != seen[4] == seen[0] == seen[6]


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_a_fresh_adapter_is_pefts(model: str) -> None:
    """Its gate is closed, its prompt standard normal, and its configuration says where it went."""
    base, our_base = bases(model)
    config = hf.AdaptionPromptConfig(adapter_len=200, adapter_layers=2, task_type="CAUSAL_LM")
    ours = hf.get_peft_model(our_base, config)
    with live():
        theirs = peft.get_peft_model(base, peft.AdaptionPromptConfig(adapter_len=200, adapter_layers=2, task_type="CAUSAL_LM")).eval()
    assert isinstance(ours, hf.PeftModelForCausalLM)
    assert config.target_modules == theirs.peft_config["default"].target_modules
    got, expected = hf.get_peft_model_state_dict(ours), their_state(theirs)
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensor.shape == got[key].shape
        if "gate" in key:
            assert not np.any(got[key])
            assert not np.any(tensor)
        else:
            assert abs(np.mean(got[key])) < 0.1
            assert abs(np.std(got[key]) - 1) < 0.06
    same_output(theirs, ours, called(model))


@pytest.mark.parametrize("model", ARCHITECTURES)
@pytest.mark.parametrize("lazy", [False, True])
def test_files_either_way(model: str, lazy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = both(model)
    with live():
        theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    for sub in ("", "other"):
        same_folder(tmp_path / "theirs" / sub, tmp_path / "ours" / sub, exact=True)
    base, our_base = bases(model)
    with live():  # PEFT reads ours, and we read PEFT's
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
        theirs.load_adapter(str(tmp_path / "ours" / "other"), "second")
    ours = hf.PeftModel.from_pretrained(our_base, tmp_path / "theirs", low_cpu_mem_usage=lazy)
    ours.load_adapter(tmp_path / "theirs", "second", subfolder="other", low_cpu_mem_usage=lazy)
    for name in ("default", "second"):
        with live():
            theirs.set_adapter(name)
        ours.set_adapter(name)
        same_output(theirs, ours, called(model), name)
        assert printed(ours, capsys) == printed(theirs, capsys)
        assert ours.peft_config[name].inference_mode is theirs.peft_config[name].inference_mode is True
    with live():
        theirs = peft.PeftModel.from_pretrained(bases(model)[0], tmp_path / "ours", is_trainable=True)
    trained = hf.PeftModel.from_pretrained(our_base, tmp_path / "ours", is_trainable=True)
    assert printed(trained, capsys) == printed(theirs, capsys)


def test_16_bits_stay_16_bits() -> None:
    """Unlike LoRA's, whose parameters never have 16."""
    live_base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).half()
    theirs = peft.get_peft_model(live_base, peft.AdaptionPromptConfig(**FIRST, task_type="CAUSAL_LM"))
    both_sides = pair(transformers.LlamaForCausalLM, **SIZES)
    weights = {name: w.astype(np.float16) for name, w in both_sides.graph.weights.items()}
    graph = type(both_sides.graph)(model=both_sides.model, weights=weights, model_config=both_sides.graph.model_config)
    ours = hf.get_peft_model(BaseModel(graph), hf.AdaptionPromptConfig(**FIRST, task_type="CAUSAL_LM"))
    for key, tensor in their_state(theirs).items():
        assert hf.get_peft_model_state_dict(ours)[key].dtype == tensor.dtype == np.float16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_tokens_are_pefts(architecture: str, use_cache: bool) -> None:
    cls, sizes = (
        (transformers.LlamaForCausalLM, SIZES) if architecture == "llama" else (transformers.GPT2LMHeadModel, {**GPT2, "n_positions": 31})
    )
    base = pair(cls, **{**sizes, "vocab_size": 41, "pad_token_id": 0, "eos_token_id": None, "tie_word_embeddings": False})
    with live():
        theirs = peft.get_peft_model(copy.deepcopy(base.live), peft.AdaptionPromptConfig(**SECOND, task_type="CAUSAL_LM"))
        scatter(theirs, 4)
        for key, p in theirs.named_parameters():
            if "adaption_gate" in key:
                p.data *= 20
        theirs.eval()
    ours = hf.get_peft_model(BaseModel(base.graph), hf.AdaptionPromptConfig(**SECOND, task_type="CAUSAL_LM"))
    hf.set_peft_model_state_dict(ours, their_state(theirs))
    rng = np.random.default_rng(2)
    given = {"input_ids": rng.integers(1, 40, (3, 5)), "attention_mask": np.asarray([[0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1]])}
    with live(), torch.no_grad():
        tensors = {name: torch.tensor(value) for name, value in given.items()}
        expected = theirs.generate(**tensors, max_new_tokens=12, do_sample=False, use_cache=use_cache)
        with theirs.disable_adapter():
            plain = theirs.generate(**tensors, max_new_tokens=12, do_sample=False, use_cache=use_cache)
    got = ours.generate(**given, max_new_tokens=12, use_cache=use_cache)
    np.testing.assert_array_equal(got, expected.numpy())
    assert expected.shape != plain.shape or not torch.equal(expected, plain), "the adapter changes no token: the test sees nothing"


REFUSED: dict[str, tuple[Callable[[Any, Any], Any], type[Exception]]] = {
    "merge": (lambda m, side: m.merge_adapter(), NotMergeableError),
    "unmerge": (lambda m, side: m.unmerge_adapter(), NotMergeableError),
    "merge_and_unload": (lambda m, side: m.merge_and_unload(), NotMergeableError),
    "unload": (lambda m, side: m.unload(), NotMergeableError),
    "layer status": (lambda m, side: m.get_layer_status(), NotMergeableError),
    "model status": (lambda m, side: m.get_model_status(), NotMergeableError),
    "requires_grad": (lambda m, side: m.set_requires_grad("other"), NotMergeableError),
    "two at once": (lambda m, side: m.set_adapter(["default", "other"]), ConfigError),
    "inference": (lambda m, side: m.set_adapter("other", inference_mode=True), ConfigError),
    "unknown": (lambda m, side: m.set_adapter("none"), ConfigError),
    "delete unknown": (lambda m, side: m.delete_adapter("none"), ConfigError),
    "the same name": (lambda m, side: m.add_adapter("other", side.AdaptionPromptConfig(**FIRST, task_type="CAUSAL_LM")), ConfigError),
    "another type": (
        lambda m, side: m.add_adapter("lora", side.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])),
        ConfigError,
    ),
    "weighted": (lambda m, side: m.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="linear"), ConfigError),
    "too many layers": (
        lambda m, side: m.add_adapter("deep", side.AdaptionPromptConfig(adapter_len=2, adapter_layers=9, task_type="CAUSAL_LM")),
        TargetError,
    ),
    "no attention": (
        lambda m, side: m.add_adapter(
            "mlp", side.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, target_modules="mlp", task_type="CAUSAL_LM")
        ),
        TargetError,
    ),
    "mixed": (
        lambda m, side: side.get_peft_model(m.get_base_model(), side.AdaptionPromptConfig(**FIRST), mixed=True),
        ConfigError,
    ),
    "injected": (lambda m, side: side.inject_adapter_in_model(side.AdaptionPromptConfig(**FIRST), m.get_base_model()), ConfigError),
}


@pytest.mark.parametrize("name", REFUSED)
def test_both_refuse(name: str) -> None:
    theirs, ours = both("llama")
    act, error = REFUSED[name]
    with live(), pytest.raises((AttributeError, TypeError, ValueError, KeyError)):
        act(theirs, peft)
    before = ours.state
    with pytest.raises(error):
        act(ours, hf)
    assert ours.state is before


def test_rows_that_name_adapters_are_refused_where_peft_ignores_the_names() -> None:
    theirs, ours = both("llama")
    ids = torch.tensor(GIVEN["input_ids"])
    with live(), torch.no_grad():
        assert torch.equal(theirs(input_ids=ids, adapter_names=["other", "__base__"]).logits, theirs(input_ids=ids).logits)
    with pytest.raises(NotMergeableError, match="HF ignores"):
        ours(**GIVEN, adapter_names=["other", "__base__"])


def test_a_file_for_other_layers_and_what_stands_beside_are_refused(tmp_path: Path) -> None:
    ours = hf.get_peft_model(bases("llama")[1], hf.AdaptionPromptConfig(**FIRST, task_type="CAUSAL_LM"))
    ours.add_adapter("other", hf.AdaptionPromptConfig(**{**FIRST, "adapter_layers": 2}, task_type="CAUSAL_LM"))
    tensors = hf.get_peft_model_state_dict(ours, adapter_name="other")
    with pytest.raises(KeyMismatchError, match=r"model\.layers\.0\.self_attn is in the file, and no block"):
        hf.set_peft_model_state_dict(ours, tensors, "default")
    with pytest.raises(KeyMismatchError, match=r"model\.layers\.0\.self_attn is not in the file"):
        hf.set_peft_model_state_dict(ours, {k: t for k, t in tensors.items() if ".0." not in k}, "other")
    with pytest.raises(TargetError, match="model_type='bert'"):
        hf.get_peft_model(bases("bert")[1], hf.AdaptionPromptConfig(**FIRST))
    with pytest.raises(ConfigError, match="adapter_len is not given"):
        hf.get_peft_model(bases("llama")[1], hf.AdaptionPromptConfig(adapter_layers=1))
