"""Super-Tuning's differences from HF PEFT, run live."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from peft_ref.errors import UnsupportedLayerError  # noqa: E402
from peft_ref.layers import Linear  # noqa: E402
from peft_ref.methods.supertuning import SuperTuning  # noqa: E402

pytestmark = pytest.mark.hf


def layer_with(n_in: int = 5, out: int = 2, **options: Any) -> Any:
    config = peft.SupertuningConfig(target_modules=["0"], **options)
    return peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(n_in, out)), config).base_model.model[0]


def test_supertuning_q1_a_missing_alpha_is_two_r_and_is_saved() -> None:
    assert peft.SupertuningConfig(r=3).to_dict()["lora_alpha"] == 6
    assert SuperTuning(r=3).low_rank_scale == SuperTuning(r=3, lora_alpha=6).low_rank_scale == 2


def test_supertuning_q2_hooks_on_the_wrapped_layer_are_passed_over() -> None:
    layer, called = layer_with(sparsity=0.5), []
    layer.base_layer.register_forward_hook(lambda *given: called.append(given))
    with pytest.warns(UserWarning, match="hooks"):
        layer(torch.randn(3, 5))
    assert not called


def test_supertuning_q3_a_tenth_of_ten_is_nothing() -> None:
    with warnings.catch_warnings(), pytest.raises(ValueError, match="no trainable entries"):
        layer_with(sparsity=0.9)
    with pytest.raises(UnsupportedLayerError, match="leaves no entry"):
        SuperTuning(sparsity=0.9).check_layer(Linear(in_features=5, out_features=2))
    assert len(layer_with(sparsity=0.8).supertuning_values["default"]) == 1
