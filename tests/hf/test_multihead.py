"""LoRA on torch's MultiheadAttention beside PEFT's: keys, shapes, what the block computes, every gradient, merging, several adapters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft_ref.errors import ConfigError, KeyMismatchError, ShapeError  # noqa: E402
from peft_ref.methods import LoRA  # noqa: E402
from peft_ref.methods.lora_attention import BlockParams, check, init, merged, merged_vjp, pack, unpack  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
nn = torch.nn
E = 6
PREFIX = "base_model.model.attn."


def net(**options: Any) -> Any:
    torch.manual_seed(0)
    return nn.ModuleDict({"attn": nn.MultiheadAttention(E, 2, batch_first=True, **options).double()})


def tuned(**options: Any) -> Any:
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["attn"], **options}))
    return randomised(theirs)


def randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def params_of(model: Any, method: LoRA, name: str = "default") -> BlockParams:
    state = peft.get_peft_model_state_dict(model, adapter_name=name)
    found = unpack(method, E, {key.removeprefix(PREFIX): tensor.detach().numpy() for key, tensor in state.items()}, "attn")
    assert {f"{PREFIX}{key}" for key in pack(method, E, found)} == state.keys()
    return found


def with_weights(W_in: Any, W_out: Any) -> Any:
    block = net()["attn"]
    block.in_proj_weight = nn.Parameter(torch.from_numpy(np.asarray(W_in)))
    block.out_proj.weight = nn.Parameter(torch.from_numpy(np.asarray(W_out)))
    return block


def weights(block: Any) -> tuple[Any, Any]:
    return block.in_proj_weight.detach().numpy(), block.out_proj.weight.detach().numpy()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "r": 3}, {"lora_dropout": 0.5}], ids=str)
def test_outputs_gradients_and_merging_are_pefts(options: dict[str, Any]) -> None:
    theirs = tuned(**options).train()  # the dropout of LoRA acts nowhere, in training either
    method = LoRA(**{"r": 2, "lora_alpha": 3, **options})
    p = params_of(theirs, method)
    W = weights(net()["attn"])
    ours = with_weights(*merged(method, E, p, *W))
    q, k, v = (torch.randn(2, n, E, dtype=torch.float64) for n in (3, 4, 4))
    (y, _), (expected, _) = ours(q, k, v), theirs.base_model.model["attn"](q, k, v)
    np.testing.assert_allclose(y.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    dy = torch.randn(*y.shape, dtype=torch.float64)
    y.backward(dy)
    expected.backward(dy)
    grads = merged_vjp(method, E, p, ours.in_proj_weight.grad.numpy(), ours.out_proj.weight.grad.numpy())
    theirs_grads = {key: value.grad for key, value in theirs.named_parameters() if "lora_" in key}
    for key, mine in pack(method, E, grads).items():
        name = PREFIX + key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
        np.testing.assert_allclose(mine, theirs_grads[name], rtol=1e-11, atol=1e-12, err_msg=key)
    for mine, other in zip(weights(ours), weights(theirs.merge_and_unload()["attn"]), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-13, atol=1e-13)


def test_several_adapters_add_up() -> None:
    theirs = tuned()
    theirs.add_adapter("b", peft.LoraConfig(r=1, lora_alpha=5, target_modules=["attn"]))
    randomised(theirs).base_model.set_adapter(["default", "b"])
    W = weights(net()["attn"])
    for name, method in (("default", LoRA(r=2, lora_alpha=3)), ("b", LoRA(r=1, lora_alpha=5))):
        W = merged(method, E, params_of(theirs, method, name), *W)
    x = torch.randn(2, 3, E, dtype=torch.float64)
    expected = theirs.base_model.model["attn"](x, x, x)[0].detach()
    np.testing.assert_allclose(with_weights(*W)(x, x, x)[0].detach(), expected, rtol=1e-12, atol=1e-12)


def test_peft_adds_the_output_projections_delta_twice_and_takes_the_gradient_of_one() -> None:
    theirs, method = tuned(), LoRA(r=2, lora_alpha=3)
    p, (W_in, W_out) = params_of(theirs, method), weights(net()["attn"])
    once = method.scale * p.out.B @ p.out.A
    for safe in (False, True):
        block = tuned().base_model.model["attn"]
        block.merge(safe_merge=safe)
        np.testing.assert_allclose(block.base_layer.out_proj.base_layer.weight.detach(), W_out + 2 * once, rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(block.base_layer.in_proj_weight.detach() - W_in, method.scale * p.into.B @ p.into.A, atol=1e-13)
    x = torch.randn(2, 3, E, dtype=torch.float64)
    block = theirs.base_model.model["attn"]
    lora_B = block.base_layer.out_proj.lora_B["default"].weight

    def loss() -> Any:
        return block(x, x, x)[0].sum()

    loss().backward()
    step = 1e-6
    with torch.no_grad():
        lora_B[0, 0] += step
        ahead = float(loss())
        lora_B[0, 0] -= 2 * step
        behind = float(loss())
    assert (ahead - behind) / (2 * step) == pytest.approx(2 * float(lora_B.grad[0, 0]), rel=1e-6)


@pytest.mark.parametrize("start", [True, False, "gaussian"])
def test_a_fresh_block_starts_as_pefts(start: Any) -> None:
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["attn"], init_lora_weights=start))
    state = peft.get_peft_model_state_dict(theirs)
    method = LoRA(r=2, init_lora_weights=start)
    fresh = pack(method, E, init(method, E, *weights(net()["attn"]), np.random.default_rng(0)))
    assert {f"{PREFIX}{key}" for key in fresh} == state.keys()
    for key, tensor in fresh.items():
        expected = state[PREFIX + key]
        assert tensor.shape == tuple(expected.shape)
        assert bool(tensor.any()) == bool(expected.any())


def test_what_such_a_block_does_not_take_is_refused_as_in_peft() -> None:
    for start in ("olora", "pissa", "orthogonal"):
        with pytest.raises(AttributeError, match="weight"):
            peft.get_peft_model(net().float(), peft.LoraConfig(r=2, target_modules=["attn"], init_lora_weights=start))
        with pytest.raises(ConfigError, match=start):
            check(LoRA(init_lora_weights=start))
    with pytest.raises(ValueError, match="same embed"):
        peft.get_peft_model(net(kdim=4), peft.LoraConfig(r=2, target_modules=["attn"]))
    method = LoRA(r=2)
    fresh = pack(method, E, init(method, E, *weights(net()["attn"]), np.random.default_rng(0)))
    with pytest.raises(KeyMismatchError, match="both projections"):
        unpack(method, E, {key: tensor for key, tensor in fresh.items() if "out_proj" not in key}, "attn")
    with pytest.raises(ShapeError, match=r"at 'attn'"):
        unpack(method, E, {**fresh, "lora_B.weight": np.zeros((E, 2))}, "attn")
    with pytest.raises(ShapeError, match=r"attn.base_layer.out_proj"):
        unpack(method, E, {**fresh, "base_layer.out_proj.lora_B.weight": np.zeros((3 * E, 2))}, "attn")
