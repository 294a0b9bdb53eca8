"""Conversions under PEFT's names, beside PEFT: any adapter as a LoRA, and a pissa adapter as a plain LoRA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from peft_ref import hf
from peft_ref.errors import PeftRefError
from peft_ref.files.adapter import load_adapter
from tests.hf_api.sides import bases
from tests.hf_api.test_differences import IDS, LORA

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
TARGETS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def test_a_converted_model_computes_what_the_adapter_did(tmp_path: Path) -> None:
    base = bases("llama")[1]
    model = hf.get_peft_model(base, hf.LoHaConfig(r=2, alpha=3, init_weights=False, **TARGETS))
    config, tensors = hf.convert_to_lora(model, 4)
    assert config.r <= 4
    assert tensors
    hf.save_as_lora(tmp_path, model, 1.0)
    again = hf.PeftModel.from_pretrained(base, tmp_path)
    np.testing.assert_allclose(again(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-4)
    with pytest.raises(PeftRefError, match="progressbar"):
        hf.convert_to_lora(model, 2, progressbar=True)


def test_a_pissa_adapter_is_saved_for_the_weight_as_it_was(tmp_path: Path) -> None:
    base = bases("llama")[1]
    model = hf.get_peft_model(base, hf.LoraConfig(**{**LORA, "init_lora_weights": "pissa"}))
    model.save_pretrained(tmp_path / "start")
    written = (tmp_path / "start" / "adapter_config.json").read_bytes()
    rng = np.random.default_rng(0)
    trained = {key: value + rng.normal(size=value.shape) * 0.01 for key, value in hf.get_peft_model_state_dict(model).items()}
    hf.set_peft_model_state_dict(model, trained)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert (tmp_path / "start" / "adapter_config.json").read_bytes() == written
    assert load_adapter(tmp_path / "plain").config.method.init_lora_weights is True  # type: ignore[attr-defined]
    again = hf.PeftModel.from_pretrained(base, tmp_path / "plain")
    np.testing.assert_allclose(again(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-4)
