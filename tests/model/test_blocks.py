"""Adapters on MultiheadAttention blocks, as folders and on a graph, beside live PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft_ref.errors import ConfigError, KeyMismatchError, PeftRefError, TargetError  # noqa: E402
from peft_ref.files.adapter import load_adapter  # noqa: E402
from peft_ref.files.config import from_dict  # noqa: E402
from peft_ref.graph import TorchGraph  # noqa: E402
from peft_ref.model.blocks import effective, load, read, save, state_dict  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
nn = torch.nn


def net() -> Any:
    torch.manual_seed(0)
    layers = [nn.ModuleDict({"attn": nn.MultiheadAttention(6, 2), "up": nn.Linear(6, 5)}) for _ in range(2)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers)}).double()


def tuned(**options: Any) -> Any:
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["attn"], **options}))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in theirs.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return theirs


@pytest.mark.parametrize("options", [{}, {"target_modules": ["attn", "up"]}, {"rank_pattern": {r"layers\.1\.attn": 3}}], ids=str)
def test_what_peft_saved_is_read_merged_and_written_as_there(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = tuned(**options)
    theirs.save_pretrained(tmp_path / "theirs")
    graph = TorchGraph(net())
    adapter = load(graph, tmp_path / "theirs")
    assert list(adapter.blocks) == ["layers.0.attn", "layers.1.attn"]
    assert len(adapter.file.modules) == (2 if "target_modules" in options else 0)
    save(tmp_path / "ours", adapter)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    merged = theirs.merge_and_unload()
    for block in adapter.blocks:
        for name in (f"{block}.in_proj_weight", f"{block}.out_proj.weight"):
            found = effective(graph, [adapter.blocks], name)
            np.testing.assert_allclose(found, merged.get_parameter(name).detach(), rtol=1e-13, atol=1e-13, err_msg=name)
            assert torch.equal(effective(graph, [], name), graph.weight(name))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    tuned().save_pretrained(tmp_path)
    graph = TorchGraph(net())
    adapter = load(graph, tmp_path)
    with pytest.raises(PeftRefError, match=r"peft_ref.model.blocks"):
        load_adapter(tmp_path)
    with pytest.raises(KeyMismatchError, match=r"layers.0.attn: lora_A.weight missing"):
        read(graph, adapter.file.config, {k: v for k, v in state_dict(adapter).items() if "layers.0" not in k})
    with pytest.raises(KeyMismatchError, match="no module 'other'"):
        read(graph, adapter.file.config, {**state_dict(adapter), "base_model.model.other.lora_A.weight": np.zeros((2, 5))})
    with pytest.raises(TargetError, match="no in_proj_weight"):
        effective(graph, [], "layers.0.up.weight")
    with pytest.raises(TargetError, match="no MultiheadAttention"):
        read(graph, from_dict({"peft_type": "LORA", "target_modules": ["up"]}), {})
    with pytest.raises(ConfigError, match="DoRA on MultiheadAttention"):
        read(graph, from_dict({"peft_type": "LORA", "use_dora": True, "target_modules": ["attn"]}), {})
