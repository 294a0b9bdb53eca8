"""LoftQ beside PEFT's, and its four bits beside another way of rounding to them."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft_ref.errors import ConfigError, UnsupportedLayerError  # noqa: E402
from peft_ref.files.config import from_dict  # noqa: E402
from peft_ref.graph import TorchGraph  # noqa: E402
from peft_ref.layers import Conv, Embedding, Linear  # noqa: E402
from peft_ref.methods import LoRA  # noqa: E402
from peft_ref.methods.loftq_init import LEVELS, LoftQ, correct, loftq, loftq_of, nf4  # noqa: E402
from peft_ref.model import adapt, add  # noqa: E402
from tests.hf.quantisers import factors, stand_in, without_a_gpu  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
nn = torch.nn


def test_the_levels_are_quantiles_of_the_normal_distribution() -> None:
    normal = statistics.NormalDist()
    largest = 0.9677083  # the highest probability that QLoRA's table goes to
    above = [normal.inv_cdf(p) for p in np.linspace(largest, 0.5, 9)[:-1]]
    below = [-normal.inv_cdf(p) for p in np.linspace(largest, 0.5, 8)[:-1]]
    expected = np.sort([0.0, *above, *below]) / max(above)
    np.testing.assert_allclose(LEVELS, expected, atol=1e-7)


def independent_nf4(W: Any) -> Any:
    flat = W.flatten()
    out = flat.clone()
    levels = torch.tensor(LEVELS, dtype=W.dtype)
    for begin in range(0, flat.numel(), 64):
        block = flat[begin : begin + 64]
        top = block.abs().max()
        out[begin : begin + 64] = levels[(block[:, None] / top - levels[None, :]).abs().argmin(dim=1)] * top
    return out.reshape(W.shape)


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's LoftQ without a GPU: a stand-in for bitsandbytes that rounds to the nearest level, block by block."""

    class Params4bit:
        def __init__(self, data: Any, **options: Any) -> None:
            assert options == {"requires_grad": False, "compress_statistics": False, "quant_type": "nf4"}
            self.data, self.quant_state = data, None

        def to(self, device: str) -> Params4bit:
            return self

    without_a_gpu(monkeypatch)
    stand_in(monkeypatch, {"Params4bit": Params4bit}, {"dequantize_4bit": lambda data, state: independent_nf4(data)})


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.usefixtures("bitsandbytes")
def test_loftq_alternates_as_peft_does(iterations: int) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"q": nn.Linear(24, 17)})
    W = model["q"].weight.detach().double().numpy().copy()
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q"], init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_iter=iterations)
    )
    theirs = peft.get_peft_model(model, config)
    layer = Linear(in_features=24, out_features=17)
    start = loftq(LoRA(r=3, lora_alpha=6), layer, W, LoftQ(loftq_iter=iterations))
    A, B = factors(theirs, "q")
    quantised = theirs.base_model.model.q.base_layer.weight.detach().double().numpy()
    np.testing.assert_allclose(start.W, quantised, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(start.params.B @ start.params.A, B @ A, rtol=1e-4, atol=1e-6)
    left = np.linalg.norm(W - start.W - start.params.B @ start.params.A)
    assert left < 0.9 * np.linalg.norm(W - start.W)  # without the scale, which is 2: what PEFT leaves out
    assert np.linalg.norm(W - start.W - 2 * start.params.B @ start.params.A) > left


@pytest.mark.usefixtures("bitsandbytes")
def test_loftq_of_a_dora_has_the_lengths_of_the_corrected_rows() -> None:
    torch.manual_seed(0)
    plain = nn.ModuleDict({"q": nn.Linear(24, 17)})
    W = plain["q"].weight.detach().double()
    said = {"r": 3, "lora_alpha": 6, "target_modules": ["q"], "init_lora_weights": "loftq", "use_dora": True}
    ours = from_dict({"peft_type": "LORA", **said, "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}})
    torch.manual_seed(0)
    model = add(adapt(TorchGraph(nn.ModuleDict({"q": nn.Linear(24, 17)}).double())), "a", ours, np.random.default_rng(0))
    theirs = peft.get_peft_model(plain, peft.LoraConfig(**said, loftq_config=peft.LoftQConfig(loftq_iter=1)))
    p = model.adapters["a"].modules["q"].params
    m = theirs.base_model.model.q.lora_magnitude_vector["default"].weight.detach().double()
    np.testing.assert_allclose(p.m, m, rtol=1e-5)
    np.testing.assert_allclose(p.m, torch.linalg.vector_norm(model.weight("q.weight") + 2 * p.B @ p.A, dim=1), rtol=1e-12)
    assert torch.linalg.vector_norm(W - model.weight("q.weight")) > 0


@pytest.mark.usefixtures("bitsandbytes")
def test_pefts_factors_of_a_conv1d_do_not_fit_it() -> None:
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    config = peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights="loftq", loftq_config=peft.LoftQConfig())
    theirs = peft.get_peft_model(nn.ModuleDict({"q": conv1d(5, 8)}), config)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        theirs.base_model.model["q"](torch.randn(3, 8))


def test_four_bits_are_the_nearest_levels_block_by_block_in_stored_order() -> None:
    W = np.random.default_rng(0).normal(size=(7, 30))
    np.testing.assert_array_equal(nf4(W), independent_nf4(torch.from_numpy(W)).numpy())
    assert nf4(np.zeros((3, 3))).tolist() == np.zeros((3, 3)).tolist()
    np.testing.assert_allclose(nf4(nf4(W)), nf4(W), rtol=1e-15)
    stored = Linear(in_features=30, out_features=7, transposed=True)
    start = loftq(LoRA(r=2), stored, W, LoftQ())
    np.testing.assert_array_equal(start.W, nf4(np.ascontiguousarray(W.T)).T)


def test_what_loftq_cannot_is_refused() -> None:
    W = np.ones((2, 3))
    for kind, ask in {
        "loftq_bits=3": lambda: LoftQ(loftq_bits=3),
        "loftq_iter=0": lambda: LoftQ(loftq_iter=0),
        "It has loftq_bits": lambda: loftq_of({"bits": 4}),
        "embedding": lambda: correct(LoRA(r=1), Embedding(num_embeddings=3, embedding_dim=2), W, W),
        "conv1d": lambda: loftq(LoRA(r=1), Conv(in_channels=3, out_channels=2, kernel_size=(1,)), W, LoftQ()),
        "has 2 ranks": lambda: correct(LoRA(r=3), Linear(in_features=3, out_features=2), W, W),
    }.items():
        with pytest.raises((ConfigError, UnsupportedLayerError), match=kind):
            ask()
    assert loftq_of(None) == LoftQ()
    assert correct(LoRA(r=2), Linear(in_features=3, out_features=2), W, 2 * W).B.shape == (2, 2)


def test_a_block_of_zeros_is_not_divided_by_its_largest_number_and_halfway_is_the_lower_level() -> None:
    """As bitsandbytes, which goes up where a number is above the middle of two levels."""
    with np.errstate(all="raise"):
        assert not np.any(nf4(np.zeros(70)))
        assert not np.any(nf4(np.concat([np.ones(64), np.zeros(64)]))[64:])
    halfway = (np.asarray(LEVELS[1:]) + np.asarray(LEVELS[:-1])) / 2
    np.testing.assert_array_equal(nf4(np.array([1.0, *halfway]))[1:], LEVELS[:-1])


def test_loftq_needs_no_data_and_quantises_again_where_it_is_added() -> None:
    graph = TorchGraph(nn.ModuleDict({"q": nn.Linear(8, 6)}).double())
    said = {"peft_type": "LORA", "r": 2, "init_lora_weights": "loftq", "target_modules": ["q"]}
    config = from_dict({**said, "loftq_config": {"loftq_bits": 4, "loftq_iter": 2}})
    model = add(adapt(graph), "a", config, np.random.default_rng(0))
    W = graph.weight("q.weight").numpy()
    expected = loftq(LoRA(r=2), Linear(in_features=8, out_features=6), W, LoftQ(loftq_iter=2))
    np.testing.assert_allclose(model.weight("q.weight").numpy(), expected.W, rtol=1e-12)
