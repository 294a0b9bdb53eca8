"""PSOFT's quirks and its files, seen in HF PEFT run live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402

from peft_ref import Adapter, forward  # noqa: E402
from peft_ref.files.adapter import load_adapter, save_adapter  # noqa: E402
from peft_ref.graph import TorchGraph  # noqa: E402
from peft_ref.methods.psoft import PSOFT  # noqa: E402
from peft_ref.model.adapted import adapt  # noqa: E402
from peft_ref.model.storing import load  # noqa: E402
from tests.files.peft_models import assert_same_files  # noqa: E402
from tests.spec.hf_made import keys, wrapped  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]


def psoft(**options: Any) -> Any:
    return peft.PsoftConfig(target_modules=["l"], **{"r": 3, "psoft_alpha": 4, **options})


def model(layer: Any, *configs: Any) -> Any:
    """PEFT's model of one layer in float32, the numbers that it trains drawn."""
    torch.manual_seed(5)
    base = nn.Sequential()
    base.add_module("l", layer)
    made = peft.get_peft_model(base, configs[0], adapter_name="a0")
    for i, config in enumerate(configs[1:], start=1):
        made.add_adapter(f"a{i}", config)
    for name, p in made.named_parameters():
        if "psoft_" in name:
            p.data = torch.randn_like(p) / 4 + (1.0 if "vector" in name else 0.0)
    return made.eval()


def factors(made: Any, name: str = "a0") -> tuple[Any, Any]:
    return wrapped(made)._psoft_A_cache[name].numpy(), wrapped(made)._psoft_B_cache[name].numpy()


def turned(A: Any, B: Any, of: Any) -> Any:
    """A, B with the signs of another A."""
    signs = np.sign(np.sum(A * of, axis=1))
    return A * signs[:, None], B * signs


@pytest.mark.parametrize("start", ["psoft_init", "pissa_init"])
def test_a_and_b_are_pefts_but_for_signs(start: str) -> None:
    made = model(nn.Linear(6, 5), psoft(ab_svd_init=start))
    W = wrapped(made).base_layer.weight.detach().numpy().astype(np.float64)
    A, B = factors(made)
    ours = turned(*PSOFT(r=3, psoft_alpha=4, ab_svd_init=start).parts(W), A)
    np.testing.assert_allclose(ours[0], A, atol=2e-6)
    np.testing.assert_allclose(ours[1], B, atol=2e-6)


def test_psoft_q1_no_file_holds_a_and_b_and_a_sign_is_another_adapter() -> None:
    made = model(nn.Linear(6, 5), psoft())
    assert keys(made) == {"psoft_R.weight": (3,), "psoft_R.vector_a": (3,), "psoft_R.vector_b": (3,)}
    x = torch.randn(4, 6)
    before = made(x)
    wrapped(made)._psoft_A_cache["a0"][1] *= -1
    wrapped(made)._psoft_B_cache["a0"][:, 1] *= -1
    assert not torch.allclose(made(x), before, atol=1e-3)


def test_psoft_q2_a_float64_weight_is_refused() -> None:
    with pytest.raises(TypeError, match="float32"):
        model(nn.Linear(6, 5).double(), psoft())


def test_psoft_q3_lowrank_is_nearly_full() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(6, 5)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    A, B = factors(model(layer, psoft()))
    other = nn.Linear(6, 5)
    other.load_state_dict(state)
    A2, B2 = turned(*factors(model(other, psoft(psoft_svd="lowrank"))), A)
    np.testing.assert_allclose(A2, A, atol=1e-4)
    np.testing.assert_allclose(B2, B, atol=1e-4)


def test_psoft_q4_three_terms_are_four_and_all_turn_one_way() -> None:
    def turn(**options: Any) -> Any:
        made = model(nn.Linear(6, 5), psoft(psoft_mag_a=False, psoft_mag_b=False, **options))
        wrapped(made).psoft_R["a0"].weight.data = torch.tensor([0.1, -0.05, 0.02])
        return wrapped(made).psoft_R["a0"].get_matrix().detach()

    series = [turn(use_cayley_neumann=True, num_cayley_neumann_terms=t) for t in (3, 4, 5)]
    assert torch.equal(series[0], series[1])
    assert not torch.equal(series[1], series[2])
    assert torch.allclose(series[2], turn(), atol=1e-3)  # what Q^5 and the half of Q^4 that is cut off leave


def test_psoft_q5_a_negative_alpha_is_no_number_with_pissa() -> None:
    made = model(nn.Linear(6, 5), psoft(ab_svd_init="pissa_init", psoft_alpha=-4))
    assert bool(made(torch.randn(2, 6)).isnan().all())
    with np.errstate(invalid="ignore"):
        assert np.all(np.isnan(PSOFT(r=3, psoft_alpha=-4, ab_svd_init="pissa_init").parts(np.eye(4))[0]))


class Net(nn.Module):  # type: ignore[misc]  # torch has no types here
    def __init__(self) -> None:
        super().__init__()
        self.q, self.up = nn.Linear(6, 5), nn.Linear(4, 6)


def saved(folder: Path, **options: Any) -> Any:
    """PEFT's model of two layers with an adapter, saved in `folder`."""
    torch.manual_seed(2)
    made = peft.get_peft_model(Net(), peft.PsoftConfig(target_modules=["q", "up"], **{"r": 3, "psoft_alpha": 4, **options}))
    for name, p in made.named_parameters():
        if "psoft_" in name:
            p.data = torch.randn_like(p) / 4 + (1.0 if "vector" in name else 0.0)
    made.save_pretrained(folder)
    return made.eval()


@pytest.mark.parametrize("options", [{}, {"psoft_orth": False}, {"psoft_mag_a": False, "use_cayley_neumann": True}, {"r": 1}])
def test_what_peft_writes_is_written_back_to_the_byte(tmp_path: Path, options: dict[str, Any]) -> None:
    saved(tmp_path / "hf", **options)
    save_adapter(tmp_path / "ours", load_adapter(tmp_path / "hf"))
    assert_same_files(tmp_path / "hf", tmp_path / "ours")


@pytest.mark.parametrize("lazy", [False, True])
def test_a_model_that_reads_a_file_works_a_and_b_out(tmp_path: Path, lazy: bool) -> None:
    """With PEFT's outputs once the signs are PEFT's."""
    made = saved(tmp_path)
    base = Net()
    base.load_state_dict({key: made.base_model.model.state_dict()[key.replace(".", ".base_layer.")] for key in base.state_dict()})
    ours = load(adapt(TorchGraph(base)), tmp_path, lazy=lazy)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    theirs = made.base_model.model.q
    modules = dict(ours.adapters["default"].modules)
    A, B = theirs._psoft_A_cache["default"], theirs._psoft_B_cache["default"]
    p = modules["q"].params
    signs = torch.sign((p.A * A).sum(dim=1))
    np.testing.assert_allclose(p.A * signs[:, None], A, atol=1e-5)
    np.testing.assert_allclose(p.B * signs, B, atol=1e-5)
    turned_back = p._replace(A=p.A * signs[:, None], B=p.B * signs)
    method, layer, _ = modules["q"]
    W, b = base.q.weight.detach(), base.q.bias.detach()
    y = forward(layer, W, b, [Adapter(method, turned_back)], torch.from_numpy(x))
    np.testing.assert_allclose(y.detach(), theirs(torch.from_numpy(x)).detach(), atol=1e-5)
