"""What PEFT does otherwise with state that all layers share, live."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from peft_ref.errors import KeyMismatchError  # noqa: E402
from peft_ref.files.adapter import load_adapter  # noqa: E402
from peft_ref.layers import Linear  # noqa: E402
from peft_ref.model import adapt, add, load, state_dict  # noqa: E402
from tests.model.live import config_of, frozen_graph  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
WIDE, NARROW = ["narrow", "wide"], ["narrow"]


class Two(torch.nn.Module):  # type: ignore[misc]  # torch has no types here
    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = torch.nn.Linear(6, 5), torch.nn.Linear(9, 7)

    def forward(self, x: Any) -> Any:
        return self.narrow(x)


def vera(targets: list[str], **options: Any) -> Any:
    return peft.VeraConfig(**{"r": 3, "target_modules": targets, **options})


def of(model: Any, name: str, key: str) -> Any:
    return peft.get_peft_model_state_dict(model, adapter_name=name)[f"base_model.{key}"]


def test_vera_q1_a_later_adapter_is_given_the_first_ones_matrices(tmp_path: Path) -> None:
    model = peft.get_peft_model(Two(), vera(WIDE), adapter_name="a")
    model.add_adapter("b", vera(NARROW))
    alone = peft.get_peft_model(Two(), vera(NARROW))
    assert torch.equal(of(model, "b", "vera_A"), of(model, "a", "vera_A"))
    assert of(model, "b", "vera_A").shape == (3, 9)
    assert of(alone, "default", "vera_A").shape == (3, 6)
    model.add_adapter("c", vera(NARROW, r=2))
    model.set_adapter("c")
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(torch.zeros(1, 6))
    alone.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(str(tmp_path), "d")
    ours = adapt(frozen_graph(Two()))
    ours = add(add(ours, "a", config_of(vera(WIDE)), np.random.default_rng(0)), "b", config_of(vera(NARROW)), np.random.default_rng(0))
    np.testing.assert_array_equal(state_dict(ours, "b")["base_model.vera_A"], of(alone, "default", "vera_A").numpy())
    assert load(ours, tmp_path, "d").attached("d").modules["narrow"].params.A.shape == (3, 6)


def test_vera_q2_matrices_in_a_file_that_says_it_has_none_are_read_over(tmp_path: Path) -> None:
    saved = peft.get_peft_model(Two(), vera(WIDE))
    saved.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "save_projection": False, "projection_prng_key": 9}))
    read = peft.PeftModel.from_pretrained(Two(), str(tmp_path))
    assert not torch.equal(read.base_model.vera_A["default"], saved.base_model.vera_A["default"])
    layers = {"narrow": Linear(in_features=6, out_features=5), "wide": Linear(in_features=9, out_features=7)}
    with pytest.raises(KeyMismatchError, match="vera_A is there, and the configuration says that it is not saved"):
        load_adapter(tmp_path, layers=layers)
