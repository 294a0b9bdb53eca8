"""Fresh adapters: what is drawn has PEFT's law, what is computed from the weight has PEFT's numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from peft_ref.methods import DoRA, LoRA  # noqa: E402
from tests.hf.peft_layers import LAYERS, torch_layer  # noqa: E402

pytestmark = pytest.mark.hf


class Model(torch.nn.Module):
    def __init__(self, target: Any) -> None:
        super().__init__()
        self.target = target


def peft_start(layer_name: str, **options: Any) -> tuple[np.ndarray[Any, Any], dict[str, Any], Any]:
    """The frozen weight before, PEFT's fresh tensors, and the frozen weight after. PiSSA and OLoRA want float32."""
    torch.manual_seed(1)
    model = Model(torch_layer(LAYERS[layer_name], True))
    before = model.target.weight.detach().numpy().astype(np.float64)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["target"], r=4, lora_alpha=6, **options))
    saved = {k.rpartition("target.")[2]: v.numpy() for k, v in peft.get_peft_model_state_dict(wrapped).items()}
    return before, saved, wrapped.base_model.model.target.base_layer.weight.detach().numpy()


@pytest.mark.parametrize("layer_name", ["linear", "transposed_linear"])
def test_pissa_takes_the_same_part_out_of_the_weight(layer_name: str) -> None:
    before, saved, after = peft_start(layer_name, init_lora_weights="pissa")
    layer, method = LAYERS[layer_name], LoRA(r=4, lora_alpha=6, init_lora_weights="pissa")
    start = method.init(layer, layer.fold(before), np.random.default_rng(0))
    p = start.params
    np.testing.assert_allclose(p.B @ p.A, saved["lora_B.weight"] @ saved["lora_A.weight"], atol=2e-6)
    np.testing.assert_allclose(np.abs(p.A), np.abs(saved["lora_A.weight"]), atol=2e-5)  # signs are free
    np.testing.assert_allclose(layer.unfold(start.W), after, atol=2e-6)


def test_olora_takes_the_same_part_out_of_the_weight() -> None:
    before, saved, after = peft_start("linear", init_lora_weights="olora")
    start = LoRA(r=4, lora_alpha=6, init_lora_weights="olora").init(LAYERS["linear"], before, np.random.default_rng(0))
    p = start.params
    np.testing.assert_allclose(p.B @ p.A, saved["lora_B.weight"] @ saved["lora_A.weight"], atol=2e-6)
    np.testing.assert_allclose(np.abs(p.B), np.abs(saved["lora_B.weight"]), atol=2e-5)
    np.testing.assert_allclose(start.W, after, atol=2e-6)


@pytest.mark.parametrize("layer_name", ["linear", "embedding", "conv1d", "conv2d"])
def test_doras_magnitude_starts_at_pefts(layer_name: str) -> None:
    before, saved, _ = peft_start(layer_name, use_dora=True)
    layer = LAYERS[layer_name]
    start = DoRA(r=4, lora_alpha=6).init(layer, layer.fold(before), np.random.default_rng(0))
    want = saved["lora_magnitude_vector"]
    # The fresh delta is zero on both sides, so the magnitude is that of the weight alone.
    np.testing.assert_allclose(DoRA(r=4).pack(layer, start.params)["lora_magnitude_vector"], want, rtol=1e-6)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "bias": {"lora_bias": True},
    "bias-false": {"lora_bias": True, "init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "false": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


STARTS = [
    (layer_name, option)
    for layer_name in ("linear", "embedding", "conv2d", "conv2d-groups")
    for option in OPTIONS
    # Of a convolution PEFT takes no orthogonal start, of an embedding neither that nor a bias.
    if not (option == "orthogonal" and layer_name != "linear") and not (option.startswith("bias") and layer_name == "embedding")
]


@pytest.mark.parametrize(("layer_name", "option"), STARTS)
def test_drawn_tensors_are_zero_where_pefts_are_and_spread_alike(layer_name: str, option: str) -> None:
    layer = LAYERS[layer_name]
    method = LoRA(r=4, lora_alpha=6, **OPTIONS[option])
    rng = np.random.default_rng(3)
    ours: dict[str, list[Any]] = {}
    theirs: dict[str, list[Any]] = {}
    for seed in range(60):
        torch.manual_seed(seed)
        model = peft.get_peft_model(
            Model(torch_layer(layer, True)), peft.LoraConfig(target_modules=["target"], r=4, lora_alpha=6, **OPTIONS[option])
        )
        for key, value in peft.get_peft_model_state_dict(model).items():
            theirs.setdefault(key.rpartition("target.")[2], []).append(value.numpy())
        W = layer.fold(rng.normal(size=layer.weight_shape))
        for key, value in method.pack(layer, method.init(layer, W, rng).params).items():
            ours.setdefault(key, []).append(value)
    assert ours.keys() == theirs.keys()
    for key in ours:
        a, b = np.stack(ours[key]), np.stack(theirs[key])
        assert a.shape == b.shape
        assert np.any(a) == np.any(b)
        if np.any(b):
            assert np.std(a) == pytest.approx(np.std(b), rel=0.15)
            assert np.max(np.abs(a)) == pytest.approx(np.max(np.abs(b)), rel=0.35)
