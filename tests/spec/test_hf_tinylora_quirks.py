"""What PEFT does otherwise with TinyLoRA, live."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from safetensors.torch import load_file, save_file  # noqa: E402

from peft_ref.files.adapter import WEIGHTS, load_adapter  # noqa: E402
from peft_ref.methods.tinylora import TinyLoRA, projections  # noqa: E402
from peft_ref.model import adapt, add, load, state_dict  # noqa: E402
from tests.files.peft_models import Net  # noqa: E402
from tests.model.live import config_of, frozen_graph  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
Q0, UP1, TABLE = "layers.0.q", "layers.1.up", "table"


def config(*targets: str, **options: Any) -> Any:
    return peft.TinyLoraConfig(**{"r": 2, "u": 3, "target_modules": list(targets), **options})


def fresh(model: Any, name: str, peft_config: Any) -> Any:
    return add(model, name, config_of(peft_config), np.random.default_rng(0))


def P_of(model: Any, module: str, adapter: str = "default") -> Any:
    return model.base_model.model.get_submodule(module).tinylora_P[adapter]


def test_a_p_of_sixteen_numbers_and_more_is_torchs_to_a_rounding() -> None:
    model = peft.get_peft_model(Net(), config("q", "up", r=3, u=5))
    for place, module in enumerate(("layers.0.q", "layers.0.up", "layers.1.q", "layers.1.up")):
        np.testing.assert_allclose(projections(42 + place, 5, 3), P_of(model, module).numpy(), rtol=0, atol=1e-6)


def test_tinylora_q1_a_later_adapter_is_seeded_by_the_first_ones_places() -> None:
    model = peft.get_peft_model(Net(), config("q", "up"), adapter_name="a")
    model.add_adapter("b", config(UP1))
    alone = peft.get_peft_model(Net(), config(UP1))
    assert torch.equal(P_of(model, UP1, "b"), P_of(model, UP1, "a"))
    assert not torch.equal(P_of(model, UP1, "b"), P_of(alone, UP1))
    ours = fresh(fresh(adapt(frozen_graph(Net())), "a", config("q", "up")), "b", config(UP1))
    np.testing.assert_array_equal(state_dict(ours, "b")[f"base_model.model.{UP1}.tinylora_P"], P_of(alone, UP1).numpy())


def test_tinylora_q2_without_init_weights_v_is_whatever_was_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def full_of_sevens(*size: Any, **options: Any) -> Any:
        return torch.full(size, 7.0) if size == (3,) and "dtype" in options else empty(*size, **options)

    monkeypatch.setattr(torch, "empty", full_of_sevens)
    for said in (False, "magic"):
        model = peft.get_peft_model(Net(), config(Q0, init_weights=said))
        assert torch.equal(model.base_model.tinylora_v["default"]["0"], torch.full((3,), 7.0))
    ours = state_dict(fresh(adapt(frozen_graph(Net())), "a", config(Q0, init_weights=False)), "a")["base_model.tinylora_v.0"]
    assert np.all(np.abs(ours) <= 0.02)
    assert np.any(ours != 0)


def test_tinylora_q3_dropout_reaches_a_tables_rows_of_b() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), config(TABLE, tinylora_dropout=0.5, init_weights="uniform", init_v_bound=1.0))
    table, ids = model.base_model.model.get_submodule(TABLE), torch.tensor([4])
    model.eval()
    whole = table(ids) - table.base_layer(ids)
    model.train()
    drawn = {tuple((table(ids) - table.base_layer(ids)).detach().reshape(-1).tolist()) for _ in range(40)}
    R, rows = table._compute_R("default"), table.tinylora_B["default"][4]
    made = [(2 * rows * torch.tensor(mask) @ R @ table.tinylora_A["default"]) for mask in ([1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0])]
    assert len(drawn) == 4
    for numbers in drawn:
        assert any(torch.allclose(torch.tensor(numbers), m.reshape(-1), atol=1e-6) for m in made)
    assert torch.allclose(whole.reshape(-1), (made[1] + made[2]).reshape(-1) / 2, atol=1e-6)


def test_tinylora_q4_an_adapter_called_0_loses_the_number_of_its_group(tmp_path: Path) -> None:
    model = peft.get_peft_model(Net(), config(Q0), adapter_name="0")
    tensors = peft.get_peft_model_state_dict(model, adapter_name="0")
    assert "base_model.tinylora_v" in tensors
    assert "base_model.tinylora_v.0" not in tensors
    ours = state_dict(fresh(adapt(frozen_graph(Net())), "0", config(Q0)), "0")
    assert "base_model.tinylora_v.0" in ours
    with torch.no_grad():
        model.base_model.tinylora_v["0"]["0"].fill_(5.0)
    model.save_pretrained(tmp_path)
    read = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "0"))
    assert not torch.any(read.base_model.tinylora_v["default"]["0"] == 5.0)


def test_tinylora_q5_a_p_that_is_not_to_be_saved_is_read_over_but_for_a_tables(tmp_path: Path) -> None:
    model = peft.get_peft_model(Net(), config(Q0, TABLE))
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**said, "save_projection": False}))
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({k: v + 1 if "tinylora_P" in k else v for k, v in tensors.items()}, tmp_path / WEIGHTS, {"format": "pt"})
    read = peft.PeftModel.from_pretrained(Net(), str(tmp_path))
    assert torch.equal(P_of(read, Q0), P_of(model, Q0))
    assert torch.equal(P_of(read, TABLE), P_of(model, TABLE) + 1)
    ours = load(adapt(frozen_graph(Net())), tmp_path).attached("default").modules
    for module in (Q0, TABLE):
        np.testing.assert_array_equal(ours[module].params.P, (P_of(model, module) + 1).numpy())
    assert isinstance(load_adapter(tmp_path).config.method, TinyLoRA)
