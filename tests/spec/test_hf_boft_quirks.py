"""BOFT's quirks, seen in HF PEFT run live, and its several factors, with the definition of PEFT's CUDA kernel in its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch import nn  # noqa: E402

from peft_ref import Adapter, forward, merge, unmerge, vjp  # noqa: E402
from peft_ref.errors import ConfigError, UnsupportedLayerError  # noqa: E402
from peft_ref.files.infer import infer_layer  # noqa: E402
from peft_ref.layers import Conv, Layer, Linear  # noqa: E402
from peft_ref.methods import LoRA  # noqa: E402
from peft_ref.methods.boft import BOFT  # noqa: E402
from peft_ref.stack import BlockDropout  # noqa: E402
from tests.spec.hf_made import disagreement, keys, model, wrapped  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Kernel:
    """Blocks (m, n, b, b) as m block diagonal matrices, and the blocks of such a gradient: what PEFT's CUDA code says it does."""

    @staticmethod
    def forward(blocks: Any) -> list[Any]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    @staticmethod
    def backward(grad: Any, blocks: Any) -> list[Any]:
        b = blocks.shape[2]
        cut = [[factor[k : k + b, k : k + b] for k in range(0, factor.shape[0], b)] for factor in grad]
        return [torch.stack([torch.stack(row) for row in cut])]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", Kernel)


def boft(**options: Any) -> Any:
    return peft.BOFTConfig(target_modules=["l"], **options)


@pytest.mark.parametrize("asked", [0, 1, 2, 5])
def test_boft_q1_without_its_kernel_peft_takes_one_factor_and_keeps_the_configuration(asked: int) -> None:
    made = model(nn.Linear(8, 5), boft(boft_block_size=2, boft_n_butterfly_factor=asked))
    assert keys(made)["boft_R"] == (1, 4, 2, 2)
    assert made.peft_config["a0"].boft_n_butterfly_factor == asked


def test_boft_q1_such_a_file_is_refused_with_what_to_write() -> None:
    made = model(nn.Linear(8, 5), boft(boft_block_size=2, boft_n_butterfly_factor=2))
    tensors = {key: np.zeros(shape) for key, shape in keys(made).items()}
    with pytest.raises(ConfigError, match="boft_R holds 1 factors, and boft_n_butterfly_factor is 2"):
        infer_layer(BOFT(boft_block_size=2, boft_n_butterfly_factor=2), tensors, "l")
    assert infer_layer(BOFT(boft_block_size=2), tensors, "l") == Linear(in_features=8, out_features=5)


SEVERAL: list[tuple[dict[str, int], Layer]] = [
    ({"boft_block_size": 4, "boft_n_butterfly_factor": 2}, Linear(in_features=8, out_features=5)),
    ({"boft_block_size": 2, "boft_n_butterfly_factor": 4}, Linear(in_features=16, out_features=5)),
    ({"boft_block_size": 4, "boft_n_butterfly_factor": 3}, Linear(in_features=32, out_features=3)),
    ({"boft_block_size": 6, "boft_n_butterfly_factor": 2}, Linear(in_features=24, out_features=3)),
    ({"boft_block_size": 0, "boft_block_num": 4, "boft_n_butterfly_factor": 3}, Linear(in_features=24, out_features=3)),
    ({"boft_block_size": 3, "boft_n_butterfly_factor": 1}, Linear(in_features=12, out_features=3)),
    (
        {"boft_block_size": 2, "boft_n_butterfly_factor": 2},
        Conv(in_channels=3, out_channels=5, kernel_size=(2, 2), stride=(2, 2), padding=(1, 1)),
    ),
]


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=0, atol=TOLERANCE * max(1.0, float(want.abs().max())))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize(("options", "layer"), SEVERAL)
def test_boft_q2_several_factors_are_what_peft_computes_with_its_kernel(options: dict[str, int], layer: Layer, adapters: int) -> None:
    if isinstance(layer, Conv):
        module: Any = nn.Conv2d(layer.in_channels, layer.out_channels, 2, stride=2, padding=1)
        x = torch.randn(2, 3, 6, 7, requires_grad=True)
    else:
        module = nn.Linear(layer.shape[1], layer.shape[0])
        x = torch.randn(2, 3, layer.shape[1], requires_grad=True)
    made = model(module, *[boft(**options) for _ in range(adapters)])
    theirs, method, names = wrapped(made), BOFT(**options), [f"a{i}" for i in range(adapters)]
    W, b = layer.fold(theirs.base_layer.weight.detach().numpy().copy()), theirs.base_layer.bias.detach().numpy().copy()
    for name in names:
        theirs.boft_R[name].data = torch.randn_like(theirs.boft_R[name]) / 2
        theirs.boft_R[name].requires_grad_(True)
        theirs.boft_s[name].data = torch.rand_like(theirs.boft_s[name]) + 0.5
        theirs.boft_s[name].requires_grad_(True)
    ours = []
    for name in names:
        tensors = {"boft_R": theirs.boft_R[name].detach().numpy(), "boft_s": theirs.boft_s[name].detach().numpy()}
        ours.append(Adapter(method, method.unpack(layer, tensors)))
    y = made(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    close(forward(layer, W, b, ours, x.detach().numpy()), y)
    grads = vjp(layer, W, b, ours, x.detach().numpy(), dy.numpy())
    close(grads.x, x.grad)
    for name, own in zip(names, grads.params, strict=True):
        packed = method.pack(layer, own)
        close(packed["boft_R"], theirs.boft_R[name].grad)
        close(packed["boft_s"], theirs.boft_s[name].grad)
    made.merge_adapter()
    close(layer.unfold(merge(layer, W, b, ours)[0]), theirs.base_layer.weight)
    other = torch.randn_like(theirs.base_layer.weight)
    theirs.base_layer.weight.data = other.clone()
    made.unmerge_adapter()
    close(layer.unfold(unmerge(layer, layer.fold(other.numpy()), b, ours, W)[0]), theirs.base_layer.weight)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "options", [{"boft_block_size": 2, "boft_n_butterfly_factor": 4}, {"boft_block_size": 3, "boft_n_butterfly_factor": 2}]
)
def test_what_does_not_fit_is_refused_by_both(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"nvalid|even"):
        model(nn.Linear(12, 5), boft(**options))
    with pytest.raises(UnsupportedLayerError, match="12 inputs are not cut"):
        BOFT(**options).check_layer(Linear(in_features=12, out_features=5))


@pytest.mark.parametrize("geometry", [{"dilation": 2}, {"stride": (1, 2)}, {"padding": (0, 2)}])
def test_boft_q3_a_convolutions_forward_is_not_its_merged_layer(geometry: dict[str, Any]) -> None:
    made = model(nn.Conv2d(3, 5, 2, **geometry), boft())
    x = torch.randn(2, 3, 7, 6)
    y = made(x)
    made.merge_adapter()
    assert y.shape != made(x).shape


def test_boft_q4_a_kernel_that_is_not_square_raises() -> None:
    made = model(nn.Conv2d(4, 5, (2, 3)), boft())
    with pytest.raises(RuntimeError):
        made(torch.randn(2, 4, 7, 6))


@pytest.mark.usefixtures("kernel")
def test_boft_q5_a_second_adapter_takes_the_order_from_the_first() -> None:
    alone = model(nn.Linear(8, 5), boft(boft_block_size=2, boft_n_butterfly_factor=3))
    x = torch.randn(2, 8)
    before = alone(x)
    alone.add_adapter("other", boft(boft_block_size=2, boft_n_butterfly_factor=3), autocast_adapter_dtype=False)
    assert torch.equal(alone(x), before)
    alone.add_adapter("more", boft(boft_block_size=4, boft_n_butterfly_factor=1), autocast_adapter_dtype=False)
    try:
        after = alone(x)
    except RuntimeError:
        return
    assert not torch.allclose(after, before)


@pytest.mark.parametrize(("share", "kept"), [(0.2, True), (0.6, False)])
def test_boft_q6_few_blocks_are_never_dropped(share: float, kept: bool) -> None:
    made = model(nn.Linear(8, 5), boft(boft_block_size=2, boft_dropout=share)).eval()
    x = torch.randn(2, 8)
    y = made(x)
    assert bool(torch.allclose(made.train()(x), y)) == kept


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("options", "layer"), SEVERAL[:3])
def test_with_given_blocks_dropped_output_and_gradients_are_pefts(options: dict[str, int], layer: Layer, seed: int) -> None:
    share = 0.6
    made = model(nn.Linear(layer.shape[1], layer.shape[0]), boft(**options, boft_dropout=share)).train()
    theirs, method = wrapped(made), BOFT(**options, boft_dropout=share)
    for parameter in (theirs.boft_R["a0"], theirs.boft_s["a0"]):
        parameter.data = torch.randn_like(parameter) / 2 + 0.5
        parameter.requires_grad_(True)
    W, b = layer.fold(theirs.base_layer.weight.detach().numpy().copy()), theirs.base_layer.bias.detach().numpy().copy()
    p = method.unpack(layer, {"boft_R": theirs.boft_R["a0"].detach().numpy(), "boft_s": theirs.boft_s["a0"].detach().numpy()})
    x = torch.randn(2, 3, layer.shape[1], requires_grad=True)
    torch.manual_seed(seed)
    y = made(x)
    dy = torch.randn_like(y)
    y.backward(dy)

    factors, n = p.R.shape[:2]
    torch.manual_seed(seed)  # PEFT's two draws again: the factor, and the order of ones and zeros
    factor, order = int(torch.randint(0, factors, (1,))), torch.randperm(n).numpy()
    keep = np.ones((factors, n))
    keep[factor, order < int(share * n)] = 0
    assert keep.sum() == factors * n - int(share * n) < keep.size
    ours = [Adapter(method, p, BlockDropout(keep))]
    close(forward(layer, W, b, ours, x.detach().numpy()), y)
    grads = vjp(layer, W, b, ours, x.detach().numpy(), dy.numpy())
    close(grads.x, x.grad)
    close(grads.params[0].R, theirs.boft_R["a0"].grad)
    close(grads.params[0].s.reshape(-1, 1), theirs.boft_s["a0"].grad)
    assert not grads.params[0].R[keep == 0].any()


def test_blocks_that_are_kept_are_drawn_as_peft_draws_them() -> None:
    """All but int(p n) of one factor; over many draws each block of each factor alike."""
    method, layer = BOFT(boft_block_size=2, boft_n_butterfly_factor=3, boft_dropout=0.45), Linear(in_features=16, out_features=3)
    rng, draws = np.random.default_rng(3), 3000
    found = [method.kept_blocks(layer, rng) for _ in range(draws)]
    gone = np.sum([1 - keep for keep in found if keep is not None], axis=0)
    assert all(keep is not None and sorted(np.sum(1 - keep, axis=1)) == [0, 0, 3] for keep in found)
    share = 3 / 8 / 3
    assert np.max(np.abs(gone - share * draws)) < 6 * np.sqrt(draws * share)  # six deviations
    assert BOFT(boft_block_size=2, boft_dropout=0.1).kept_blocks(layer, rng) is None  # BOFT-Q6
    with pytest.raises(ConfigError, match="no blocks that could drop out"):
        forward(layer, np.ones(layer.shape), None, [Adapter(LoRA(r=1), None, BlockDropout(np.ones((1, 1))))], np.ones((2, 16)))


def test_the_merged_layer_is_the_forward_pass() -> None:
    assert disagreement(model(nn.Linear(8, 5), boft()), torch.randn(2, 8)) < 1e-12
