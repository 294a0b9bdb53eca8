"""WaveFT's differences from HF PEFT, run live."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from peft_ref.errors import ConfigError, UnsupportedLayerError  # noqa: E402
from peft_ref.files.adapter import load_adapter  # noqa: E402
from peft_ref.files.config import from_dict  # noqa: E402
from peft_ref.graph import TorchGraph  # noqa: E402
from peft_ref.layers import Linear  # noqa: E402
from peft_ref.methods.waveft import WaveFT  # noqa: E402
from peft_ref.methods.wavelets import LOW_PASS  # noqa: E402
from peft_ref.model import adapt, add, load  # noqa: E402

pytestmark = pytest.mark.hf
RNG = np.random.default_rng(0)


def layer_with(seed: int = 777, family: str = "db1") -> Any:
    config = peft.WaveFTConfig(target_modules=["0"], n_frequency=9, wavelet_family=family, random_loc_seed=seed)
    return peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), config).base_model.model[0]


@pytest.mark.parametrize("family", ["coif5", "db11", "sym20", "coif17"])
def test_waveft_q1_families_that_are_promised_crash_in_forward(family: str) -> None:
    layer = layer_with(family=family)
    with pytest.raises((ValueError, RuntimeError)):
        layer(torch.randn(2, 8))
    with pytest.raises(ConfigError, match="no filter is known"):
        WaveFT(wavelet_family=family)
    assert WaveFT(wavelet_family=family, use_idwt=False).wavelet_family == family


def test_waveft_q1_haar_is_documented_and_refused_by_both() -> None:
    with pytest.raises(ValueError, match="haar"):
        layer_with(family="haar")
    with pytest.raises(ConfigError, match="Haar's wavelet is db1"):
        WaveFT(wavelet_family="haar")


def test_waveft_q2_the_filter_of_coif4_alone_is_no_wavelets_and_is_computed_with() -> None:
    wrong = {name for name, h in LOW_PASS.items() if abs(sum(h) - 2) > 1e-6 or abs(sum(v * v for v in h) - 2) > 1e-6}
    assert wrong == {"coif4"}
    assert sum(LOW_PASS["coif4"]) / math.sqrt(2) == pytest.approx(1.448, abs=1e-3)
    layer, c = layer_with(family="coif4"), np.random.default_rng(0).normal(size=9)
    layer.waveft_spectrum["default"].data = torch.tensor(c)
    method = WaveFT(n_frequency=9, wavelet_family="coif4")
    ours = method.delta(Linear(in_features=8, out_features=6), method.params_type(c)).W
    np.testing.assert_allclose(ours, layer.get_delta_weight("default").detach().numpy(), atol=1e-12)


def test_waveft_q3_the_seed_is_the_only_trace_of_the_places() -> None:
    one, other = layer_with(1), layer_with(2)
    for layer in (one, other):
        layer.waveft_spectrum["default"].data = torch.ones(9)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert not torch.equal(one.get_delta_weight("default"), other.get_delta_weight("default"))


class Three(torch.nn.Module):  # type: ignore[misc]  # torch has no types here
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = torch.nn.Linear(8, 6), torch.nn.Linear(6, 3), torch.nn.Linear(3, 1)

    def forward(self, x: Any) -> Any:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.mark.parametrize("n", [1, 2, 5, 7, 23])
@pytest.mark.parametrize("targets", [["a", "b", "c"], ["b", "a"], ["c"]])
def test_waveft_shares_coefficients_out_as_peft_does_and_reads_its_file(n: int, targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(n)
    base = Three()
    said: dict[str, Any] = {"n_frequency": n, "proportional_parameters": True, "n_frequency_pattern": {"a": 2}, "init_weights": False}
    if n > 3 and targets == ["c"]:
        with pytest.raises(ValueError, match="less than or equal"):
            peft.get_peft_model(base, peft.WaveFTConfig(target_modules=targets, **said))
        with pytest.raises(UnsupportedLayerError, match=f"n_frequency={n} is more than the 3 entries"):
            add(adapt(TorchGraph(Three())), "default", from_dict({"peft_type": "WAVEFT", "target_modules": targets, **said}), RNG)
        return
    frozen = copy.deepcopy(base)
    model = peft.get_peft_model(base, peft.WaveFTConfig(target_modules=targets, **said))
    model.save_pretrained(tmp_path)
    ours = load(adapt(TorchGraph(frozen)), tmp_path)
    fresh = add(adapt(TorchGraph(frozen)), "default", from_dict({"peft_type": "WAVEFT", "target_modules": targets, **said}), RNG)
    for name in targets:
        tuner = model.base_model.model.get_submodule(name)
        method, layer, p = ours.adapters["default"].modules[name]
        assert isinstance(method, WaveFT)
        assert tuner.waveft_spectrum["default"].shape == p.c.shape == fresh.adapters["default"].modules[name].params.c.shape
        assert np.array_equal(tuner.waveft_indices["default"].numpy(), np.stack(method.places(layer)))
        torch.testing.assert_close(method.delta(layer, p).W, tuner.get_delta_weight("default").detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"Pass `layers`"):
        load_adapter(tmp_path)
