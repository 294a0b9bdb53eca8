"""LoRA on bare parameters beside PEFT's target_parameters: keys, shapes, what the module computes, every gradient, merging."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft_ref.errors import ConfigError, KeyMismatchError, ShapeError, UnsupportedLayerError  # noqa: E402
from peft_ref.methods import LoRA  # noqa: E402
from peft_ref.methods.lora import Params  # noqa: E402
from peft_ref.methods.lora_parameter import Stack, check, delta, delta_vjp, init, keys, pack, shapes, stack_of, unpack  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
nn = torch.nn


class Experts(nn.Module):  # type: ignore[misc]  # torch has no types here
    """Fused experts of unequal sizes, one after the other."""

    def __init__(self, transposed: bool | None) -> None:
        super().__init__()
        up, down = ((3, 5, 7), (3, 7, 5)) if transposed else ((3, 7, 5), (3, 5, 7))
        self.up = nn.Parameter(torch.randn(*up, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(*down, dtype=torch.float64))
        self.router = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))
        if transposed is not None:
            self.is_transposed = transposed

    def forward(self, x: Any) -> Any:
        up, down = self.up, self.down
        if not getattr(self, "is_transposed", False):
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        share = torch.softmax(x @ self.router.T, dim=-1)
        return torch.einsum("be,ebo->bo", share, torch.tanh(x @ up) @ down)


def net(transposed: bool | None) -> Any:
    torch.manual_seed(0)
    return nn.ModuleDict({"experts": Experts(transposed)})


def stack_at(model: Any, name: str, transposed: bool | None) -> Stack:
    return stack_of(tuple(getattr(model["experts"], name).shape), bool(transposed))


def tuned(transposed: bool | None, targets: list[str], **options: Any) -> Any:
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=[f"experts.{t}" for t in targets], **options)
    return peft.get_peft_model(net(transposed), config)


def randomised(model: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("targets", [["up"], ["down"], ["router"], ["up", "down"], ["up", "router", "down"]], ids=str)
@pytest.mark.parametrize("transposed", [None, False, True])
def test_keys_outputs_gradients_and_merging_are_pefts(transposed: bool | None, targets: list[str]) -> None:
    theirs, base = tuned(transposed, targets), net(transposed)
    randomised(theirs)
    state = peft.get_peft_model_state_dict(theirs)
    method = LoRA(r=2, lora_alpha=3)
    where = keys({"experts": [name for name, _ in base["experts"].named_parameters() if name in targets]})
    assert {f"base_model.model.{name}.lora_{f}.weight" for name in where.values() for f in "AB"} == state.keys()
    params: dict[str, Params] = {}
    for name in targets:
        stack = stack_at(base, name, transposed)
        prefix = f"base_model.model.{where[f'experts.{name}']}."
        tensors = {f"lora_{f}.weight": state[f"{prefix}lora_{f}.weight"].detach().numpy() for f in "AB"}
        params[name] = unpack(method, stack, tensors, "experts")
        assert pack(method, stack, params[name]).keys() == tensors.keys()

    effective = {name: torch.from_numpy(delta(method, stack_at(base, name, transposed), p)) for name, p in params.items()}
    ours = net(transposed)
    for name, change in effective.items():
        getattr(ours["experts"], name).data = getattr(ours["experts"], name).data + change
    x = torch.randn(4, 5, dtype=torch.float64)
    y, expected = ours["experts"](x), theirs.base_model.model["experts"](x)
    np.testing.assert_allclose(y.detach(), expected.detach(), rtol=1e-12, atol=1e-12)

    dy = torch.randn(*y.shape, dtype=torch.float64)
    y.backward(dy)
    expected.backward(dy)
    grads = {key: p.grad for key, p in theirs.named_parameters() if "lora_" in key}
    for name, p in params.items():
        stack = stack_at(base, name, transposed)
        mine = delta_vjp(method, stack, p, getattr(ours["experts"], name).grad.numpy())
        prefix = f"base_model.model.{where[f'experts.{name}']}.lora_"
        np.testing.assert_allclose(mine.A, grads[f"{prefix}A.default.weight"], rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(mine.B, grads[f"{prefix}B.default.weight"], rtol=1e-11, atol=1e-12)

    merged = theirs.merge_and_unload()
    for name in targets:
        np.testing.assert_allclose(
            getattr(merged["experts"], name).detach(), getattr(ours["experts"], name).detach(), rtol=1e-13, atol=1e-13
        )


def test_several_adapters_add_up() -> None:
    theirs = tuned(None, ["up"])
    theirs.add_adapter("b", peft.LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=[], target_parameters=["experts.up"]))
    randomised(theirs)
    theirs.base_model.set_adapter(["default", "b"])
    ours, total = net(None), 0
    for name, method in (("default", LoRA(r=2, lora_alpha=3)), ("b", LoRA(r=3, lora_alpha=7, use_rslora=True))):
        state = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        stack = stack_at(ours, "up", None)
        tensors = {f"lora_{f}.weight": state[f"base_model.model.experts.lora_{f}.weight"].detach().numpy() for f in "AB"}
        total = total + delta(method, stack, unpack(method, stack, tensors))
    ours["experts"].up.data = ours["experts"].up.data + torch.from_numpy(np.asarray(total))
    x = torch.randn(4, 5, dtype=torch.float64)
    np.testing.assert_allclose(ours["experts"](x).detach(), theirs.base_model.model["experts"](x).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("more", [{}, {"experts": 2}, {"experts": 2, "transposed": True}], ids=str)
def test_the_gradient_is_the_deltas_own(more: dict[str, Any]) -> None:
    stack = Stack(in_features=4, out_features=3, **more)
    rng = np.random.default_rng(0)
    method = LoRA(r=2, lora_alpha=5)
    p, d = (Params(*(rng.normal(size=s) for s in shapes(method, stack)[:2])) for _ in range(2))
    G = rng.normal(size=stack.shape)
    g = delta_vjp(method, stack, p, G)
    along = sum(float(np.sum(a * b)) for a, b in zip(g[:2], d[:2], strict=True))
    ahead, behind = (delta(method, stack, Params(*(a + h * b for a, b in zip(p[:2], d[:2], strict=True)))) for h in (0.5, -0.5))
    assert along == pytest.approx(float(np.sum(G * (ahead - behind))), rel=1e-12)  # a quadratic: the difference is its derivative


@pytest.mark.parametrize("start", [True, False, "gaussian"])
def test_a_fresh_adapter_is_drawn_as_pefts(start: Any) -> None:
    theirs = tuned(None, ["up"], init_lora_weights=start)
    state = peft.get_peft_model_state_dict(theirs)
    stack, rng = stack_at(net(None), "up", None), np.random.default_rng(0)
    drawn = [init(LoRA(r=2, lora_alpha=3, init_lora_weights=start), stack, np.zeros(stack.shape), rng).params for _ in range(200)]
    for f in "AB":
        expected = state[f"base_model.model.experts.lora_{f}.weight"]
        mine = np.stack([getattr(p, f) for p in drawn])
        assert mine[0].shape == tuple(expected.shape)
        assert bool(mine.any()) == bool(expected.any())
        bound = 1 / np.sqrt(expected.shape[1])
        if not mine.any():
            continue
        if start == "gaussian":
            assert np.std(mine) == pytest.approx(1 / 2, rel=0.05)
        else:
            assert 0.97 * bound < np.max(np.abs(mine)) <= bound
            assert float(expected.abs().max()) <= bound


def test_one_transposed_matrix_in_a_stack_is_turned_the_wrong_way_by_peft_and_refused_here() -> None:
    model = nn.ModuleDict({"m": Experts(True)})
    model["m"].up = nn.Parameter(torch.randn(1, 5, 5, dtype=torch.float64))
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=["m.up"]))
    randomised(theirs)
    wrapper = theirs.base_model.model["m"]
    A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    torch.testing.assert_close(wrapper.get_delta_weight("default"), wrapper.scaling["default"] * B @ A)  # (out, in), into (1, in, out)
    with pytest.raises(UnsupportedLayerError, match="other way round"):
        stack_of((1, 5, 5), True)


def test_what_a_parameter_does_not_take_is_refused_as_in_peft() -> None:
    for options in ({"lora_dropout": 0.1}, {"lora_bias": True}):
        with pytest.raises(ValueError):
            tuned(None, ["up"], **options)
        with pytest.raises(ConfigError, match="target_parameters"):
            check(LoRA(**options))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pissa"):
        check(LoRA(init_lora_weights="pissa"))
    with pytest.raises(UnsupportedLayerError, match="neither"):
        stack_of((3,))
    stack = Stack(in_features=4, out_features=3, experts=2)
    with pytest.raises(KeyMismatchError, match="came nothing"):
        unpack(LoRA(r=1), stack, {}, "m")
    with pytest.raises(ShapeError, match=r"lora_B.weight is \(3, 3\), expected \(3, 2\)"):
        unpack(LoRA(r=1), stack, {"lora_A.weight": np.zeros((2, 4)), "lora_B.weight": np.zeros((3, 3))}, "m")
