"""Adapters of BONE, which PEFT has no more: read as MiSS, and written as what PEFT 0.21.2 reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.numpy")

from peft_ref.errors import ConfigError, KeyMismatchError  # noqa: E402
from peft_ref.files.adapter import CONFIG, WEIGHTS, load_adapter, save_adapter  # noqa: E402
from peft_ref.files.config import flatten, from_dict  # noqa: E402
from peft_ref.layers import Linear  # noqa: E402
from peft_ref.methods import MiSS, MiSSBat  # noqa: E402
from peft_ref.stack import Adapter, forward  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
BONE: dict[str, Any] = {"peft_type": "BONE", "r": 2, "target_modules": ["q"], "bias": "none", "task_type": None}


def base() -> Any:
    torch.manual_seed(1)
    return torch.nn.ModuleDict({"q": torch.nn.Linear(6, 8, dtype=torch.float64), "k": torch.nn.Linear(6, 8)})


def folder(path: Path, **words: Any) -> Any:
    """What the PEFT of its time wrote: one block by its old key."""
    path.mkdir()
    (path / CONFIG).write_text(json.dumps({**BONE, **words}, indent=2, sort_keys=True))
    shape = (4, 2, 2) if words.get("init_weights") == "bat" else (2, 8)
    D = np.random.default_rng(3).normal(size=shape)
    safetensors.save_file({"base_model.model.q.bone_block": D}, path / WEIGHTS)
    return D


@pytest.mark.parametrize(("init", "cls"), [(True, MiSS), (False, MiSS), ("bat", MiSSBat)])
def test_it_computes_what_bone_did_and_peft_reads_what_is_written(init: bool | str, cls: type[Any], tmp_path: Path) -> None:
    D = folder(tmp_path / "old", init_weights=init)
    adapter = load_adapter(tmp_path / "old", layers={"q": Linear(in_features=6, out_features=8)})
    module = adapter.modules["q"]
    assert type(module.method) is cls
    np.testing.assert_array_equal(module.params.D, D)

    W, b = (v.detach().numpy() for v in base()["q"].parameters())
    x = np.random.default_rng(4).normal(size=(3, 6))
    if init == "bat":  # W_ac (I + D_a) + D_a, block by block
        rows = [[W[a : a + 2, c : c + 2] @ (np.eye(2) + D[a // 2]) + D[a // 2] for c in (0, 2, 4)] for a in (0, 2, 4, 6)]
        y = x @ np.block(rows).T + b
    else:  # the inputs summed in groups of r, times the block
        y = x @ W.T + b + x.reshape(3, 3, 2).sum(axis=1) @ D
    np.testing.assert_allclose(forward(module.layer, W, b, [Adapter(module.method, module.params)], x), y, rtol=1e-13)

    save_adapter(tmp_path / "new", adapter)
    assert json.loads((tmp_path / "new" / CONFIG).read_text())["peft_type"] == "MISS"
    model = peft.PeftModel.from_pretrained(base(), str(tmp_path / "new"), autocast_adapter_dtype=False)
    with torch.no_grad():
        np.testing.assert_allclose(model.base_model.model["q"](torch.tensor(x)).numpy(), y, rtol=1e-12)


def test_peft_does_not_know_it() -> None:
    with pytest.raises(KeyError, match="BONE"):
        peft.PeftConfig.from_peft_type(**BONE)


def test_a_text_that_bone_took_for_true_is_not_read_as_another_method() -> None:
    with pytest.raises(ConfigError, match="'mini' of BONE, which had no such method"):
        from_dict({**BONE, "init_weights": "mini"})


def test_it_is_written_as_miss_and_keeps_its_words() -> None:
    given = {**BONE, "later": 1, "layers_to_transform": [0], "init_weights": "bat"}
    assert flatten(from_dict(given)).items() >= {**given, "peft_type": "MISS"}.items()


def test_the_old_key_is_no_other_methods(tmp_path: Path) -> None:
    folder(tmp_path / "old")
    (tmp_path / "old" / CONFIG).write_text(json.dumps({**BONE, "peft_type": "LORA"}))
    with pytest.raises(KeyMismatchError, match="bone_block"):
        load_adapter(tmp_path / "old")
