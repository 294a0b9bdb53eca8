"""OSF's quirks and its files, seen in HF PEFT run live."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from peft_ref.errors import UnsupportedLayerError  # noqa: E402
from peft_ref.files.adapter import load_adapter, save_adapter  # noqa: E402
from peft_ref.files.config import from_dict  # noqa: E402
from peft_ref.graph import TorchGraph  # noqa: E402
from peft_ref.layers import Embedding, Linear  # noqa: E402
from peft_ref.methods.osf import OSF  # noqa: E402
from peft_ref.model.adapted import adapt  # noqa: E402
from peft_ref.model.running import forward  # noqa: E402
from peft_ref.model.storing import load  # noqa: E402
from tests.files.peft_models import assert_same_files  # noqa: E402
from tests.spec.hf_made import keys, model, wrapped  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


def osf(**options: Any) -> Any:
    return peft.OSFConfig(target_modules=["l"], **options)


@pytest.mark.parametrize("sizes", [(6, 5), (5, 6), (5, 5)])
def test_the_frozen_parts_are_pefts_but_for_signs(sizes: tuple[int, int]) -> None:
    made = model(nn.Linear(*sizes), osf(effective_rank=2))
    theirs, W = wrapped(made), wrapped(made).base_layer.weight.detach().numpy()
    layer = Linear(in_features=sizes[0], out_features=sizes[1])
    p = OSF(effective_rank=2).init(layer, W, np.random.default_rng(0)).params
    U, S, V = (part["a0"].numpy() for part in (theirs._osf_U_low_init, theirs._osf_S_low_init, theirs._osf_V_low_init))
    np.testing.assert_allclose(p.U_0 * p.S_0 @ p.V_0, U * S @ V, atol=1e-6)
    np.testing.assert_allclose(p.U_0 @ p.U_0.T, U @ U.T, atol=1e-5)
    assert (p.U_high is None, p.V_high is None) == ("a0" not in theirs._osf_U_high, "a0" not in theirs._osf_V_high)
    if p.U_high is not None:
        np.testing.assert_allclose(p.U_high @ p.U_high.T, theirs._osf_U_high["a0"] @ theirs._osf_U_high["a0"].T, atol=1e-5)
    if p.V_high is not None:
        np.testing.assert_allclose(p.V_high.T @ p.V_high, theirs._osf_V_high["a0"].T @ theirs._osf_V_high["a0"], atol=1e-5)


def test_osf_q1_the_first_adapter_acts_alone_and_all_are_merged() -> None:
    made = model(nn.Linear(6, 5), osf(effective_rank=2), osf(effective_rank=3))
    for part in wrapped(made).osf_svd_params["a1"].values():
        part.data = torch.randn_like(part)
    x = torch.randn(3, 6, dtype=torch.float64)
    y = made(x)
    W = wrapped(made).base_layer.weight.detach().clone()
    deltas = [wrapped(made).get_delta_weight(name).detach() for name in ("a0", "a1")]
    made.base_model.set_adapter(["a0"])
    assert torch.equal(made(x), y)
    made.base_model.set_adapter(["a0", "a1"])
    wrapped(made).merge()
    assert torch.allclose(wrapped(made).base_layer.weight, W + deltas[0] + deltas[1])


def test_osf_q2_there_is_no_unmerging() -> None:
    made = model(nn.Linear(6, 5), osf())
    wrapped(made).merge()
    merged = wrapped(made).base_layer.weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped(made).unmerge()
    assert any("does not support unmerging" in str(w.message) for w in caught)
    assert torch.equal(wrapped(made).base_layer.weight, merged)
    assert wrapped(made).merged
    with pytest.raises(NotImplementedError):
        made.unmerge_adapter()


@pytest.mark.parametrize("layer", [nn.Embedding(9, 6), nn.Conv1d(3, 5, 3), nn.Conv2d(3, 5, 2), nn.Conv3d(2, 3, 2), Conv1D(5, 6)], ids=str)
def test_osf_q3_a_layer_that_it_does_not_take_is_passed_over(layer: Any) -> None:
    base = nn.Sequential()
    base.add_module("l", layer)
    made = peft.get_peft_model(base, osf())
    assert wrapped(made) is layer
    assert peft.get_peft_model_state_dict(made) == {}


@pytest.mark.parametrize("layer", [Embedding(num_embeddings=9, embedding_dim=6), Linear(in_features=6, out_features=5, transposed=True)])
def test_osf_q3_here_it_is_refused(layer: Any) -> None:
    with pytest.raises(UnsupportedLayerError):
        OSF().check_layer(layer)


def test_osf_q4_no_file_holds_the_frozen_parts() -> None:
    made = model(nn.Linear(6, 5), osf(effective_rank=2))
    assert keys(made) == {"osf_svd_params.U_low": (5, 3), "osf_svd_params.S_low": (3,), "osf_svd_params.V_low": (3, 6)}


def test_osf_q5_the_decomposition_is_one_in_float32() -> None:
    made = model(nn.Linear(6, 5), osf(effective_rank=2))
    U = wrapped(made)._osf_U_low_init["a0"]
    assert U.dtype == torch.float64
    off = float((U.T @ U - torch.eye(3)).abs().max())
    assert 1e-12 < off < 1e-5


def test_osf_q6_without_targets_it_takes_all_linear_layers() -> None:
    base = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    made = peft.get_peft_model(base, peft.OSFConfig())
    assert sorted(made.base_model.targeted_module_names) == ["0", "2"]


class Net(nn.Module):  # type: ignore[misc]  # torch has no types here
    def __init__(self) -> None:
        super().__init__()
        self.q, self.up, self.square = nn.Linear(6, 5), nn.Linear(4, 7), nn.Linear(5, 5)


NAMES = ["q", "up", "square"]


def saved(folder: Path, **options: Any) -> Any:
    """PEFT's model of three layers with an adapter whose every number is moved, saved in `folder`."""
    made = peft.get_peft_model(Net(), peft.OSFConfig(target_modules=NAMES, **options))
    for name, p in made.named_parameters():
        if "osf_" in name:
            p.data = p.data + torch.randn_like(p) / 4
    made.save_pretrained(folder)
    return made.eval()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"effective_rank": 1},
    {"effective_rank": 0.8},
    {"effective_rank": 2, "rank_pattern": {"u": 3}},
    {"rank_pattern": {"q$": 1, "are": 4}},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_what_peft_writes_is_written_back_to_the_byte(tmp_path: Path, options: dict[str, Any]) -> None:
    saved(tmp_path / "hf", **options)
    save_adapter(tmp_path / "ours", load_adapter(tmp_path / "hf"))
    assert_same_files(tmp_path / "hf", tmp_path / "ours")


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_model_that_reads_a_file_computes_the_same(tmp_path: Path, options: dict[str, Any], lazy: bool) -> None:
    made = saved(tmp_path, **options)
    base, state = Net(), made.base_model.model.state_dict()
    base.load_state_dict({key: state[key.replace(".", ".base_layer.")] for key in base.state_dict()})
    ours = load(adapt(TorchGraph(base)), tmp_path, lazy=lazy)
    for name in NAMES:
        x = torch.randn(4, getattr(base, name).in_features)
        theirs = made.base_model.model.get_submodule(name)
        np.testing.assert_allclose(forward(ours, name, x).detach(), theirs(x).detach(), atol=2e-5, err_msg=name)


def test_a_pattern_is_searched_for_anywhere_in_the_name() -> None:
    config = from_dict({"peft_type": "OSF", "effective_rank": 2, "rank_pattern": {"layers.1": 3, "q": 0.5}, "target_modules": ["q"]})
    asked = ("model.layers.1.q", "model.layers.2.q", "model.layers.2.v")
    assert [config.method_for(name).effective_rank for name in asked] == [3, 0.5, 2]  # type: ignore[attr-defined]  # OSF's
