"""LoftQ in eight bits beside PEFT's: with a stand-in for bitsandbytes everywhere, with bitsandbytes' own kernels where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft_ref.files.adapter import load_adapter, save_adapter  # noqa: E402
from peft_ref.graph import TorchGraph  # noqa: E402
from peft_ref.layers import Linear  # noqa: E402
from peft_ref.methods import LoRA  # noqa: E402
from peft_ref.methods.loftq_init import LoftQ, int8, loftq, nf4  # noqa: E402
from peft_ref.model import adapt, load  # noqa: E402
from tests.hf.quantisers import factors, stand_in, without_a_gpu  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
nn = torch.nn
LAYER, METHOD = Linear(in_features=24, out_features=17), LoRA(r=3, lora_alpha=6)


class Int8Params:
    """The row's multiple that is nearest, by trying all of them."""

    def __init__(self, data: Any, **options: Any) -> None:
        assert options == {"requires_grad": False}
        assert data.dtype == torch.float32
        halves = data.half().double()
        self.SCB = halves.abs().amax(dim=1)
        k = torch.arange(-127, 128, dtype=torch.float64)
        grid = self.SCB[:, None] * k / 127
        self.data = k[(halves[:, :, None] - grid[:, None, :]).abs().argmin(dim=2)].to(torch.int8)

    def to(self, device: Any) -> Int8Params:
        return self


@pytest.fixture(params=["stand-in", "bitsandbytes"])
def quantiser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    without_a_gpu(monkeypatch)
    if request.param == "stand-in":
        widened = {"int8_vectorwise_dequant": lambda data, SCB: data * SCB[:, None].float() / 127}
        stand_in(monkeypatch, {"Int8Params": Int8Params}, widened)
    return str(request.param)


def fresh(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.ModuleDict({"q": nn.Linear(24, 17)})


def config(iterations: int, bits: int = 8) -> Any:
    quantised = peft.LoftQConfig(loftq_bits=bits, loftq_iter=iterations)
    return peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q"], init_lora_weights="loftq", loftq_config=quantised)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_loftq_alternates_as_peft_does(quantiser: str, iterations: int) -> None:
    """PEFT subtracts and decomposes in float32, which is off by a few roundings of W's largest numbers."""
    model = fresh()
    W = model["q"].weight.detach().double().numpy().copy()
    theirs = peft.get_peft_model(model, config(iterations))
    start = loftq(METHOD, LAYER, W, LoftQ(loftq_bits=8, loftq_iter=iterations))
    A, B = factors(theirs, "q")
    quantised = theirs.base_model.model.q.base_layer.weight.detach().double().numpy()
    rounding = 2.0**-24 * np.abs(W).max()
    np.testing.assert_allclose(start.W, quantised, rtol=0, atol=2 * rounding)
    np.testing.assert_allclose(start.params.B @ start.params.A, B @ A, rtol=0, atol=8 * rounding)
    signs = np.sign(np.sum(start.params.A * A, axis=1))
    sizes = np.abs(A).max(), np.abs(B).max()
    for ours, there, size in zip((start.params.A * signs[:, None], start.params.B * signs), (A, B), sizes, strict=True):
        np.testing.assert_allclose(ours, there, rtol=0, atol=1e-4 * size)
    assert np.abs(B @ A).max() > 1e3 * rounding  # what is compared is far from lost in them


def test_an_adapter_of_eight_bits_goes_into_a_folder_and_comes_back(quantiser: str, tmp_path: Path) -> None:
    """Whoever loads it quantises the weight again, PEFT and this alike."""
    peft.get_peft_model(fresh(), config(2)).save_pretrained(tmp_path / "theirs")
    theirs = peft.PeftModel.from_pretrained(fresh(), str(tmp_path / "theirs")).eval()
    save_adapter(tmp_path / "ours", load_adapter(tmp_path / "theirs"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["loftq_config"] == {"loftq_bits": 8, "loftq_iter": 2}
    plain = fresh()
    model = load(adapt(TorchGraph(plain)), tmp_path / "ours")
    x = torch.randn(5, 24)
    p = next(iter(model.adapters.values())).modules["q"].params
    W = model.weight("q.weight") + 2 * p.B @ p.A
    np.testing.assert_allclose(
        nn.functional.linear(x, W, plain["q"].bias).detach(), theirs.base_model.model["q"](x).detach(), rtol=1e-5, atol=1e-5
    )
    assert torch.linalg.vector_norm(plain["q"].weight - model.weight("q.weight")) > 0


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.02, 1.0, 1e3])
def test_bitsandbytes_rounds_every_number_to_the_same_integer(size: float) -> None:
    """In 2^17 numbers many are half of their row's largest: 63.5 of its 127ths, which the rounding of 127 / m sends up or down."""
    bnb = pytest.importorskip("bitsandbytes")
    W = (np.random.default_rng(0).normal(size=(256, 512)) * size).astype(np.float32)
    theirs = bnb.nn.Int8Params(torch.from_numpy(W), requires_grad=False).to("cpu")
    k, m = theirs.data.numpy().astype(np.float64), theirs.SCB.double().numpy()[:, None]
    for ours in (int8(W).astype(np.float64), int8(W.astype(np.float64))):
        np.testing.assert_array_equal(np.rint(127 * ours / m), k)
    widened = bnb.functional.int8_vectorwise_dequant(theirs.data, theirs.SCB).numpy()
    np.testing.assert_allclose(int8(W), widened, rtol=2.0**-22, atol=0)  # a product and a quotient here, two products there
    assert np.sum(2 * np.abs(W.astype(np.float16)).astype(np.float64) == m) > 5


def test_bitsandbytes_makes_nan_of_what_half_precision_cannot_hold() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    theirs = bnb.nn.Int8Params(torch.tensor([[1.0, 65520.0], [0.0, 0.0]]), requires_grad=False).to("cpu")
    widened = bnb.functional.int8_vectorwise_dequant(theirs.data, theirs.SCB)
    assert widened[0].isnan().all()
    assert not widened[1].any()


def test_bitsandbytes_four_bits_are_nf4(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    without_a_gpu(monkeypatch)
    model = fresh()
    W = model["q"].weight.detach().numpy().copy()
    theirs = peft.get_peft_model(model, config(1, bits=4))
    np.testing.assert_allclose(nf4(W), theirs.base_model.model.q.base_layer.weight.detach(), rtol=2.0**-22, atol=0)
