"""`peft-ref convert` as a program: what it leaves and says, and how it says no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.cli import main
from peft_ref.files.adapter import load_adapter
from peft_ref.files.safetensors import serialize
from tests.model.live import INPUTS, inputs, layer_output, net, peft, torch

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
X = inputs()
Capture = pytest.CaptureFixture[str]


def saved(folder: Path, config: Any, head: str = "") -> Any:
    theirs = peft.get_peft_model(net(), config)
    generator = torch.Generator().manual_seed(3)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    theirs.save_pretrained(folder / "adapter")
    (folder / "model").mkdir()
    tensors = {name.removeprefix(head): value.numpy() for name, value in net().state_dict().items()}
    (folder / "model" / "model.safetensors").write_bytes(serialize(tensors, {"format": "pt"}))
    return theirs.eval()


def test_dora_over_its_model_is_the_same_model_as_a_lora(tmp_path: Path, capsys: Capture) -> None:
    theirs = saved(tmp_path, peft.LoraConfig(r=2, use_dora=True, target_modules=["q", "up"]))
    out, model = str(tmp_path / "out"), str(tmp_path / "model")
    assert main(["convert", str(tmp_path / "adapter"), out, "--model", model, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["adapter"] == out
    assert said["lost"] < 1e-20
    assert {row["rank"] for row in said["modules"].values()} == {5, 4}
    again = peft.PeftModel.from_pretrained(net(), out).eval()
    for module in INPUTS:
        np.testing.assert_allclose(layer_output(again, module, X[module]), layer_output(theirs, module, X[module]), rtol=1e-9, atol=1e-9)


def test_a_rank_or_an_energy_is_kept_to_and_the_loss_is_shown(tmp_path: Path, capsys: Capture) -> None:
    saved(tmp_path, peft.LoHaConfig(r=3, alpha=4, target_modules=["q", "up"]))
    adapter = str(tmp_path / "adapter")
    assert main(["convert", adapter, str(tmp_path / "one"), "--rank", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["module", "rank", "lost"]
    assert lines[1].split()[:2] == ["layers.0.q", "1"]
    assert 0 < float(lines[1].split()[2].rstrip("%")) < 100
    assert {m.method.r for m in load_adapter(tmp_path / "one").modules.values()} == {1}
    assert main(["convert", adapter, str(tmp_path / "most"), "--energy", "0.9", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert 0 < said["lost"] <= 0.1
    assert said["lost"] == max(row["lost"] for row in said["modules"].values())


def test_a_checkpoint_without_the_live_models_prefix_is_found(tmp_path: Path, capsys: Capture) -> None:
    saved(tmp_path, peft.LoraConfig(r=2, use_dora=True, target_modules=["q"]), head="layers.")
    assert main(["convert", str(tmp_path / "adapter"), str(tmp_path / "out"), "--model", str(tmp_path / "model")]) == 0
    assert "LoRA in" in capsys.readouterr().out


WRONG = {
    "a weight that is missing": (("adapter", "out"), "Give the frozen weight"),
    "no adapter": (("nothing", "out"), "adapter_config.json"),
    "itself": (("adapter", "adapter"), "overwritten"),
    "a rank of zero": (("adapter", "out", "--model", "model", "--rank", "0"), "positive integer"),
    "an energy above one": (("adapter", "out", "--model", "model", "--energy", "2"), "at most 1"),
    "no model": (("adapter", "out", "--model", "adapter"), "model.safetensors"),
    "another method's start": (("adapter", "out", "--initial", "adapter"), "DoRA"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_said_and_nothing_is_written(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    saved(tmp_path, peft.LoraConfig(r=2, use_dora=True, target_modules=["q"]))
    monkeypatch.chdir(tmp_path)
    arguments, message = WRONG[what]
    assert main(["convert", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_prompt_is_no_lora(tmp_path: Path, capsys: Capture) -> None:
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2, "token_dim": 3, "num_layers": 1}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    tensors = serialize({"prompt_embeddings": np.zeros((2, 3), np.float32)}, {"format": "pt"})
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(tensors)
    assert main(["convert", str(tmp_path / "adapter"), str(tmp_path / "out")]) == 2
    assert "changes no layer's weight" in capsys.readouterr().err
