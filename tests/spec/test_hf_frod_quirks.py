"""FRoD's files and what PEFT does otherwise with it, live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from peft.tuners.frod.model import _category_from_key, _layer_index_from_key, _projection_from_weights  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from peft_ref import hf  # noqa: E402
from peft_ref.files.adapter import WEIGHTS  # noqa: E402
from peft_ref.hf.mapping import adapted_of  # noqa: E402
from peft_ref.methods.frod_basis import basis, block_of, categories, category_of, places  # noqa: E402
from peft_ref.model import adapt, add, forward, load, state_dict  # noqa: E402
from tests.files.peft_models import Net  # noqa: E402
from tests.model.live import config_of, frozen_graph  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
Q0 = "layers.0.q"
NAMES = [
    "classifier",
    "classifier.dense",
    "h.0.up",
    "model.layers.11.self_attn.q_proj",
    "bert.encoder.layer.3.attention.output.dense",
    "bert.encoder.layer.3.output.dense",
    "output.dense",
    "layers.x.q",
    "a.layers",
    "h.7.layers.3.q",
    "h.7.layers.3.9.q",
    "h.7.layers.x.5.q",
    "h.7.layers.x.q",
    "layers.q.2",
]


def config(**options: Any) -> Any:
    return peft.FrodConfig(**{"sparse_rate": 0.2, "target_modules": ["q"], "progressbar": False, **options})


def trained(model: Any) -> Any:
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    return model.eval()


def base(seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return Net().eval()


def fresh(model: Any, name: str, peft_config: Any) -> Any:
    return add(model, name, config_of(peft_config), np.random.default_rng(0))


def output(model: Any, x: Any) -> Any:
    return model.base_model.model.get_submodule(Q0)(x).detach()


@pytest.mark.parametrize("name", NAMES)
def test_a_modules_category_and_block_are_pefts(name: str) -> None:
    assert category_of(name) == _category_from_key(name)
    assert block_of(name, 77) == _layer_index_from_key(name, 77)


def test_of_two_modules_in_blocks_of_one_number_the_later_ones_weight_is_read() -> None:
    twice = ["encoder.layers.1.q.p", "encoder.layers.0.q.p", "decoder.layers.0.q.p"]
    (found,) = categories(twice).values()
    assert found.modules == tuple(twice)
    assert found.read == ("decoder.layers.0.q.p", "encoder.layers.1.q.p")


@pytest.mark.parametrize(("out", "layers"), [(9, 3), (5, 2), (4, 1)])
def test_v_is_pefts_but_for_signs(out: int, layers: int) -> None:
    """Where no two eigenvalues are equal; of a wide weight the vectors that it does not have are free."""
    weights = [np.random.default_rng(i).normal(size=(out, 5)).astype(np.float32) for i in range(layers)]
    ours, theirs = basis(weights, 1e-3), _projection_from_weights([torch.tensor(w) for w in weights], 1e-3).numpy()
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-4)


def test_places_are_drawn_for_all_categories_in_turn() -> None:
    model = peft.get_peft_model(base(), config(target_modules=["q", "up", "head"], projection_prng_key=5, sparse_rate=0.5))
    found = {c: held["default"].numpy() for c, held in model.base_model.frod_s_indices.items()}
    sizes = {"q": 6, "up": 6, "head": 10}
    counts = {c: held.shape[1] for c, held in found.items()}
    assert counts == {"q": 18, "up": 18, "head": 50}
    for category, drawn in places(sizes, counts, 5).items():
        np.testing.assert_array_equal(drawn, found[category])


def test_frod_q1_u_stays_that_of_pefts_own_v(tmp_path: Path) -> None:
    model, x = trained(peft.get_peft_model(base(), config(sparse_rate=0.0))), torch.randn(3, 6)
    model.save_pretrained(tmp_path)
    right = output(model, x)
    assert torch.allclose(output(peft.PeftModel.from_pretrained(base(), str(tmp_path)), x), right, atol=1e-5)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.frod_V.q"][:, 2] *= -1  # the same adapter: U's column turns with it
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    assert not torch.allclose(output(peft.PeftModel.from_pretrained(base(), str(tmp_path)), x), right, atol=0.1)
    ours = load(adapt(frozen_graph(base())), tmp_path)
    np.testing.assert_allclose(forward(ours, Q0, x.numpy()), right.numpy(), atol=1e-4)
    renumbered = hf.get_peft_model(frozen_graph(base()), hf.FrodConfig(sparse_rate=0.0, target_modules=["q"]))
    hf.set_peft_model_state_dict(renumbered, {key: value.numpy() for key, value in tensors.items()})
    np.testing.assert_allclose(forward(adapted_of(renumbered), Q0, x.numpy()), right.numpy(), atol=1e-4)


def test_frod_q2_a_later_adapter_is_given_the_first_ones_basis_and_places() -> None:
    model = peft.get_peft_model(base(), config(), adapter_name="a")
    model.add_adapter("b", config(sparse_rate=0.5, regularization_alpha=0.5))
    held = model.base_model.frod_s_indices["q"]
    assert torch.equal(held["a"], held["b"])
    assert held["b"].shape == (2, 7)
    assert torch.equal(model.base_model.frod_V["q"]["a"], model.base_model.frod_V["q"]["b"])
    ours = fresh(fresh(adapt(frozen_graph(base())), "a", config()), "b", config(sparse_rate=0.5))
    assert state_dict(ours, "b")["base_model.frod_s_indices.q"].shape == (2, 18)


def test_frod_q3_unmerging_puts_a_copy_back() -> None:
    tuner = trained(peft.get_peft_model(base(), config())).base_model.model.get_submodule(Q0)
    before = tuner.base_layer.weight.detach().clone()
    tuner.merge()
    tuner.base_layer.weight.data += 5
    tuner.unmerge()
    assert torch.equal(tuner.base_layer.weight, before)


def test_frod_q4_the_frozen_weight_of_the_first_delta_is_kept() -> None:
    tuner = trained(peft.get_peft_model(base(), config())).base_model.model.get_submodule(Q0)
    first = tuner.get_delta_weight("default")
    tuner.base_layer.weight.data += 5
    assert torch.equal(tuner.get_delta_weight("default"), first)


def test_frod_q5_u_is_rounded_to_float32() -> None:
    model, x = peft.get_peft_model(base().double(), config()), torch.randn(3, 6, dtype=torch.float64)
    tuner = model.base_model.model.get_submodule(Q0)
    assert torch.equal(tuner.frod_U["default"], tuner.frod_U["default"].float().double())
    off = (output(model, x) - tuner.base_layer(x)).abs().max().item()
    assert 1e-12 < off < 1e-5
    ours = fresh(adapt(frozen_graph(base().double())), "a", config())
    np.testing.assert_allclose(forward(ours, Q0, x.numpy()), tuner.base_layer(x).detach().numpy(), atol=1e-12)
