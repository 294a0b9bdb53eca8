"""Buffers of modules_to_save beside live PEFT: running numbers are copied, stored, read and come back, and count as no parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.files.safetensors import open_file
from peft_ref.model import adapt, add, count, load, merge_and_unload, save, unload
from tests.model.live import config_of, frozen_graph, peft, torch

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]


class Normed(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.q, self.norm = torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5)
        self.norm.register_buffer("worked_out", torch.ones(2), persistent=False)

    def forward(self, x: Any) -> Any:
        return self.norm(self.q(x))


def made() -> Any:
    torch.manual_seed(3)
    model = Normed().eval()
    model.norm.running_mean.normal_()
    model.norm.num_batches_tracked.fill_(7)
    return model


def lora() -> Any:
    return peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["norm"])


def test_files_either_way(tmp_path: Path) -> None:
    graph, theirs = frozen_graph(made()), peft.get_peft_model(made(), lora())
    theirs.base_model.model.norm.modules_to_save["default"].running_mean.fill_(0.25)
    theirs.save_pretrained(tmp_path / "theirs")
    fresh = add(adapt(graph), "default", config_of(theirs.peft_config["default"]), np.random.default_rng(0))
    assert set(fresh.attached("default").saved) == {
        f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    np.testing.assert_array_equal(fresh.attached("default").saved["norm.running_mean"], graph.buffers()["norm.running_mean"])
    assert count(fresh) == theirs.get_nb_trainable_parameters()
    ours = load(adapt(graph), tmp_path / "theirs")
    np.testing.assert_array_equal(ours.weight("norm.running_mean"), np.full(5, 0.25, np.float32))
    save(ours, tmp_path / "ours")
    a, b = (open_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert a.entries.keys() == b.entries.keys()
    for key in a.entries:
        assert a.tensor(key).dtype == b.tensor(key).dtype, key
        np.testing.assert_array_equal(a.tensor(key), b.tensor(key), err_msg=key)
    again = peft.PeftModel.from_pretrained(made(), tmp_path / "ours")
    assert float(again.base_model.model.norm.running_mean[0]) == 0.25
    np.testing.assert_array_equal(merge_and_unload(ours).weight("norm.weight"), ours.weight("norm.weight"))


@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_what_is_unloaded_keeps_the_buffers_that_were_trained(how: str, tmp_path: Path) -> None:
    graph, theirs = frozen_graph(made()), peft.get_peft_model(made(), lora())
    copy = theirs.base_model.model.norm.modules_to_save["default"]
    copy.running_mean.fill_(0.25)
    copy.num_batches_tracked.fill_(11)
    theirs.save_pretrained(tmp_path)
    ours = load(adapt(graph), tmp_path)
    bare, left = {"unload": unload, "merge_and_unload": merge_and_unload}[how](ours), getattr(theirs, how)()
    assert bare.buffers().keys() == graph.buffers().keys()
    for name, buffer in bare.buffers().items():
        np.testing.assert_array_equal(buffer, left.get_buffer(name).numpy(), err_msg=name)
    assert graph.buffers()["norm.num_batches_tracked"] == 7
    again = add(bare, "next", config_of(peft.get_peft_model(left, lora()).peft_config["default"]), np.random.default_rng(0))
    np.testing.assert_array_equal(again.attached("next").saved["norm.running_mean"], np.full(5, 0.25, np.float32))
