"""Outputs, every gradient, merge and unmerge equal HF PEFT's in float64."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from peft_ref import stack  # noqa: E402
from peft_ref.contracts import WeightMethod  # noqa: E402
from peft_ref.errors import UnsupportedLayerError  # noqa: E402
from peft_ref.methods import METHODS, AdaLoRA, LoRA  # noqa: E402
from peft_ref.stack import Dropout  # noqa: E402
from tests.hf.peft_layers import INPUTS, LAYERS, Pair, own_facts, pair  # noqa: E402
from tests.methods import facts  # noqa: E402
from tests.methods.widened import widen  # noqa: E402

pytestmark = pytest.mark.hf
TOLERANCE = 1e-12  # relative to the largest number of the array

SETTINGS: dict[str, WeightMethod[Any]] = {
    label: m for name in METHODS.weights if not facts(name).compared for label, m in facts(name).settings.items()
}
CRASHES = {(label, layer) for name in METHODS.weights for label in facts(name).settings for layer in facts(name).crashes}


@pytest.fixture(autouse=True)
def _in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FourierFT computes in the default dtype, and rounds its spectrum and the gradient of that to float32 on the way."""
    widen(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def config(method: WeightMethod[Any], dropout: float = 0.0) -> Any:
    """PEFT's configuration of the same hyper-parameters."""
    cls: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type]
    more = {method.dropout: dropout} if dropout else {}
    return cls(target_modules=["target", "wide"], **{**own_facts(method).peft_options(method), **more})


def supported() -> list[tuple[str, str]]:
    pairs = []
    for name, method in SETTINGS.items():
        for layer_name, layer in LAYERS.items():
            try:
                method.check_layer(layer)
                method.spec(layer)
            except UnsupportedLayerError:
                continue
            if name == "lora-bias" and layer_name == "embedding":
                continue
            if (name, layer_name) not in CRASHES:
                pairs.append((name, layer_name))
    return pairs


def close(got: Any, want: Any) -> None:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.max(np.abs(got - want), initial=0.0) <= TOLERANCE * max(np.max(np.abs(want), initial=0.0), 1.0)


def make(name: str, layer_name: str, adapters: int = 1, bias: bool = True, dropout: float = 0.0) -> tuple[Pair, Any, Any]:
    seed = zlib.crc32(f"{name}{layer_name}{adapters}".encode())
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)  # the frozen weight is torch's
    layer, method = LAYERS[layer_name], SETTINGS[name]
    if adapters > 1 and own_facts(method).alone:
        pytest.skip(f"PEFT takes one {name} on a layer")
    bias = bias and own_facts(method).bias
    configs = [config(method, dropout) for _ in range(adapters)]
    for each in configs:
        if "fan_in_fan_out" in type(each).__dataclass_fields__:
            each.fan_in_fan_out = layer.kind == "transposed_linear"
    for later in configs[1:]:
        later.inference_mode = isinstance(method, AdaLoRA)  # of which PEFT trains one alone
    p = pair(layer, method, configs, rng, bias)
    shape = INPUTS[layer_name]
    x = rng.integers(0, 9, shape) if layer.kind == "embedding" else rng.normal(size=shape)
    y = stack.forward(p.layer, p.W, p.b, p.adapters, x)
    return p, x, rng.normal(size=y.shape)


def check_forward_and_gradients(p: Pair, x: Any, dy: Any) -> None:
    tx = torch.tensor(x)
    if tx.is_floating_point():
        tx.requires_grad_(True)
    y = p.model(tx)
    if own_facts(p.adapters[0].method).chained_backwards(p.layer):
        p = p._replace(adapters=p.adapters[::-1], parameters=p.parameters[::-1])
    y.backward(torch.tensor(dy))
    close(stack.forward(p.layer, p.W, p.b, p.adapters, x), y.detach().numpy())
    grads = stack.vjp(p.layer, p.W, p.b, p.adapters, x, dy)
    if tx.grad is not None:
        close(grads.x, tx.grad.numpy())
    for adapter, own, parameters in zip(p.adapters, grads.params, p.parameters, strict=True):
        for key, value in adapter.method.pack(p.layer, own).items():
            theirs = parameters[key].grad  # None where nothing was computed with it
            close(value.reshape(-1), np.zeros(value.size) if theirs is None else theirs.numpy().reshape(-1))


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize(("name", "layer_name"), supported())
def test_output_and_every_gradient_equal_pefts(name: str, layer_name: str, adapters: int) -> None:
    if adapters > 1 and not own_facts(SETTINGS[name]).several:
        pytest.skip("in PEFT's forward pass the first adapter acts alone")
    check_forward_and_gradients(*make(name, layer_name, adapters))


@pytest.mark.parametrize("name", [n for n, m in SETTINGS.items() if m.dropout])
@pytest.mark.parametrize("layer_name", ["linear", "linear-both", "transposed_linear", "transposed-both", "conv1d", "conv2d"])
@pytest.mark.parametrize("adapters", [1, 2])
def test_dropout_with_a_given_mask_equals_pefts(name: str, layer_name: str, adapters: int) -> None:
    if (name, layer_name) not in supported():
        pytest.skip(f"{name} refuses a {layer_name} layer")
    p, x, dy = make(name, layer_name, adapters, dropout=0.25)
    rng = np.random.default_rng(7)
    masks = [rng.integers(0, 2, x.shape) for _ in p.adapters]

    class Masked(torch.nn.Module):
        def __init__(self, mask: Any) -> None:
            super().__init__()
            self.mask = torch.tensor(mask / 0.75)

        def forward(self, v: Any) -> Any:
            return v * torch.nn.functional.pad(self.mask, (0, v.shape[-1] - self.mask.shape[-1]))  # MiSS drops what it has padded

    for n, mask in enumerate(masks):
        getattr(p.tuner, own_facts(SETTINGS[name]).peft_dropout or str(SETTINGS[name].dropout))[f"a{n}"] = Masked(mask)
    p.model.train()
    dropped = [a._replace(dropout=Dropout(m, 0.25)) for a, m in zip(p.adapters, masks, strict=True)]
    check_forward_and_gradients(p._replace(adapters=dropped), x, dy)


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize(
    ("name", "layer_name"), [s for s in supported() if s[1] != "conv2d-groups" or not s[0].startswith(("lora", "dora", "adalora"))]
)
def test_merge_equals_pefts_and_unmerge_takes_it_back(name: str, layer_name: str, adapters: int) -> None:
    p, _, _ = make(name, layer_name, adapters)
    W, b = stack.merge(p.layer, p.W, p.b, p.adapters)
    p.tuner.merge()
    close(p.layer.unfold(W), p.tuner.base_layer.weight.detach().numpy())
    if b is not None:
        close(b, p.tuner.base_layer.bias.detach().numpy())
    back, b_back = stack.unmerge(p.layer, W, b, p.adapters, p.W, p.b)
    assert np.max(np.abs(back - p.W)) <= TOLERANCE * max(np.max(np.abs(W)), 1.0)  # the merged weight is what was rounded
    if b_back is not None:
        close(b_back, p.b)


@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "lora-bias"])
def test_a_layer_without_bias_equals_pefts(name: str) -> None:
    layer_name = next(layer_name for label, layer_name in supported() if label == name and layer_name.startswith("linear"))
    check_forward_and_gradients(*make(name, layer_name, bias=False))


def test_lora_bias_on_a_layer_without_one_acts_forward_and_cannot_be_merged() -> None:
    from peft_ref.errors import NotMergeableError

    p, x, dy = make("lora-bias", "linear", bias=False)
    check_forward_and_gradients(p, x, dy)
    with pytest.raises(NotMergeableError, match="bias"):
        stack.merge(p.layer, p.W, p.b, p.adapters)
    with pytest.raises(RuntimeError):
        p.tuner.merge()


def test_every_method_is_compared_here() -> None:
    elsewhere = {cls for name, cls in METHODS.weights.items() if facts(name).compared}
    assert {type(m) for m in SETTINGS.values()} == set(METHODS.weights.values()) - elsewhere


@pytest.mark.parametrize("name", sorted({n for n, _ in CRASHES}))
def test_peft_still_crashes_where_we_say_so(name: str) -> None:
    p, x, _ = make(name, "conv2d-dilation")
    with pytest.raises(RuntimeError, match="size of tensor"):
        p.model(torch.tensor(x))


@pytest.mark.parametrize("name", [n for n, m in SETTINGS.items() if isinstance(m, LoRA)])
def test_grouped_convolutions_cannot_be_merged_on_either_side(name: str) -> None:
    from peft_ref.errors import NotMergeableError

    p, _, _ = make(name, "conv2d-groups")
    with pytest.raises(NotMergeableError):
        stack.merge(p.layer, p.W, p.b, p.adapters)
    with pytest.raises(NotImplementedError):
        p.tuner.merge()


def refused() -> list[tuple[str, str]]:
    pairs = []
    for name in SETTINGS:
        for layer_name, layer in LAYERS.items():
            if layer.kind not in SETTINGS[name].kinds and not own_facts(SETTINGS[name]).silent:
                pairs.append((name, layer_name))
    return pairs


@pytest.mark.parametrize(("name", "layer_name"), refused())
def test_a_layer_kind_we_refuse_peft_refuses_too(name: str, layer_name: str) -> None:
    method, layer = SETTINGS[name], LAYERS[layer_name]
    with pytest.raises(UnsupportedLayerError, match=layer.kind):
        method.check_layer(layer)
    with pytest.raises((ValueError, TypeError, NotImplementedError, AttributeError, KeyError, RuntimeError)):
        pair(layer, method, [config(method)], np.random.default_rng(0))
