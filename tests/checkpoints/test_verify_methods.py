"""`verify` on merges by HF PEFT of many methods, all right; and on merges of other methods than LoRA made wrong by hand, each told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_ref.checkpoints.plan import Source
from peft_ref.checkpoints.planning import plan
from peft_ref.checkpoints.verifying import verify
from tests.checkpoints.beside_peft import DTYPES, llama, made, merged_by_peft, peft, saved_adapter, saved_base, torch

from safetensors.torch import load_file, save_file  # isort: skip

pytestmark = pytest.mark.hf
TARGETS = ["q_proj", "up_proj"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=TARGETS),
    "pissa": lambda: peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=TARGETS),
    "modules_to_save": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, total_step=10, lora_alpha=6, target_modules=TARGETS),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=4, alpha=6, target_modules=TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["up_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=TARGETS, use_cayley_neumann=False),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["q_proj"]),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=TARGETS),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=50, target_modules=TARGETS),
    "miss": lambda: peft.MissConfig(r=4, target_modules=TARGETS),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_merges_is_right(name: str, dtype: str, tmp_path: Path) -> None:
    base, adapter = prepared(name, dtype, tmp_path)
    report = verify(plan(base, [Source(adapter)]), tmp_path / "merged")
    assert {v.status for v in report.verdicts} == {"right"}, [v for v in report.verdicts if v.status != "right"]
    assert sum(v.reason != "untouched" for v in report.verdicts) >= 2


def dora_over_the_wrong_axis(W: Any, t: dict[str, Any]) -> Any:
    V = W + 6 / 4 * t["lora_B.weight"] @ t["lora_A.weight"]
    return t["lora_magnitude_vector"][:, None] * V / V.norm(dim=0, keepdim=True) if W.shape[0] == W.shape[1] else None


def ia3_on_the_other_side(W: Any, t: dict[str, Any]) -> Any:
    return W * t["ia3_l"].reshape(1, -1) if t["ia3_l"].numel() == W.shape[1] == W.shape[0] else None


def oft_turned_the_other_way(W: Any, t: dict[str, Any]) -> Any:
    skew = torch.zeros(t["oft_R.weight"].shape[0], 8, 8, dtype=W.dtype)
    rows, columns = torch.triu_indices(8, 8, 1)
    skew[:, rows, columns] = t["oft_R.weight"]
    skew = skew - skew.mT
    eye = torch.eye(8, dtype=W.dtype)
    R = torch.block_diag(*((eye + skew) @ torch.linalg.inv(eye - skew)))
    return W @ R.mT


WRONG = {
    "dora": (dora_over_the_wrong_axis, "norm-wrong-axis"),
    "ia3": (ia3_on_the_other_side, "ia3-output-side"),
    "oft": (oft_turned_the_other_way, "turned-backwards"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_merge_of_it_is_told_by_its_name(name: str, tmp_path: Path) -> None:
    base, adapter = prepared(name, "F32", tmp_path)
    change, mistake = WRONG[name]
    merged, tensors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    right = load_file(tmp_path / "merged" / "model.safetensors")
    for module in {key.partition("_proj.")[0] + "_proj" for key in tensors}:
        key = module.removeprefix("base_model.model.") + ".weight"
        own = {k.removeprefix(module + "."): t.double() for k, t in tensors.items() if k.startswith(module + ".")}
        made_wrong = change(merged[key].double(), own)
        merged[key] = right[key] if made_wrong is None else made_wrong.float().contiguous()
    save_file(merged, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    report = verify(plan(base, [Source(adapter)]), tmp_path / "merged")
    (diagnosis,) = report.diagnoses
    assert mistake in diagnosis.mistakes, diagnosis.text


def prepared(name: str, dtype: str, folder: Path) -> tuple[Path, Path]:
    """A base, an adapter on it, and in `merged` what PEFT merges of them."""
    model = made(llama, dtype)
    base = saved_base(model, folder / "base")
    adapter = saved_adapter(model, CONFIGS[name](), folder / "adapter")
    shutil.copytree(base, folder / "merged")
    merged = merged_by_peft(model, [adapter])
    names = load_file(base / "model.safetensors")
    tensors = {
        k: torch.from_numpy(v.view("int16")).view(torch.bfloat16) if dtype == "BF16" else torch.from_numpy(v) for k, v in merged.items()
    }
    save_file({k: tensors[k].contiguous() for k in names}, folder / "merged" / "model.safetensors", metadata={"format": "pt"})
    return base, adapter
