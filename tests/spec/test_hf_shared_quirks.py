"""What PEFT does otherwise with state that all layers share, live."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from peft_ref.contracts import Delta  # noqa: E402
from peft_ref.errors import KeyMismatchError, ShapeError  # noqa: E402
from peft_ref.files.adapter import load_adapter  # noqa: E402
from peft_ref.files.safetensors import open_file  # noqa: E402
from peft_ref.layers import Linear  # noqa: E402
from peft_ref.methods.pvera import Params, PVeRA  # noqa: E402
from peft_ref.methods.vblora import VBLoRA  # noqa: E402
from peft_ref.model import adapt, add, load, save, state_dict  # noqa: E402
from tests.model.live import config_of, frozen_graph  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
WIDE, NARROW = ["narrow", "wide"], ["narrow"]


class Two(torch.nn.Module):  # type: ignore[misc]  # torch has no types here
    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = torch.nn.Linear(6, 5), torch.nn.Linear(9, 7)

    def forward(self, x: Any) -> Any:
        return self.narrow(x)


def vera(targets: list[str], **options: Any) -> Any:
    return peft.VeraConfig(**{"r": 3, "target_modules": targets, **options})


def of(model: Any, name: str, key: str) -> Any:
    return peft.get_peft_model_state_dict(model, adapter_name=name)[f"base_model.{key}"]


def test_vera_q1_a_later_adapter_is_given_the_first_ones_matrices(tmp_path: Path) -> None:
    model = peft.get_peft_model(Two(), vera(WIDE), adapter_name="a")
    model.add_adapter("b", vera(NARROW))
    alone = peft.get_peft_model(Two(), vera(NARROW))
    assert torch.equal(of(model, "b", "vera_A"), of(model, "a", "vera_A"))
    assert of(model, "b", "vera_A").shape == (3, 9)
    assert of(alone, "default", "vera_A").shape == (3, 6)
    model.add_adapter("c", vera(NARROW, r=2))
    model.set_adapter("c")
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(torch.zeros(1, 6))
    alone.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(str(tmp_path), "d")
    ours = adapt(frozen_graph(Two()))
    ours = add(add(ours, "a", config_of(vera(WIDE)), np.random.default_rng(0)), "b", config_of(vera(NARROW)), np.random.default_rng(0))
    np.testing.assert_array_equal(state_dict(ours, "b")["base_model.vera_A"], of(alone, "default", "vera_A").numpy())
    assert load(ours, tmp_path, "d").attached("d").modules["narrow"].params.A.shape == (3, 6)


def test_vera_q2_matrices_in_a_file_that_says_it_has_none_are_read_over(tmp_path: Path) -> None:
    saved = peft.get_peft_model(Two(), vera(WIDE))
    saved.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "save_projection": False, "projection_prng_key": 9}))
    read = peft.PeftModel.from_pretrained(Two(), str(tmp_path))
    assert not torch.equal(read.base_model.vera_A["default"], saved.base_model.vera_A["default"])
    layers = {"narrow": Linear(in_features=6, out_features=5), "wide": Linear(in_features=9, out_features=7)}
    with pytest.raises(KeyMismatchError, match="vera_A is there, and the configuration says that it is not saved"):
        load_adapter(tmp_path, layers=layers)


def test_pvera_q1_a_later_adapter_is_given_the_first_ones_matrices() -> None:
    model = peft.get_peft_model(Two(), peft.PveraConfig(r=3, target_modules=WIDE), adapter_name="a")
    model.add_adapter("b", peft.PveraConfig(r=3, target_modules=NARROW))
    assert torch.equal(of(model, "b", "pvera_A"), of(model, "a", "pvera_A"))


def test_pvera_q2_a_merged_layer_computes_the_mean_where_the_unmerged_one_samples() -> None:
    model = peft.get_peft_model(Two(), peft.PveraConfig(r=3, target_modules=NARROW, sample_at_inference=True)).eval()
    model.base_model.model.narrow.pvera_lambda_b["default"].data += 1
    x = torch.ones(2, 6)
    assert not torch.allclose(model(x), model(x))
    model.merge_adapter()
    assert torch.equal(model(x), model(x))


def test_pvera_with_noise_is_pefts_training_and_so_are_its_gradients() -> None:
    torch.manual_seed(0)
    base = Two().double()
    model = peft.get_peft_model(base, peft.PveraConfig(r=3, target_modules=NARROW, generator_seed=4)).train()
    tuner, rng = model.base_model.model.narrow, np.random.default_rng(0)
    for parameter in (tuner.pvera_lambda_b["default"], tuner.pvera_lambda_d["default"]):
        parameter.data = torch.tensor(rng.normal(size=parameter.shape))
    x = torch.tensor(rng.normal(size=(4, 6)), requires_grad=True)
    noise = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).numpy()
    y, dy = model(x), rng.normal(size=(4, 5))
    y.backward(torch.tensor(dy))
    layer, method = Linear(in_features=6, out_features=5), PVeRA(r=3)
    found = {"b": tuner.pvera_lambda_b, "d": tuner.pvera_lambda_d, "A": tuner.pvera_A, "B": tuner.pvera_B}
    p = Params(**{name: values["default"].detach().numpy() for name, values in found.items()})
    W, b = (value.detach().numpy() for value in (tuner.base_layer.weight, tuner.base_layer.bias))
    np.testing.assert_allclose(
        layer.apply(x.detach().numpy(), W, b) + method.sampled(layer, p, x.detach().numpy(), noise), y.detach().numpy()
    )
    got = method.sampled_vjp(layer, p, x.detach().numpy(), noise, dy)
    np.testing.assert_allclose(got.x + dy @ W, x.grad.numpy(), rtol=1e-11)
    np.testing.assert_allclose(got.params.b, tuner.pvera_lambda_b["default"].grad.numpy(), rtol=1e-11)
    np.testing.assert_allclose(got.params.d, tuner.pvera_lambda_d["default"].grad.numpy(), rtol=1e-11)


def test_randlora_q1_bases_are_counted_for_the_layer_and_not_for_the_adapter() -> None:
    model = peft.get_peft_model(Two(), peft.RandLoraConfig(r=3, target_modules=WIDE), adapter_name="a")
    model.add_adapter("b", peft.RandLoraConfig(r=1, target_modules=NARROW))
    assert torch.equal(of(model, "b", "randlora_A"), of(model, "a", "randlora_A"))
    assert model.base_model.model.narrow.num_bases == 5
    model.set_adapter("a")
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 6))


def test_randlora_q2_what_is_shared_is_saved_beside_every_layer_too() -> None:
    state = peft.get_peft_model_state_dict(peft.get_peft_model(Two(), peft.RandLoraConfig(r=3, target_modules=WIDE)))
    for letter in "AB":
        whole = state[f"base_model.randlora_{letter}"]
        assert all(torch.equal(state[f"base_model.model.{module}.randlora_{letter}"], whole) for module in WIDE)


def test_vblora_q1_the_bank_is_drawn_for_every_layer_and_the_last_one_kept() -> None:
    config = {"r": 2, "num_vectors": 3, "vector_length": 1}
    banks = []
    for targets in (NARROW, WIDE):
        base = Two()
        torch.manual_seed(5)
        banks.append(of(peft.get_peft_model(base, peft.VBLoRAConfig(target_modules=targets, **config)), "default", "vblora_vector_bank"))
    assert not torch.equal(*banks)
    torch.manual_seed(5)
    assert torch.equal(banks[0], torch.empty(3, 1).uniform_(-0.02, 0.02))


def test_unilora_q1_places_are_drawn_from_torchs_generator_and_thrown_away() -> None:
    after = []
    for targets in (NARROW, WIDE):
        base = Two()
        torch.manual_seed(5)
        model = peft.get_peft_model(base, peft.UniLoraConfig(r=2, theta_d_length=4, target_modules=targets))
        after.append((of(model, "default", "unilora_theta_d"), torch.rand(1)))
    assert torch.equal(after[0][0], after[1][0])
    assert not torch.equal(after[0][1], after[1][1])


@pytest.mark.parametrize("k", [1, 3])
def test_vblora_q2_what_is_saved_of_the_largest_alone_is_read_on_both_sides_and_not_trained_by_peft(k: int, tmp_path: Path) -> None:
    torch.manual_seed(k)
    base = Two()
    said = {"r": 2, "num_vectors": 7, "vector_length": 1, "topk": k, "save_only_topk_weights": True, "target_modules": WIDE}
    model = peft.get_peft_model(base, peft.VBLoRAConfig(**said, init_logits_std=1.0))
    model.save_pretrained(tmp_path / "theirs")
    x = torch.randn(3, 6)

    graph = frozen_graph(Two())
    ours = load(adapt(graph), tmp_path / "theirs", trainable=True, lazy=k == 1)
    assert np.isneginf(ours.adapters["default"].modules["wide"].params.logits_A).sum(axis=-1).min() == 7 - k
    made = stack_delta(ours, "wide")
    tuner = model.base_model.model.wide
    np.testing.assert_allclose(made, tuner.get_delta_weight("default").detach().numpy(), rtol=0, atol=1e-7)

    save(ours, tmp_path / "ours")
    theirs, mine = (open_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert theirs.entries.keys() == mine.entries.keys()
    for key, entry in theirs.entries.items():
        assert (mine.entries[key].dtype, mine.entries[key].shape) == (entry.dtype, entry.shape)
        one, other = theirs.tensor(key), mine.tensor(key)
        if k == 1 or not key.endswith("weights"):
            np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)  # an exponential of float32 and its logarithm

    read = peft.PeftModel.from_pretrained(Two(), str(tmp_path / "ours"), is_trainable=True).eval()
    np.testing.assert_allclose(read.base_model.model.wide.get_delta_weight("default").detach().numpy(), made, rtol=0, atol=1e-7)
    with pytest.raises(RuntimeError, match="infinity values in VB-LoRA logits"):
        read.train()(x)
    method, layer, p = ours.adapters["default"].modules["wide"]
    gradient = method.delta_vjp(layer, p, Delta(np.ones(layer.shape, dtype=np.float32)))  # type: ignore[attr-defined]
    assert all(np.isfinite(g).all() for g in gradient)
    assert not gradient.logits_A[np.isneginf(p.logits_A)].any()


def stack_delta(model: Any, module: str) -> Any:
    method, layer, p = model.adapters["default"].modules[module]
    return method.delta(layer, p).W


def test_vblora_refuses_a_file_of_the_largest_that_does_not_fit() -> None:
    method = VBLoRA(r=2, num_vectors=5, vector_length=1, topk=2, save_only_topk_weights=True)
    places, weights = np.zeros((2, 3, 2), dtype=np.uint8), np.full((2, 3, 1), 0.75)
    assert method.from_file({"a_topk_indices": places + np.arange(2), "a_topk_weights": weights}).keys() == {"a"}
    for wrong in (
        {"a_topk_indices": places},
        {"a_topk_indices": places + 5, "a_topk_weights": weights},
        {"a_topk_indices": places[..., :1], "a_topk_weights": weights},
        {"a_topk_indices": places.astype(float), "a_topk_weights": weights},
    ):
        with pytest.raises((KeyMismatchError, ShapeError)):
            method.from_file(wrong)
