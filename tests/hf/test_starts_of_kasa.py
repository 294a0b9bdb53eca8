"""KaSA's starts: what LoRA's start leaves of the frozen weight has its smallest singular values cut off, as in PEFT."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft_ref.layers import Linear  # noqa: E402
from peft_ref.methods import KaSA  # noqa: E402

pytestmark = pytest.mark.hf


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "pissa", "olora"])
def test_the_frozen_weight_and_what_follows_from_it_are_pefts(init: Any) -> None:
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"q": torch.nn.Linear(6, 5)})
    W = base["q"].weight.detach().double().numpy().copy()
    said = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q"], init_lora_weights=init, kasa_config=peft.KasaConfig())
    theirs = peft.get_peft_model(base, said).base_model.model["q"]
    start = KaSA(r=2, lora_alpha=6, init_lora_weights=init).init(Linear(in_features=6, out_features=5), W, np.random.default_rng(0))
    np.testing.assert_allclose(start.W, theirs.base_layer.weight.detach(), rtol=0, atol=2e-6)  # PEFT decomposes in float32
    ours = start.params.B @ start.params.A
    if init in ("pissa", "olora"):
        product = theirs.lora_B["default"].weight.detach() @ theirs.lora_A["default"].weight.detach()
        np.testing.assert_allclose(ours, product, rtol=0, atol=2e-6)
