"""Methods whose layers share something, or are given their part in turn: merged beside PEFT on layers of several sizes and blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.checkpoints.plan import Source
from peft_ref.checkpoints.planning import plan
from tests.checkpoints.beside_peft import carried_out, gpt2, llama, made, merged_by_peft, peft, quietly, saved_adapter, saved_base

pytestmark = pytest.mark.hf
OF_LLAMA, OF_GPT2 = ["q_proj", "o_proj", "up_proj", "down_proj"], ["c_attn", "c_fc"]
CONFIGS: dict[str, Callable[[list[str]], Any]] = {
    "tinylora": lambda targets: peft.TinyLoraConfig(r=2, u=8, target_modules=targets),
    "tinylora in groups": lambda targets: peft.TinyLoraConfig(r=2, u=8, weight_tying=0.5, target_modules=targets),
    "tinylora drawn again": lambda targets: peft.TinyLoraConfig(r=2, u=8, save_projection=False, target_modules=targets),
    "unilora": lambda targets: peft.UniLoraConfig(r=2, theta_d_length=64, target_modules=targets),
    "vera drawn again": lambda targets: peft.VeraConfig(r=4, save_projection=False, target_modules=targets),
    "pvera drawn again": lambda targets: peft.PveraConfig(r=4, save_projection=False, target_modules=targets),
    "randlora": lambda targets: peft.RandLoraConfig(r=8, save_projection=True, target_modules=targets),
    "randlora drawn again": lambda targets: peft.RandLoraConfig(r=8, save_projection=False, target_modules=targets),
    "vblora": lambda targets: peft.VBLoRAConfig(r=4, num_vectors=8, vector_length=16, topk=2, target_modules=targets),
    "frod": lambda targets: peft.FrodConfig(target_modules=targets),
}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_gets_its_own_part(name: str, architecture: str, tmp_path: Path) -> None:
    make, targets = (llama, OF_LLAMA) if architecture == "llama" else (gpt2, OF_GPT2)
    with quietly():
        model = made(make, "F32")
        base = saved_base(model, tmp_path / "base")
        adapter = saved_adapter(model, CONFIGS[name](targets), tmp_path / "adapter")
        expected = merged_by_peft(model, [adapter])
    found, changed = carried_out(plan(base, [Source(adapter)])), 0
    for key, array in found.items():
        there = next(k for k in (key, f"transformer.{key}") if k in expected)
        np.testing.assert_allclose(array, expected[there], rtol=0, atol=2**-17 * np.max(np.abs(expected[there])), err_msg=key)
        changed += not np.array_equal(array, model.state_dict()[there].numpy())
    assert changed == 2 * len(targets)
