"""The quirks of LoRA's variants in spec/methods, each against HF PEFT run live; and QA-LoRA, penalties and noise beside PEFT's."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch import nn  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from peft_ref import stack  # noqa: E402
from peft_ref.errors import UnsupportedLayerError  # noqa: E402
from peft_ref.files.config import from_dict  # noqa: E402
from peft_ref.layers import Linear  # noqa: E402
from peft_ref.methods import BDLoRA, KaSA, LoRA, MiCA, MonteCLoRA, QALoRA, VeLoRA  # noqa: E402
from peft_ref.methods.kasa import truncated  # noqa: E402
from peft_ref.methods.monteclora import Noise  # noqa: E402
from peft_ref.stack import Adapter  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
LAYER = Linear(in_features=8, out_features=6)
KASA = {"kasa_config": {"beta": 0.3, "gamma": 0.7}}
SAMPLES = {"monteclora_config": {"num_samples": 3, "sample_scaler": 0.5, "buffer_size": 2}}


def config(**more: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["l"], **more})


def made(layer: Any = None, **more: Any) -> Any:
    base = nn.Sequential()
    base.add_module("l", layer if layer is not None else nn.Linear(8, 6).double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, config(**more), autocast_adapter_dtype=False)


def tuner(model: Any) -> Any:
    return model.base_model.model.l


def alike(ours: Any, theirs: Any, within: float = 1e-12) -> None:
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=within, atol=within)


def drawn(model: Any, method: Any) -> Any:
    """Random numbers for every tensor of PEFT's adapter, and the same as parameters here."""
    rng, held = np.random.default_rng(3), {**dict(model.named_parameters()), **dict(model.named_buffers())}
    places = {name.split("model.l.")[1].replace(".default", ""): p for name, p in held.items() if "lora_" in name}
    tensors = {s.key: rng.normal(size=s.stored_shape) for s in method.spec(LAYER)}
    for key, value in tensors.items():
        assert tuple(places[key].shape) == value.shape
        places[key].data = torch.tensor(value)
    return method.unpack(LAYER, tensors), places


def beside(model: Any, method: Any, p: Any, places: Any, taken: Any = lambda grads: grads) -> None:
    """Output, dx and every gradient."""
    rng, base = np.random.default_rng(4), tuner(model).get_base_layer()
    W, b = base.weight.detach().numpy(), base.bias.detach().numpy()
    x, dy = rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 3, 6))
    model.zero_grad()
    tx = torch.tensor(x, requires_grad=True)
    y = model(tx)
    y.backward(torch.tensor(dy))
    adapters = [Adapter(method, p)]
    alike(stack.forward(LAYER, W, b, adapters, x), y)
    grads = stack.vjp(LAYER, W, b, adapters, x, dy)
    alike(grads.x, tx.grad)
    for key, value in method.pack(LAYER, taken(grads.params[0])).items():
        alike(value, places[key].grad)


# ---- KaSA


def test_kasa_q1_the_weight_is_cut_in_float32() -> None:
    layer = nn.Linear(8, 6).double()
    W = layer.weight.detach().numpy().copy()
    left = tuner(made(layer, **KASA)).base_layer.weight.detach().numpy()
    error = float(np.max(np.abs(left - truncated(W, 4))))
    assert 1e-10 < error < 1e-5


def test_kasa_q2_what_was_cut_off_does_not_come_back() -> None:
    layer = nn.Linear(8, 6).double()
    W = layer.weight.detach().clone()
    model = made(layer, **KASA)
    with model.disable_adapter():
        assert not torch.allclose(tuner(model).base_layer.weight, W, atol=1e-3)
    model.merge_adapter()
    model.unmerge_adapter()
    assert not torch.allclose(tuner(model).base_layer.weight, W, atol=1e-3)
    assert not torch.allclose(model.unload().l.weight, W, atol=1e-3)


def test_kasa_q3_no_adapter_of_another_kind_beside_it() -> None:
    with pytest.raises(ValueError, match="KaSA cannot be combined"):
        made(**KASA).add_adapter("plain", config())


@pytest.mark.parametrize(("layer", "message"), [(nn.Linear(8, 4), "smaller than min"), (Conv1D(6, 8), "fan_in_fan_out")])
def test_kasa_q4_what_is_refused(layer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(layer, **KASA)
    with pytest.raises(UnsupportedLayerError):
        KaSA(r=4).check_layer(Linear(in_features=8, out_features=4))
    with pytest.raises(UnsupportedLayerError):
        KaSA(r=4).check_layer(Linear(in_features=8, out_features=6, transposed=True))


def test_kasas_penalty_and_its_gradient_are_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64: PEFT turns everything into float32 first."""
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    monkeypatch.setattr(torch, "eye", lambda n, dtype=None, device=None, own=torch.eye: own(n, dtype=torch.float64))
    model, method = made(**KASA), KaSA(r=4, lora_alpha=6, **KASA)  # type: ignore[arg-type]  # a map is one too
    p, places = drawn(model, method)
    loss = model.base_model._get_kasa_loss()
    loss.backward()
    alike(method.penalty({"l": p}), loss)
    for key, value in method.pack(LAYER, method.penalty_vjp({"l": p}, 1.0)["l"]).items():
        alike(value, places[key].grad)


def test_kasas_penalty_has_no_gradient_where_the_factors_are_orthonormal() -> None:
    method = KaSA(r=2)
    p = method.to_params(A=np.eye(2, 3), B=np.eye(3, 2), d=np.zeros(2))
    grads = method.penalty_vjp({"l": p}, 1.0)["l"]
    assert not any(np.any(g) for g in grads)


# ---- BD-LoRA


@pytest.mark.parametrize("side", ["a", "b"])
def test_bdlora_q1_a_block_on_a_conv1d_raises(side: str) -> None:
    with pytest.raises(AttributeError, match="features"):
        made(Conv1D(6, 8), use_bdlora={f"target_modules_bd_{side}": ["l"], "nblocks": 2})
    made(Conv1D(6, 8), use_bdlora={"nblocks": 2, "match_strict": False})


def test_bdlora_q2_a_blocks_start_is_wider() -> None:
    A = tuner(made(nn.Linear(512, 6), use_bdlora={"target_modules_bd_a": ["l"], "nblocks": 2})).lora_A["default"].weight
    assert 0.95 * (6 * 2 / 512) ** 0.5 < float(A.abs().max()) <= (6 * 2 / 512) ** 0.5


def test_bdlora_q3_a_pattern_is_any_part_of_the_name() -> None:
    base = nn.Sequential()
    base.add_module("xqx", nn.Sequential())
    base.xqx.add_module("l", nn.Linear(8, 6))
    model = peft.get_peft_model(base, config(use_bdlora={"target_modules_bd_a": ["q"], "nblocks": 2}))
    assert tuple(model.base_model.model.xqx.l.lora_A["default"].weight.shape) == (4, 4)
    assert BDLoRA(use_bdlora={"target_modules_bd_a": ["q"]}).on_module("xqx.l").diagonal == "A"  # type: ignore[arg-type]


def test_bdlora_q4_pissa_takes_out_what_the_block_does_not_put_back() -> None:
    layer = nn.Linear(8, 6)
    W, x = layer.weight.detach().clone(), torch.randn(3, 8)
    before = layer(x)
    model = made(layer, init_lora_weights="pissa", use_bdlora={"target_modules_bd_a": ["l"], "nblocks": 2})
    assert not torch.allclose(tuner(model).base_layer.weight, W, atol=1e-3)
    assert not torch.allclose(model(x), before, atol=1e-3)


def test_a_block_diagonal_b_has_no_bias_and_pefts_merge_looks_for_it() -> None:
    words = {"target_modules_bd_b": ["l"], "nblocks": 2}
    model = made(lora_bias=True, use_bdlora=words)
    assert not any(key.endswith("lora_B.bias") for key in peft.get_peft_model_state_dict(model))
    with pytest.raises(AttributeError, match="bias"):
        tuner(model).merge()
    method = BDLoRA(r=4, lora_bias=True, use_bdlora=words, diagonal="B")  # type: ignore[arg-type]
    assert {s.field for s in method.spec(Linear(in_features=8, out_features=6))} == {"A", "B"}


# ---- QA-LoRA


def on_gptq(model: Any, options: Any) -> Any:
    """A linear layer's LoRA made as PEFT makes a GPTQ layer's."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    layer = tuner(model)
    QALoraLinearVariant.init(layer, "default", options)
    layer.lora_variant["default"] = QALoraLinearVariant()
    return model


@pytest.mark.parametrize(("size", "rslora"), [(2, False), (4, True), (1, False), (8, False)])
def test_qalora_is_what_peft_does_on_a_gptq_layer(size: int, rslora: bool) -> None:
    words = {"use_qalora": True, "qalora_group_size": size, "use_rslora": rslora}
    model = on_gptq(made(**words), config(**words)).double()
    method = QALoRA(r=4, lora_alpha=6, use_rslora=rslora, qalora_group_size=size)
    beside(model, method, *drawn(model, method))


def test_the_bias_of_qaloras_b_is_saved_and_read_by_nothing() -> None:
    words = {"use_qalora": True, "qalora_group_size": 2, "lora_bias": True}
    model = on_gptq(made(**words), config(**words)).double()
    method = QALoRA(r=4, lora_alpha=6, qalora_group_size=2, lora_bias=True)
    keys = {s.key for s in method.spec(Linear(in_features=8, out_features=6))}
    assert {key.removeprefix("base_model.model.l.") for key in peft.get_peft_model_state_dict(model)} == keys
    x = torch.randn(3, 8, dtype=torch.float64)
    before = model(x)
    tuner(model).lora_B["default"].bias.data += 1
    assert torch.equal(model(x), before)
    p = method.init(Linear(in_features=8, out_features=6), np.zeros((6, 8)), np.random.default_rng(0)).params
    assert method.factors(p).b is None
    d = stack.vjp(Linear(in_features=8, out_features=6), np.zeros((6, 8)), None, [Adapter(method, p)], np.ones((1, 8)), np.ones((1, 6)))
    assert not d.params[0].c.any()


def test_qalora_q1_elsewhere_it_is_not_read() -> None:
    assert tuple(tuner(made(use_qalora=True, qalora_group_size=2)).lora_A["default"].weight.shape) == (4, 8)


def test_qalora_q2_the_mean_times_the_number_of_groups() -> None:
    model = on_gptq(made(use_qalora=True), config(use_qalora=True, qalora_group_size=2)).double()
    layer = tuner(model)
    layer.lora_A["default"].weight.data = torch.ones(4, 4, dtype=torch.float64)
    layer.lora_B["default"].weight.data = torch.ones(6, 4, dtype=torch.float64)
    x = torch.zeros(1, 8, dtype=torch.float64)
    added = lambda x: (model(x) - layer.base_layer(x))[0, 0].item()  # noqa: E731
    x[0, 0] = 1.0
    assert added(x) == pytest.approx(1.5 * 4 * 8 / 2**2)  # where the paper's sum gives 1.5 * 4


def test_qalora_q3_nothing_is_merged() -> None:
    model = on_gptq(made(use_qalora=True), config(use_qalora=True, qalora_group_size=2))
    with pytest.raises(NotImplementedError):
        model.merge_adapter()


def test_qalora_q4_the_size_divides_the_inputs() -> None:
    with pytest.raises(ValueError, match="divisible"):
        on_gptq(made(use_qalora=True), config(use_qalora=True, qalora_group_size=3))
    with pytest.raises(UnsupportedLayerError, match="whole number of groups"):
        QALoRA(qalora_group_size=3).check_layer(LAYER)


# ---- MiCA


def test_mica_q1_a_float64_weight_is_refused() -> None:
    with pytest.raises(TypeError, match="float32"):
        made(init_lora_weights="mica")


def test_mica_q2_in_other_letters_B_is_trained() -> None:
    exact, other = (tuner(made(nn.Linear(8, 6), init_lora_weights=name)) for name in ("mica", "MICA"))
    assert not exact.lora_B["default"].weight.requires_grad
    assert other.lora_B["default"].weight.requires_grad
    assert torch.allclose(other.lora_B["default"].weight.T @ other.lora_B["default"].weight, torch.eye(4), atol=1e-5)
    words = {"peft_type": "LORA", "target_modules": ["l"]}
    assert isinstance(from_dict({**words, "init_lora_weights": "mica"}).method, MiCA)
    assert isinstance(from_dict({**words, "init_lora_weights": "MICA"}).method, LoRA)


def test_mica_q3_a_loaded_adapter_has_the_files_B() -> None:
    model = made(nn.Linear(8, 6), init_lora_weights="mica")
    held = peft.get_peft_model_state_dict(model)
    turned = {key: -value if "lora_B" in key else value for key, value in held.items()}
    fresh = made(nn.Linear(8, 6), init_lora_weights="mica")
    peft.set_peft_model_state_dict(fresh, turned)
    assert torch.equal(tuner(fresh).lora_B["default"].weight, -tuner(model).lora_B["default"].weight)


def test_mica_q4_a_convolution_raises() -> None:
    with pytest.raises(ValueError, match="variant combination"):
        made(nn.Conv1d(8, 6, 1), init_lora_weights="mica")


# ---- VeLoRA


def test_velora_q1_training_replaces_the_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    model, method = made(velora_config={"num_groups": 3}), VeLoRA(r=4, velora_config={"num_groups": 3})  # type: ignore[arg-type]
    assert not torch.any(tuner(model).lora_velora_embed["default"])
    for seed in (1, 2):
        x = torch.tensor(np.random.default_rng(seed).normal(size=(2, 3, 8)))
        model(x)
        alike(method.projection(x.numpy()), tuner(model).lora_velora_embed["default"], 1e-6)  # in float32
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    model(x)
    alike(method.projection(x.numpy()), tuner(model).lora_velora_embed["default"])


def test_velora_q2_in_evaluation_the_gradient_is_the_derivative() -> None:
    words = {"velora_config": {"num_groups": 3, "scale": 1.5, "init_type": "random"}}
    model = made(**words)
    p, places = drawn(model, VeLoRA(r=4, lora_alpha=6, **words))  # type: ignore[arg-type]
    beside(model.train(), VeLoRA(r=4, lora_alpha=6, **words), p, places)  # type: ignore[arg-type]
    from peft_ref.methods.lora import Params

    beside(model.eval(), LoRA(r=4, lora_alpha=6), Params(A=p.A, B=p.B), places)


def test_velora_q3_groups_of_one_feature_keep_everything() -> None:
    method = VeLoRA(r=4, velora_config={"num_groups": 64})  # type: ignore[arg-type]
    assert method.dims(LAYER)["width"] == 1
    v = method.projection(np.random.default_rng(0).normal(size=(3, 8)))
    assert np.abs(v).tolist() == [1.0]
    assert tuple(tuner(made(velora_config={})).lora_velora_embed["default"].shape) == (1,)


def test_velora_q4_a_projection_of_nothing_is_all_alike() -> None:
    method, model = VeLoRA(r=4, velora_config={"num_groups": 2}), made(velora_config={"num_groups": 2})  # type: ignore[arg-type]
    x = torch.zeros(3, 8, dtype=torch.float64)
    model(x)
    alike(method.projection(x.numpy()), tuner(model).lora_velora_embed["default"], 1e-6)
    assert method.projection(x.numpy()).tolist() == [0.5] * 4


# ---- MonteCLoRA


def with_noise() -> tuple[Any, Any, Any, Any, Noise]:
    model = made(**SAMPLES)
    method = MonteCLoRA(r=4, lora_alpha=6, **SAMPLES)  # type: ignore[arg-type]
    p, places = drawn(model, method)
    sampler = tuner(model).lora_monteclora_sampler["default"].sampler
    z = {key: value.double().numpy() for key, value in sampler.buffer[sampler.index].items()}
    return model, method, p, places, Noise(z["z_mvn"], z["z_wishart"], z["z_dirichlet"])


def test_monteclora_in_training_is_pefts_given_its_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # so that PEFT's Cholesky is in float64
    model, method, p, places, noise = with_noise()
    acting = method.noisy(p, noise)
    beside(model.train(), method, acting, places, lambda grads: method.noisy_vjp(p, noise, grads))
    kept = tuner(model).lora_monteclora_sampler["default"]
    alike(acting.w, kept.expert_weights)
    alike(acting.variances, kept.gaussian_var_prior)


def test_montecloras_least_variance_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    model, method, p, places, noise = with_noise()
    low = p.sigma * 0 - np.asarray([9.0, 0.0, 9.0, 0.0])
    p = p._replace(sigma=low)
    places["lora_monteclora_sampler.std_prior"].data = torch.tensor(low)
    beside(model.train(), method, method.noisy(p, noise), places, lambda grads: method.noisy_vjp(p, noise, grads))
    assert places["lora_monteclora_sampler.std_prior"].grad[0] == 0


def test_monteclora_q1_pefts_noise_is_worked_out_in_float32() -> None:
    model, method, p, _, noise = with_noise()
    model.train()(torch.zeros(1, 8, dtype=torch.float64))
    error = np.max(np.abs(method.noisy(p, noise).w - tuner(model).lora_monteclora_sampler["default"].expert_weights.detach().numpy()))
    assert 1e-13 < error < 1e-5


def test_monteclora_q2_every_training_pass_draws_and_overwrites() -> None:
    model, *_ = with_noise()
    held = tuner(model).lora_monteclora_sampler["default"]
    before = held.gaussian_var_prior.clone()
    model.train()(torch.zeros(1, 8, dtype=torch.float64))
    once = held.gaussian_var_prior.clone()
    model(torch.zeros(1, 8, dtype=torch.float64))
    assert not torch.equal(before, once)
    assert not torch.equal(once, held.gaussian_var_prior)
    assert len(held.sampler.buffer) == 2


def test_monteclora_q3_in_evaluation_the_sampler_is_not_trained() -> None:
    model, *_, places, _ = with_noise()
    model.eval()(torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    assert places["lora_monteclora_sampler.std_prior"].grad is None
    assert places["lora_A.weight"].grad is not None


def test_monteclora_q4_an_unknown_word_is_refused_in_this_map_alone() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        config(monteclora_config={"samples": 3})
    config(kasa_config={"delta": 3})
    words = {"peft_type": "LORA", "target_modules": ["l"]}
    assert from_dict({**words, "monteclora_config": {"samples": 3}}).method == MonteCLoRA()
    assert from_dict({**words, "kasa_config": {"delta": 3}}).method == KaSA()
