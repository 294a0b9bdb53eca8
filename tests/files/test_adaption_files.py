"""Adaption prompts in files: what PEFT wrote is read, runs, and is written back to the byte; what cannot be is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.errors import ConfigError, KeyMismatchError, ShapeError, TargetError
from peft_ref.files.adapter import CONFIG, WEIGHTS, AdapterFile, from_state_dict, load_adapter, load_config, save_adapter
from peft_ref.files.config import from_dict, parse, render
from peft_ref.graph.blocks import DEFAULT_BLOCKS, attention_blocks
from peft_ref.methods import AdaptionPrompt
from peft_ref.model import adapt, add
from tests.nn.tiny import LLAMA

GIVEN: dict[str, Any] = {"peft_type": "ADAPTION_PROMPT", "adapter_len": 3, "adapter_layers": 2}
BLOCKS = ("model.layers.1.self_attn", "model.layers.2.self_attn")
SIZES = {"vocab_size": 17, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 3, "num_attention_heads": 3}


def tensors() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    found = {f"base_model.model.{b}.adaption_prompt": rng.normal(size=(1, 3, 12)) for b in BLOCKS}
    return found | {f"base_model.model.{b}.adaption_gate": rng.normal(size=1) for b in BLOCKS}


def peft_folder(folder: Path) -> tuple[Any, Path]:
    """A live model, and the folder of its second adapter, which is called as layers are: "1"."""
    torch, peft, transformers = (pytest.importorskip(name) for name in ("torch", "peft", "transformers"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, pad_token_id=None, attn_implementation="eager")
    live = peft.get_peft_model(
        transformers.LlamaForCausalLM(config), peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=1, task_type="CAUSAL_LM")
    ).eval()
    live.add_adapter("1", peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"))
    live.base_model.set_adapter("1")
    for name, p in live.named_parameters():
        if "adaption_" in name:
            p.data = torch.randn_like(p)
    live.save_pretrained(folder)
    return live, folder / "1"


@pytest.mark.hf
@pytest.mark.filterwarnings("ignore")
def test_what_peft_saved_is_read_runs_and_is_written_back_to_the_byte(tmp_path: Path) -> None:
    live, folder = peft_folder(tmp_path / "theirs")
    import torch

    from peft_ref.nn import Inputs, model_of

    read = load_adapter(tmp_path / "theirs", "1")
    assert tuple(read.attention) == BLOCKS
    assert read.config.method == AdaptionPrompt(adapter_len=3, adapter_layers=2)
    save_adapter(tmp_path / "ours", read, "1")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "ours/1" / name).read_bytes() == (folder / name).read_bytes()
    said = {**live.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    held = {
        key.removeprefix("base_model.model.").replace("self_attn.model.", "self_attn."): p.detach().numpy()
        for key, p in live.named_parameters()
        if "adaption_" not in key
    }
    model = model_of(said)
    target = read.config.targets.target_modules
    assert isinstance(target, str)
    assert attention_blocks(tuple(model.parts()), "llama", 2, target) == tuple(read.attention)
    ids = np.asarray([[3, 4, 5, 6]])
    net = replace(model.net(held), attention=read.attention)
    with torch.no_grad():
        expected = live(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(model.forward(net, Inputs(input_ids=ids)).logits, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.hf
@pytest.mark.filterwarnings("ignore")
def test_peft_loads_what_we_write(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import peft
    import torch
    import transformers

    config = from_dict({**GIVEN, "task_type": "CAUSAL_LM", "base_model_name_or_path": None})
    kept = {key: value.astype(np.float32) for key, value in tensors().items()}
    save_adapter(tmp_path / "ours", from_state_dict(config, kept))
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, pad_token_id=None))
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours"))
    found = {key: p.numpy() for key, p in peft.get_peft_model_state_dict(loaded).items()}
    assert found.keys() == kept.keys()
    for key, value in kept.items():
        np.testing.assert_array_equal(found[key], value)


@pytest.mark.hf
def test_the_architectures_are_pefts() -> None:
    pytest.importorskip("peft")
    from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG

    assert {kind: about.target_modules for kind, about in TRANSFORMERS_MODEL_CONFIG.items()} == dict(DEFAULT_BLOCKS)


def test_what_a_newer_peft_adds_is_kept_and_every_key_stays(tmp_path: Path) -> None:
    whole = {**GIVEN, "target_modules": None, "inference_mode": True, "revision": None, "task_type": "CAUSAL_LM", "from_the_future": [1]}
    text = json.dumps(dict(sorted(whole.items())), indent=2)
    assert render(parse(text)) == text
    (tmp_path / CONFIG).write_text(text)
    assert load_config(tmp_path).housekeeping["from_the_future"] == [1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"adapter_len": 0}, "adapter_len=0: a positive number"),
        ({"adapter_layers": -1}, "adapter_layers=-1: a positive number"),
        ({"adapter_len": "3"}, "adapter_len='3' is of type str"),
        ({"target_modules": ["self_attn"]}, r"takes the last part of a name.*\n  Give 'self_attn'"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_dict({**GIVEN, **changes})


def test_tensors_that_do_not_fit_are_refused() -> None:
    config, whole = from_dict(GIVEN), tensors()
    assert tuple(from_state_dict(config, whole).attention) == BLOCKS
    first = f"base_model.model.{BLOCKS[0]}"
    for change, error, says in (
        ({f"{first}.adaption_gate": None}, KeyMismatchError, "adaption_gate missing"),
        ({f"{first}.adaption_prompt": np.zeros((1, 4, 12))}, ShapeError, r"expected \(1, 3, 12\)"),
        ({f"{first}.adaption_prompt": np.zeros((3, 12))}, ShapeError, r"is \(3, 12\)"),
        ({f"{first}.adaption_gate.default": np.zeros(1)}, KeyMismatchError, "is no parameter of AdaptionPrompt"),
    ):
        changed = {key: value for key, value in {**whole, **change}.items() if value is not None}
        with pytest.raises(error, match=says):
            from_state_dict(config, changed)


def test_it_is_no_adapter_of_a_layer() -> None:
    config = from_dict(GIVEN)
    with pytest.raises(ConfigError, match="adapts no layer of a model: it adds to attention blocks"):
        config.method_for("q_proj")
    from peft_ref.nn import ModelGraph
    from tests.nn.tiny import random_net

    graph = ModelGraph(model=LLAMA, weights=random_net(LLAMA).weights, model_config={"model_type": "llama"})
    added = add(adapt(graph), "a", config, np.random.default_rng(0)).adapters["a"]
    assert added.blocks.keys() <= {f"model.layers.{i}.self_attn" for i in range(LLAMA.num_hidden_layers)}
    assert added.blocks
    assert not added.modules
    assert AdapterFile(config=config).attention == {}


@pytest.mark.parametrize(
    ("model_type", "layers", "error", "says"),
    [
        ("bert", 1, TargetError, "model_type='bert'.*\n  There are gpt2, llama, mistral"),
        ("llama", None, ConfigError, "adapter_layers=None"),
        ("llama", 0, ConfigError, "adapter_layers=0"),
        ("llama", 3, TargetError, "adapter_layers=3, and the model has 2 blocks"),
    ],
)
def test_blocks_that_are_not_there_are_refused(model_type: str, layers: int | None, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        attention_blocks(("a.self_attn", "self_attn", "b.self_attn", "b.self_attn.q_proj", "b.xself_attn"), model_type, layers)
