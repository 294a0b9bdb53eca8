"""Hotswap beside live HF PEFT: same rank and other ranks, fewer modules, its refusals; and padding, which changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.errors import PeftRefError
from peft_ref.files.adapter import load_adapter
from peft_ref.graph import MappingGraph
from peft_ref.layers import Conv
from peft_ref.model.adapted import Adapted, adapt
from peft_ref.model.attaching import add, update
from peft_ref.model.merging import merge
from peft_ref.model.running import forward
from peft_ref.model.storing import load, save
from peft_ref.model.swapping import hotswap, padded
from peft_ref.model.switching import activate
from tests.model.live import INPUTS, config_of, frozen_graph, inputs, layer_output, net, peft, randomise

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
X = inputs()
theirs_module = pytest.importorskip("peft.utils.hotswap")
hotswap_adapter, prepare = theirs_module.hotswap_adapter, theirs_module.prepare_model_for_compiled_hotswap


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["q", "up", "conv"], **options})


NEW: dict[str, Callable[[], Any]] = {
    "same": lambda: lora(),
    "other alpha": lambda: lora(lora_alpha=3),
    "smaller": lambda: lora(r=1),
    "larger": lambda: lora(r=4, lora_alpha=5),
    "fewer modules": lambda: lora(target_modules=["q", "conv"]),
}
REFUSED: dict[str, Callable[[], Any]] = {
    "more modules": lambda: lora(target_modules=["q", "up", "conv", "head"]),
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "dropout": lambda: lora(lora_dropout=0.1),
    "alpha pattern": lambda: lora(alpha_pattern={"q": 3}),
    "ia3": lambda: peft.IA3Config(target_modules=["q"], feedforward_modules=[]),
}


def saved(config: Any, folder: Path, seed: int) -> Any:
    theirs = peft.get_peft_model(net(), config)
    randomise(theirs, "default", seed)
    theirs.save_pretrained(folder)
    return theirs.eval()


def agree(theirs: Any, ours: Adapted) -> None:
    for module in INPUTS:
        np.testing.assert_allclose(forward(ours, module, X[module]), layer_output(theirs, module, X[module]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pad", [None, 4])
@pytest.mark.parametrize("kind", NEW)
def test_a_swapped_adapter_computes_what_it_does_in_peft(kind: str, pad: int | None, tmp_path: Path) -> None:
    theirs = saved(lora(), tmp_path / "old", 0)
    saved(NEW[kind](), tmp_path / "new", 1)
    ours = load(adapt(frozen_graph(net())), tmp_path / "old")
    if pad:
        prepare(theirs, target_rank=pad)
        ours = padded(ours, "default", pad)
        for module, found in ours.adapters["default"].modules.items():
            layer = theirs.base_model.model.get_submodule(module)
            np.testing.assert_array_equal(found.params.A, layer.lora_A["default"].weight.detach().numpy().reshape(pad, -1))
            np.testing.assert_array_equal(found.params.B, layer.lora_B["default"].weight.detach().numpy().reshape(-1, pad))
        agree(theirs, ours)
    hotswap_adapter(theirs, str(tmp_path / "new"), "default", torch_device="cpu")
    ours = hotswap(ours, "default", load_adapter(tmp_path / "new"))
    agree(theirs, ours)
    if pad:
        agree(theirs, padded(ours, "default", pad))


def test_an_adapter_with_a_rank_pattern_computes_what_it_does_when_it_is_loaded(tmp_path: Path) -> None:
    """PEFT gives a module of another rank the scale of the others."""
    theirs = saved(lora(), tmp_path / "old", 0)
    loaded = saved(lora(rank_pattern={"up": 3, "conv": 1}), tmp_path / "new", 1)
    ours = hotswap(load(adapt(frozen_graph(net())), tmp_path / "old"), "default", load_adapter(tmp_path / "new"))
    agree(loaded, ours)
    hotswap_adapter(theirs, str(tmp_path / "new"), "default", torch_device="cpu")
    wrong = layer_output(theirs, "layers.0.up", X["layers.0.up"])
    assert not np.allclose(wrong, layer_output(loaded, "layers.0.up", X["layers.0.up"]))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_peft_refuses_is_refused(kind: str, tmp_path: Path) -> None:
    theirs = saved(lora(), tmp_path / "old", 0)
    saved(REFUSED[kind](), tmp_path / "new", 1)
    ours = load(adapt(frozen_graph(net())), tmp_path / "old")
    with pytest.raises((ValueError, RuntimeError)):
        hotswap_adapter(theirs, str(tmp_path / "new"), "default", torch_device="cpu")
    with pytest.raises(PeftRefError):
        hotswap(ours, "default", load_adapter(tmp_path / "new"))


def test_a_merged_adapter_is_not_swapped(tmp_path: Path) -> None:
    theirs = saved(lora(), tmp_path, 0)
    ours = merge(load(adapt(frozen_graph(net())), tmp_path))
    theirs.merge_adapter()
    with pytest.raises(ValueError):
        hotswap_adapter(theirs, str(tmp_path), "default", torch_device="cpu")
    with pytest.raises(PeftRefError):
        hotswap(ours, "default", load_adapter(tmp_path))


def test_what_is_saved_after_a_swap_is_the_new_adapter(tmp_path: Path) -> None:
    """PEFT saves the new numbers under the old alpha."""
    theirs = saved(lora(), tmp_path / "old", 0)
    saved(lora(lora_alpha=3), tmp_path / "new", 1)
    ours = hotswap(load(adapt(frozen_graph(net())), tmp_path / "old"), "default", load_adapter(tmp_path / "new"))
    save(ours, tmp_path / "ours")
    again = load(adapt(frozen_graph(net())), tmp_path / "ours")
    np.testing.assert_array_equal(forward(again, "layers.0.q", X["layers.0.q"]), forward(ours, "layers.0.q", X["layers.0.q"]))
    hotswap_adapter(theirs, str(tmp_path / "new"), "default", torch_device="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_adapter(tmp_path / "theirs").config.method.lora_alpha == 6  # type: ignore[attr-defined]


@pytest.mark.parametrize("rslora", [False, True])
def test_padding_changes_no_output_and_can_be_saved(rslora: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    conv = Conv(in_channels=4, out_channels=6, kernel_size=(2, 2), groups=2)
    arrays = {"c.weight": rng.normal(size=conv.weight_shape), "q.weight": rng.normal(size=(5, 6))}
    config = config_of(lora(target_modules=["c", "q"], rank_pattern={"q": 3}, alpha_pattern={"c": 4}, use_rslora=rslora))
    model = add(adapt(MappingGraph(arrays=arrays, layers={"c": conv})), "a", config, rng)
    fresh = {module: found.params for module, found in model.adapters["a"].modules.items()}
    model = update(model, "a", {m: p._replace(A=rng.normal(size=p.A.shape), B=rng.normal(size=p.B.shape)) for m, p in fresh.items()})
    wide = padded(model, "a", 6)
    save(wide, tmp_path, "a")
    again = activate(load(adapt(model.base), tmp_path, "a", subfolder="a"), "a")
    for module, x in {"c": rng.normal(size=(2, 4, 5, 5)), "q": rng.normal(size=(3, 6))}.items():
        assert wide.adapters["a"].modules[module].params.A.shape[0] == 6
        for other in (wide, again):
            np.testing.assert_allclose(forward(other, module, x), forward(model, module, x), rtol=1e-12, atol=1e-12)
    with pytest.raises(PeftRefError):
        padded(model, "a", 2)
    with pytest.raises(PeftRefError):
        padded(model, "a", 7)
