"""LoHa's and LoKr's rank_dropout and module_dropout with a given mask do what PEFT's do with its draw."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft_ref import stack  # noqa: E402
from peft_ref.errors import ConfigError  # noqa: E402
from peft_ref.methods import LoHa, LoHaEffective, LoKr, LoRA  # noqa: E402
from peft_ref.stack import RowDropout  # noqa: E402
from tests.hf.peft_layers import INPUTS, LAYERS, own_facts, pair  # noqa: E402
from tests.hf.test_layers import check_forward_and_gradients, close  # noqa: E402

pytestmark = pytest.mark.hf
METHODS = {
    "loha": LoHa(r=4, alpha=6),
    "loha-effective": LoHaEffective(r=4, alpha=6),
    "lokr": LoKr(r=2, alpha=3, decompose_factor=2),
}


def in_training(monkeypatch: pytest.MonkeyPatch, method: Any, layer: Any, rows: list[Any], module: list[float], **words: Any) -> Any:
    """PEFT's layer in training, whose draws are these: for every adapter whether it acts, then which rows."""
    cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type]
    configs = [cls(target_modules=["target"], **{**own_facts(method).peft_options(method), **words}) for _ in rows]
    p = pair(layer, method, configs, np.random.default_rng(5))
    p.model.train()
    draws = [torch.tensor(d) for acts, mask in zip(module, rows, strict=True) for d in ([acts], *([mask] if acts else []))]
    monkeypatch.setattr(torch, "rand", lambda *shape: draws.pop(0).reshape(shape))
    return p


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("layer_name", ["linear-both", "conv1d-both", "conv2d-both"])
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_of_the_delta_drop_out_for_all_inputs_alike(name: str, layer_name: str, scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, method, rng = LAYERS[layer_name], METHODS[name], np.random.default_rng(6)
    words = {"rank_dropout_scale": scaled} if name == "lokr" else {}
    masks = [rng.permutation(np.arange(layer.shape[0]) % 2).astype(float) for _ in range(2)]  # half of them, so that 1 / mean is exact
    p = in_training(monkeypatch, method, layer, masks, [1.0, 1.0], rank_dropout=0.5, **words)
    drops = [RowDropout.of(mask, scaled=scaled or name != "lokr") for mask in masks]
    dropped = p._replace(adapters=[a._replace(dropout=d) for a, d in zip(p.adapters, drops, strict=True)])
    x = rng.normal(size=INPUTS[layer_name])
    dy = rng.normal(size=stack.forward(layer, p.W, p.b, p.adapters, x).shape)
    check_forward_and_gradients(dropped, x, dy)


def test_a_module_that_drops_out_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LAYERS["linear-both"]
    p = in_training(monkeypatch, METHODS["lokr"], layer, [[], []], [0.0, 1.0], module_dropout=0.5)
    monkeypatch.setattr(torch, "rand", lambda *shape, draws=[0.0, 1.0]: torch.tensor([draws.pop(0)]))
    adapters = [p.adapters[0]._replace(dropout=RowDropout(np.zeros(12))), p.adapters[1]]
    x = np.random.default_rng(6).normal(size=INPUTS["linear-both"])
    with torch.no_grad():
        close(stack.forward(layer, p.W, p.b, adapters, x), p.model(torch.tensor(x)).numpy())


def test_of_no_row_it_is_no_number_as_with_peft() -> None:
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore")
        assert np.all(np.isnan(RowDropout.of(np.zeros(3), scaled=True).factors))
    np.testing.assert_array_equal(RowDropout.of(np.zeros(3), scaled=False).factors, np.zeros(3))


def test_a_low_rank_path_has_no_rows() -> None:
    layer, method = LAYERS["linear"], LoRA(r=2)
    p = method.init(layer, np.zeros(layer.shape), np.random.default_rng(1)).params
    adapters = [stack.Adapter(method, p, RowDropout(np.ones(7)))]
    with pytest.raises(ConfigError, match="forms no delta whose rows"):
        stack.forward(layer, np.zeros(layer.shape), None, adapters, np.zeros((1, 5)))
