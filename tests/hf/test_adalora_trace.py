"""AdaLoRA trained beside HF PEFT, step by step in float64: every mask, every parameter, the penalty and what is saved at the end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from peft_ref import stack  # noqa: E402
from peft_ref.errors import ConfigError  # noqa: E402
from peft_ref.files.adapter import AdapterFile, AdapterModule, load_adapter, save_adapter, state_dict  # noqa: E402
from peft_ref.files.config import from_dict  # noqa: E402
from peft_ref.layers import Linear  # noqa: E402
from peft_ref.methods.adalora import AdaLoRA, Params  # noqa: E402
from peft_ref.methods.adalora_allocator import State, after_step, budget, last_allocation, rank_pattern, sliced  # noqa: E402
from peft_ref.stack import Adapter  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
STEPS = 60
TOLERANCE = 1e-9
SIZES = (6, 8, 5, 4)  # a network of three linear layers with tanh between them
NAMES = ("layers.0", "layers.1", "layers.2")
LAYERS = {name: Linear(in_features=i, out_features=o) for name, (i, o) in zip(NAMES, pairwise(SIZES), strict=True)}

SCHEDULES: dict[str, AdaLoRA] = {
    "plain": AdaLoRA(init_r=4, target_r=2, total_step=STEPS),
    "warm-up, final phase, every third step": AdaLoRA(
        init_r=4, target_r=2, tinit=7, tfinal=20, deltaT=3, total_step=STEPS, beta1=0.7, beta2=0.9
    ),
    "last allocation off the beat": AdaLoRA(init_r=5, target_r=1, tinit=3, tfinal=11, deltaT=10, total_step=STEPS, lora_alpha=3),
    "only the last allocation": AdaLoRA(
        init_r=3, target_r=2, tinit=10, tfinal=25, deltaT=50, total_step=STEPS, lora_alpha=0, orth_reg_weight=0.1
    ),
    "ends early, whole modules go": AdaLoRA(init_r=3, target_r=0, tfinal=20, total_step=STEPS, deltaT=2, beta1=0.5, beta2=0.5),
    "goes on after the end": AdaLoRA(init_r=4, target_r=3, total_step=40, tfinal=10, lora_alpha=-1, orth_reg_weight=0.0),
}


class Net(torch.nn.Module):  # type: ignore[misc]  # torch has no types here
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(i, o) for i, o in pairwise(SIZES))

    def forward(self, x: Any, target: Any) -> Any:
        return Output(x, self.layers, target)


class Output:
    """PEFT adds its penalty to what has a `loss`."""

    def __init__(self, x: Any, layers: Any, target: Any) -> None:
        for n, layer in enumerate(layers):
            x = layer(x) if n == len(layers) - 1 else torch.tanh(layer(x))
        self.y = x
        self.loss = ((x - target) ** 2).sum() / 2


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)


class Twin(NamedTuple):
    """PEFT's model, and the frozen numbers and fresh parameters of the same network here."""

    model: Any
    W: dict[str, Any]
    b: dict[str, Any]
    params: dict[str, Params]


def hf_config(method: AdaLoRA) -> Any:
    values = {k: v for k, v in vars(method).items() if k != "live_r"}
    return peft.AdaLoraConfig(target_modules=list(NAMES), **values)


def twin(method: AdaLoRA, seed: int) -> Twin:
    torch.manual_seed(seed)
    model = peft.get_peft_model(Net(), hf_config(method), autocast_adapter_dtype=False)
    W = {n: model.base_model.model.get_submodule(n).base_layer.weight.detach().numpy().copy() for n in NAMES}
    b = {n: model.base_model.model.get_submodule(n).base_layer.bias.detach().numpy().copy() for n in NAMES}
    return Twin(model, W, b, theirs(model))


def theirs(model: Any) -> dict[str, Params]:
    layers = {n: model.base_model.model.get_submodule(n) for n in NAMES}
    return {n: Params(*(getattr(m, f"lora_{k}")["default"].detach().numpy().copy() for k in "AEB")) for n, m in layers.items()}


def data(step: int) -> tuple[Any, Any]:
    rng = np.random.default_rng([5, step])
    return rng.normal(size=(7, SIZES[0])), 2 * rng.normal(size=(7, SIZES[-1]))


def our_gradients(method: AdaLoRA, t: Twin, params: Mapping[str, Params], x: Any, target: Any) -> tuple[float, dict[str, Params]]:
    """The loss with its penalty, and its gradients, by hand."""
    inputs, outputs = [], []
    for n, name in enumerate(NAMES):
        inputs.append(x)
        x = stack.forward(LAYERS[name], t.W[name], t.b[name], [Adapter(method, params[name])], x)
        x = x if n == len(NAMES) - 1 else np.tanh(x)
        outputs.append(x)
    loss, dy = float(((x - target) ** 2).sum() / 2 + method.orthogonality(params)), x - target
    penalty, grads = method.orthogonality_vjp(params, 1.0), {}
    for n in reversed(range(len(NAMES))):
        name = NAMES[n]
        dy = dy if n == len(NAMES) - 1 else dy * (1 - outputs[n] ** 2)
        g = stack.vjp(LAYERS[name], t.W[name], t.b[name], [Adapter(method, params[name])], inputs[n], dy)
        grads[name] = Params(*(a + p for a, p in zip(g.params[0], penalty[name], strict=True)))
        dy = g.x
    return loss, grads


class Adam:
    """Adam in a few lines, for both sides: arrays in, arrays out."""

    def __init__(self) -> None:
        self.m: dict[str, Any] = {}
        self.v: dict[str, Any] = {}
        self.t = 0

    def step(self, values: dict[str, Any], grads: dict[str, Any]) -> dict[str, Any]:
        self.t += 1
        out = {}
        for k, g in grads.items():
            self.m[k] = 0.9 * self.m.get(k, 0) + 0.1 * g
            self.v[k] = 0.99 * self.v.get(k, 0) + 0.01 * g * g
            out[k] = values[k] - 0.02 * (self.m[k] / (1 - 0.9**self.t)) / ((self.v[k] / (1 - 0.99**self.t)) ** 0.5 + 1e-4)
        return out


class SGD:
    def step(self, values: dict[str, Any], grads: dict[str, Any]) -> dict[str, Any]:
        return {k: values[k] - 0.02 * g for k, g in grads.items()}


def flat(params: Mapping[str, Params]) -> dict[str, Any]:
    return {f"{n}.{f}": v for n, p in params.items() for f, v in p._asdict().items()}


def unflat(values: Mapping[str, Any]) -> dict[str, Params]:
    return {n: Params(*(values[f"{n}.{f}"] for f in "AEB")) for n in NAMES}


def their_step(model: Any, optimiser: Any, x: Any, target: Any, step: int) -> float:
    out = model.base_model(torch.tensor(x), torch.tensor(target))  # a PeftModel without a task type would leave the penalty out
    out.loss.backward()
    tuners = {n: model.base_model.model.get_submodule(n) for n in NAMES}
    own = {f"{n}.{k}": getattr(m, f"lora_{k}")["default"] for n, m in tuners.items() for k in "AEB"}
    moved = optimiser.step({k: p.detach() for k, p in own.items()}, {k: p.grad for k, p in own.items()})
    for k, p in own.items():
        p.data = moved[k]
    model.base_model.update_and_allocate(step)
    model.zero_grad()
    return float(out.loss.detach())


def close(got: Any, want: Any, where: Any) -> None:
    assert got.shape == want.shape
    assert np.max(np.abs(got - want), initial=0.0) <= TOLERANCE * max(np.max(np.abs(want), initial=0.0), 1.0), where


def trained(method: AdaLoRA, optimiser: type[Any], seed: int = 1) -> tuple[Twin, dict[str, Params], State, set[tuple[bool, ...]]]:
    """Both sides trained together; they are compared at every step."""
    t = twin(method, seed)
    params, state, patterns = t.params, State(), set()
    mine, other = optimiser(), optimiser()
    config: Any = t.model.peft_config["default"]
    for step in range(STEPS):
        x, target = data(step)
        loss, grads = our_gradients(method, t, params, x, target)
        assert loss == pytest.approx(their_step(t.model, other, x, target, step), rel=1e-10)
        params = unflat(mine.step(flat(params), flat(grads)))
        state, params = after_step(method, state, params, grads, step)
        named = {k.removesuffix(".default"): v for k, v in (config.rank_pattern or {}).items()}
        if state.kept is None:
            assert not named, step
        else:
            assert rank_pattern(state.kept) == named, step
            patterns.add(tuple(bool(v) for kept in state.kept.values() for v in kept))
        # Masks do not show all of it: with the old average in the uncertainty every score is the same multiple of what it should be.
        for ours, averages in (
            (state.sensitivity, t.model.base_model.rankallocator.exp_avg_ipt),
            (state.uncertainty, t.model.base_model.rankallocator.exp_avg_unc),
        ):
            assert (ours is None) == (not averages), step
            for key, value in flat(ours or {}).items():
                name, _, letter = key.rpartition(".")
                close(value, averages[f"{name}.lora_{letter}.default"].numpy(), (step, key))
        for key, value in flat(theirs(t.model)).items():
            close(flat(params)[key], value, (step, key))
    return t, params, state, patterns


@pytest.mark.parametrize("optimiser", [SGD, Adam])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_mask_and_every_parameter_of_sixty_steps_equals_pefts(schedule: str, optimiser: type[Any]) -> None:
    method = SCHEDULES[schedule]
    _, params, state, patterns = trained(method, optimiser)
    assert state.kept is not None
    assert len(patterns) >= (1 if schedule.startswith("only") else 2)
    if last_allocation(method) < STEPS:
        assert sum(int(k.sum()) for k in state.kept.values()) == method.target_r * len(NAMES)
        assert all(not np.any(p.E[~state.kept[n]]) for n, p in params.items())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_budget_of_every_step_equals_pefts(schedule: str) -> None:
    method = SCHEDULES[schedule]
    t = twin(method, 2)
    allocator = t.model.base_model.rankallocator
    assert [budget(method, t.params, step) for step in range(STEPS)] == [allocator.budget_schedule(step)[0] for step in range(STEPS)]


def test_the_penalty_and_its_gradient_are_pefts() -> None:
    method = replace(SCHEDULES["plain"], orth_reg_weight=0.7, init_lora_weights=False)
    t = twin(method, 3)
    x, target = data(0)
    with_penalty = t.model.base_model(torch.tensor(x), torch.tensor(target)).loss
    without = t.model.base_model.model(torch.tensor(x), torch.tensor(target)).loss
    (with_penalty - without).backward()
    assert float(method.orthogonality(t.params)) == pytest.approx(float(with_penalty.detach() - without.detach()), rel=1e-11)
    ours = method.orthogonality_vjp(t.params, 1.0)
    for name in NAMES:
        tuner = t.model.base_model.model.get_submodule(name)
        for k in "AB":
            grad = getattr(tuner, f"lora_{k}")["default"].grad.numpy()
            np.testing.assert_allclose(getattr(ours[name], k), grad, rtol=0, atol=1e-11)
        assert not np.any(ours[name].E)


def test_the_penalty_of_orthonormal_factors_is_zero_and_so_is_its_gradient() -> None:
    method = AdaLoRA(init_r=2, total_step=5)
    params = {"l": Params(np.eye(2, 5), np.ones((2, 1)), np.eye(7, 2))}
    assert method.orthogonality(params) == 0
    assert all(not np.any(v) and np.all(np.isfinite(v)) for v in method.orthogonality_vjp(params, 1.0)["l"])


def test_equal_initial_and_target_ranks_prune_nothing_here_and_crash_in_peft() -> None:
    method = AdaLoRA(init_r=3, target_r=3, total_step=STEPS)
    t, state = twin(method, 4), State()
    params = t.params
    for step in range(8):
        _, grads = our_gradients(method, t, params, *data(step))
        params = unflat(SGD().step(flat(params), flat(grads)))
        state, params = after_step(method, state, params, grads, step)
    assert state.kept is not None
    assert all(np.all(k) for k in state.kept.values())
    assert all(np.all(p.E) for p in params.values())
    their_step(t.model, SGD(), *data(0), 0)  # step 0 is warm-up
    with pytest.raises(RuntimeError, match="kthvalue"):
        their_step(t.model, SGD(), *data(1), 1)


@pytest.mark.parametrize("step", [4, 5])
def test_an_allocation_that_lacks_the_steps_before_it_is_refused(step: int) -> None:
    method = AdaLoRA(init_r=3, target_r=2, total_step=5, tfinal=1)
    t = twin(method, 5)
    with pytest.raises(ConfigError, match="Give every step once"):
        after_step(method, State(), t.params, t.params, step)


@pytest.fixture(params=["plain", "ends early, whole modules go", "last allocation off the beat"])
def pruned(request: pytest.FixtureRequest) -> tuple[AdaLoRA, Twin, dict[str, Params], State]:
    t, params, state, _ = trained(SCHEDULES[request.param], Adam)
    return SCHEDULES[request.param], t, params, state


def test_what_peft_saves_with_sliced_ranks_is_read_and_written_back(pruned: Any, tmp_path: Path) -> None:
    method, t, params, state = pruned
    t.model.save_pretrained(tmp_path / "hf")
    loaded = load_adapter(tmp_path / "hf", layers=LAYERS)
    assert loaded.modules.keys() == set(NAMES)
    for name, module in loaded.modules.items():
        own, cut = sliced(method, params[name], [bool(v) for v in state.kept[name]])
        assert module.method == own
        for got, want in zip(module.params, cut, strict=True):
            close(got, want, name)
    for layers in (LAYERS, None):
        save_adapter(tmp_path / "ours", load_adapter(tmp_path / "hf", layers=layers))
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "hf" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes(), (layers, file)
    x = data(1)[0]
    mine = loaded.modules[NAMES[0]]
    got = stack.forward(mine.layer, t.W[NAMES[0]], t.b[NAMES[0]], [Adapter(mine.method, mine.params)], x)
    close(got, t.model.base_model.model.layers[0](torch.tensor(x)).detach().numpy(), "the pruned layer's output")


def test_what_we_save_with_sliced_ranks_peft_loads_and_computes_the_same(pruned: Any, tmp_path: Path) -> None:
    method, _, params, state = pruned
    flat_config = {k: v for k, v in vars(method).items() if k != "live_r"}
    flat_config |= {"peft_type": "ADALORA", "target_modules": list(NAMES), "rank_pattern": rank_pattern(state.kept)}
    config = from_dict(flat_config)
    modules = {}
    for name in NAMES:
        own, cut = sliced(method, params[name], [bool(v) for v in state.kept[name]])
        assert config.method_for(name) == own
        modules[name] = AdapterModule(own, LAYERS[name], cut)
    save_adapter(tmp_path, AdapterFile(config=config, modules=modules))
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(Net(), str(tmp_path))
    saved = peft.get_peft_model_state_dict(model)
    ours = state_dict(modules)
    assert saved.keys() == ours.keys()
    for key, value in saved.items():
        np.testing.assert_array_equal(value.numpy(), ours[key])
    for n, name in enumerate(NAMES):
        x = np.random.default_rng(n).normal(size=(3, SIZES[n]))
        tuner = model.base_model.model.get_submodule(name)
        W, b = tuner.base_layer.weight.detach().numpy(), tuner.base_layer.bias.detach().numpy()
        close(
            stack.forward(LAYERS[name], W, b, [Adapter(modules[name].method, modules[name].params)], x),
            tuner(torch.tensor(x)).detach().numpy(),
            name,
        )
