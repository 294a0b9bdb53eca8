"""Adapters on parameters, as folders and on a graph, beside live PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft_ref.errors import ConfigError, KeyMismatchError, UnsupportedLayerError  # noqa: E402
from peft_ref.files.adapter import load_adapter  # noqa: E402
from peft_ref.files.config import from_dict  # noqa: E402
from peft_ref.graph import TorchGraph  # noqa: E402
from peft_ref.model import adapt  # noqa: E402
from peft_ref.model import load as load_on_layers  # noqa: E402
from peft_ref.model.parameters import add, effective, load, read, save, state_dict  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
nn = torch.nn
BOTH = ["experts.up", "experts.down"]


class Experts(nn.Module):  # type: ignore[misc]  # torch has no types here
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(*((3, 5, 7) if transposed else (3, 7, 5))))
        self.down = nn.Parameter(torch.randn(*((3, 7, 5) if transposed else (3, 5, 7))))
        self.is_transposed = transposed


class Net(nn.Module):  # type: ignore[misc]
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(5, 5), "experts": Experts(transposed)}) for _ in range(2)])


def net(transposed: bool = False) -> Any:
    torch.manual_seed(0)
    return Net(transposed).double()


def transposed_in(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if getattr(module, "is_transposed", False)]


def tuned(model: Any, **options: Any) -> Any:
    said = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": BOTH, **options}
    theirs = peft.get_peft_model(model, peft.LoraConfig(**said))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in theirs.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return theirs


@pytest.mark.parametrize(
    "options", [{}, {"target_modules": ["q"]}, {"rank_pattern": {"up": 3}, "alpha_pattern": {r"layers\.1\.experts\.down": 9}}], ids=str
)
@pytest.mark.parametrize("transposed", [False, True])
def test_what_peft_saved_is_read_merged_and_written_as_there(transposed: bool, options: dict[str, Any], tmp_path: Path) -> None:
    base = net(transposed)
    theirs = tuned(net(transposed), **options)
    theirs.save_pretrained(tmp_path / "theirs")
    graph = TorchGraph(base)
    adapter = load(graph, tmp_path / "theirs", transposed=transposed_in(base))
    assert list(adapter.parameters) == [f"layers.{i}.{name}" for i in range(2) for name in BOTH]
    assert set(adapter.file.modules) == ({"layers.0.q", "layers.1.q"} if "target_modules" in options else set())
    save(tmp_path / "ours", adapter)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    merged = theirs.merge_and_unload()
    for name in adapter.parameters:
        found = effective(graph, [adapter.parameters], name)
        np.testing.assert_allclose(found, merged.get_parameter(name).detach(), rtol=1e-13, atol=1e-13, err_msg=name)
    assert torch.equal(effective(graph, [], BOTH[0].replace("experts", "layers.0.experts")), base.layers[0]["experts"].up)


def test_what_is_made_here_peft_loads(tmp_path: Path) -> None:
    base = net()
    config = from_dict({"peft_type": "LORA", "r": 2, "init_lora_weights": False, "target_modules": [], "target_parameters": BOTH})
    adapter = add(TorchGraph(base), config, np.random.default_rng(0))
    save(tmp_path, adapter)
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path)
    assert {k: tuple(v.shape) for k, v in peft.get_peft_model_state_dict(theirs).items()} == {
        k: tuple(v.shape) for k, v in state_dict(adapter).items()
    }
    merged = theirs.merge_and_unload()
    for name in adapter.parameters:
        expected = merged.get_parameter(name).detach()
        np.testing.assert_allclose(effective(TorchGraph(base), [adapter.parameters], name), expected, rtol=1e-6, atol=1e-7)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    graph = TorchGraph(net())
    tuned(net()).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedLayerError, match=r"peft_ref.model.parameters.load"):
        load_adapter(tmp_path)
    with pytest.raises(UnsupportedLayerError, match=r"peft_ref.model.parameters"):
        load_on_layers(adapt(graph), tmp_path)
    adapter = load(graph, tmp_path)
    fewer = {key: tensor for key, tensor in state_dict(adapter).items() if "layers.0.experts.base_layer" not in key}
    with pytest.raises(KeyMismatchError, match=r"of 'layers.0.experts.up'"):
        read(graph, adapter.file.config, fewer)
    with pytest.raises(KeyMismatchError, match=r"no module 'other'"):
        read(graph, adapter.file.config, {**state_dict(adapter), "base_model.model.other.lora_A.weight": np.zeros((2, 5))})
    said = {"peft_type": "LORA", "target_parameters": BOTH}
    with pytest.raises(ConfigError, match="adapter of their own"):
        add(graph, from_dict({**said, "target_modules": ["q"]}), np.random.default_rng(0))
    with pytest.raises(ConfigError, match="DoRA on parameters"):
        add(graph, from_dict({**said, "use_dora": True, "target_modules": []}), np.random.default_rng(0))
    with pytest.raises(ConfigError, match="lora_dropout"):
        add(graph, from_dict({**said, "lora_dropout": 0.5, "target_modules": []}), np.random.default_rng(0))
