"""Adapters from and to HF's folders: what PEFT saved loads here and the other way round, also lazily; changed weights come along."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.errors import KeyMismatchError, PeftRefError, ShapeError
from peft_ref.files.adapter import open_adapter
from peft_ref.files.safetensors import SafetensorsFile
from peft_ref.graph import TorchGraph
from peft_ref.model.adapted import adapt
from peft_ref.model.attaching import add
from peft_ref.model.lazy import LazyModules
from peft_ref.model.merging import merge
from peft_ref.model.running import forward
from peft_ref.model.storing import load, save
from peft_ref.model.switching import activate
from tests.model.live import INPUTS, config_of, frozen_graph, inputs, layer_output, net, peft, randomise, torch

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
X = inputs()
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["q", "up", "conv", "table"], rank_pattern={"up": 3}, use_rslora=True),
    "all biases and a copy": lambda: peft.LoraConfig(r=2, target_modules=["q"], bias="all", modules_to_save=["head"]),
    "lora_only": lambda: peft.LoraConfig(r=2, target_modules=["q", "up"], bias="lora_only"),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["q", "up", "conv", "table"]),
    "pissa": lambda: peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q", "up"]),
    "olora": lambda: peft.LoraConfig(r=2, init_lora_weights="olora", target_modules=["q", "up"]),
    "ia3": lambda: peft.IA3Config(target_modules=["q", "up", "conv"], feedforward_modules=["up"]),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=4, target_modules=["q", "up", "conv"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["q", "up", "conv"]),
}
EVERY = ["q", "up", "conv", "table"]
FLOAT32 = ("pissa", "olora")  # whose inits PEFT computes in float32, or not at all


def theirs_of(kind: str, name: str) -> Any:
    model = net().float() if kind in FLOAT32 else net()
    theirs = peft.get_peft_model(model, CONFIGS[kind](), adapter_name=name)
    if kind in FLOAT32:
        theirs.base_model.set_adapter(name)
    else:
        randomise(theirs, name, 3)
    for key, parameter in theirs.named_parameters():
        if "bias" in key and parameter.requires_grad:
            parameter.data = parameter.data + 0.25
    return theirs.eval()


def base_of(kind: str) -> Any:
    return net().float() if kind in FLOAT32 else net()


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", ["default", "0"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_peft_saved_computes_here_what_it_computes_there(kind: str, name: str, lazy: bool, tmp_path: Path) -> None:
    theirs = theirs_of(kind, name)
    theirs.save_pretrained(tmp_path)
    ours = load(adapt(frozen_graph(base_of(kind))), tmp_path, name, subfolder=name, lazy=lazy)
    assert isinstance(ours.adapters[name].modules, LazyModules) == lazy
    assert set(ours.adapters[name].saved) == ({"head.weight", "head.bias"} if "copy" in kind else set())
    tolerance = 2e-5 if kind in FLOAT32 else 1e-12
    for module in INPUTS:
        x = X[module].astype(np.float32) if kind in FLOAT32 and module != "table" else X[module]
        np.testing.assert_allclose(forward(ours, module, x), layer_output(theirs, module, x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in FLOAT32])
def test_what_is_saved_here_peft_computes_with(kind: str, tmp_path: Path) -> None:
    theirs = theirs_of(kind, "default")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(adapt(frozen_graph(base_of(kind))), tmp_path / "theirs")
    assert save(ours, tmp_path / "ours") == tmp_path / "ours"
    again = peft.PeftModel.from_pretrained(base_of(kind), tmp_path / "ours").eval()
    for module in INPUTS:
        np.testing.assert_allclose(layer_output(again, module, X[module]), forward(ours, module, X[module]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "loha", "adalora", "lora_only"])
def test_a_file_that_was_read_is_written_back_to_the_byte(kind: str, tmp_path: Path) -> None:
    theirs_of(kind, "default").save_pretrained(tmp_path / "theirs")
    for lazy in (False, True):
        save(load(adapt(frozen_graph(net())), tmp_path / "theirs", lazy=lazy), tmp_path / str(lazy))
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "theirs" / file).read_bytes() == (tmp_path / str(lazy) / file).read_bytes(), file


def test_a_lazy_adapter_reads_a_module_when_it_is_asked_for_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs_of("lora", "default").save_pretrained(tmp_path)
    read: list[str] = []
    whole = SafetensorsFile.read
    monkeypatch.setattr(SafetensorsFile, "read", lambda self, name: (read.append(name), whole(self, name))[1])
    monkeypatch.setattr(SafetensorsFile, "raw", lambda self, name: pytest.fail(f"{name} is read as bytes"))
    ours = load(adapt(frozen_graph(net())), tmp_path, lazy=True)
    ours = activate(ours, "default")
    assert read == []
    ours.active("layers.1.q")
    assert read == [f"base_model.model.layers.1.q.lora_{key}.weight" for key in "AB"]
    merge(ours)
    assert set(read) == set(open_adapter(tmp_path).entries)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_file_for_another_model_is_refused_and_changes_nothing(lazy: bool, tmp_path: Path) -> None:
    theirs_of("lora", "default").save_pretrained(tmp_path)

    def other(**sizes: int) -> Any:
        torch.manual_seed(0)
        return adapt(frozen_graph(torch.nn.ModuleDict({"q": torch.nn.Linear(sizes.get("n_in", 6), 5)}).double()))

    with pytest.raises(KeyMismatchError):
        load(other(), tmp_path, lazy=lazy)
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"q": torch.nn.Linear(7, 5)}) for _ in range(2)])})
    config = peft.LoraConfig(r=2, target_modules=["q"])
    peft.get_peft_model(torch.nn.ModuleDict({"layers": net().layers}), config).save_pretrained(tmp_path / "narrow")
    wide = adapt(frozen_graph(model))
    with pytest.raises(ShapeError):
        load(wide, tmp_path / "narrow", lazy=lazy)
    assert not wide.adapters


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_fresh_adapter_that_takes_a_part_off_the_weight_leaves_the_layers_output(kind: str) -> None:
    graph = frozen_graph(net())
    ours = add(adapt(graph), "a", config_of(CONFIGS[kind]()), np.random.default_rng(0))
    for module in ("layers.0.q", "layers.1.up"):
        assert not np.allclose(ours.weight(f"{module}.weight"), graph.weight(f"{module}.weight"))
        np.testing.assert_allclose(forward(ours, module, X[module]), forward(adapt(graph), module, X[module]), rtol=1e-12, atol=1e-12)


def test_a_live_torch_model_in_bfloat16_is_adapted_merged_and_stored_and_never_written_to(tmp_path: Path) -> None:
    model = net().to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = peft.LoraConfig(r=2, use_dora=True, init_lora_weights=False, target_modules=EVERY, modules_to_save=["head"], bias="all")
    ours = add(adapt(TorchGraph(model)), "a", config_of(config), np.random.default_rng(0))
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    merged = merge(ours, safe=True)
    assert merged.weight("layers.0.q.weight").dtype == torch.bfloat16
    y, z = forward(ours, "layers.0.q", x), forward(merged, "layers.0.q", x)
    assert float((y - z).abs().max()) <= 2**-6 * float(y.abs().max())
    save(ours, tmp_path, "a")
    again = load(adapt(TorchGraph(model)), tmp_path, "b", subfolder="a")
    assert torch.equal(forward(again, "layers.0.q", x), y)
    assert again.weight("head.weight").dtype == torch.bfloat16
    peft.PeftModel.from_pretrained(net().to(torch.bfloat16), tmp_path / "a")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_name_that_is_taken_or_cannot_be_is_refused(tmp_path: Path) -> None:
    theirs_of("lora", "default").save_pretrained(tmp_path)
    ours = load(adapt(frozen_graph(net())), tmp_path)
    for name in ("default", "a.b", ""):
        with pytest.raises(PeftRefError):
            load(ours, tmp_path, name)
    assert list(ours.adapters) == ["default"]
