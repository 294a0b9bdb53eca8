"""LoRA+, LoRA-FA and Riemannian preconditioning do what peft.optimizers does, for twenty steps."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = pytest.mark.hf

import peft  # noqa: E402
import torch  # noqa: E402
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer  # noqa: E402
from torch import nn  # noqa: E402

from peft_ref.errors import ConfigError  # noqa: E402
from peft_ref.methods.lora import Params  # noqa: E402
from peft_ref.nn.optim import SGD, AdamW  # noqa: E402
from peft_ref.nn.optim_lora import LoRAFA, LoRAPlus, preconditioned  # noqa: E402

STEPS, WITHIN = 20, 1e-8
KEYS = {"q": ("lora_A", "lora_B"), "k": ("lora_A", "lora_B"), "table": ("lora_embedding_A", "lora_embedding_B")}


def made(modules: tuple[str, ...] = ("q", "k", "table"), **more: Any) -> Any:
    """PEFT's model with random factors in float64, its tensors by module, and ours."""
    net = nn.ModuleDict({"q": nn.Linear(5, 6), "k": nn.Linear(6, 4), "table": nn.Embedding(9, 5)}).double()
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(modules), alpha_pattern={"k": 2}, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config).double()
    rng, places, ours = np.random.default_rng(1), {}, {}
    for module in modules:
        layer = model.base_model.model[module]
        own = [getattr(layer, name)["default"] for name in KEYS[module]]
        own = [p if isinstance(p, nn.Parameter) else p.weight for p in own]
        if more.get("lora_bias"):
            own.append(layer.lora_B["default"].bias)
        for p in own:
            p.data = torch.tensor(rng.normal(size=tuple(p.shape)))
        places[module] = own
        ours[module] = Params(*(p.detach().numpy().copy() for p in own))
    return model, places, ours


def given(places: Any, step: int) -> dict[str, Params]:
    """Gradients of many sizes, put on PEFT's tensors and returned."""
    rng, grads = np.random.default_rng(100 + step), {}
    for module, own in places.items():
        values = [rng.normal(size=tuple(p.shape)) * 10.0 ** rng.integers(-3, 3) for p in own]
        for p, g in zip(own, values, strict=True):
            p.grad = torch.tensor(g, dtype=p.dtype) if p.requires_grad else None
        grads[module] = Params(*values)
    return grads


def alike(ours: Any, places: Any, step: int) -> None:
    for module, own in places.items():
        for name, p, q in zip(Params._fields, ours[module], own, strict=False):
            np.testing.assert_allclose(p, q.detach().numpy(), rtol=WITHIN, atol=WITHIN, err_msg=f"{name} of {module} at step {step}")


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("which", ["adamw", "sgd"])
def test_loraplus(which: str, decay: float) -> None:
    model, places, ours = made()
    theirs, optimiser = {
        "adamw": (torch.optim.AdamW, AdamW(weight_decay=decay)),
        "sgd": (lambda *a, **k: torch.optim.SGD(*a, momentum=0.9, **k), SGD(momentum=0.9, weight_decay=decay)),
    }[which]
    theirs.__name__ = which  # type: ignore[attr-defined]  # PEFT asks for it
    opt = create_loraplus_optimizer(model, theirs, lr=0.01, loraplus_lr_ratio=8.0, loraplus_lr_embedding=1e-3, loraplus_weight_decay=decay)
    plus = LoRAPlus(ratio=8.0, optimiser=optimiser, embedding_lr=1e-3, embeddings=frozenset({"table"}))
    state = plus.init(ours)
    for step in range(STEPS):
        grads = given(places, step)
        opt.step()
        state, ours = plus.update(state, ours, grads, 0.01)
        alike(ours, places, step)
    assert state.step == STEPS


def test_loraplus_does_not_decay_a_bias() -> None:
    model, places, ours = made(("q", "k"), lora_bias=True)
    opt = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.5)
    plus = LoRAPlus(ratio=4.0, optimiser=AdamW(weight_decay=0.5))
    state = plus.init(ours)
    for step in range(STEPS):
        grads = given(places, step)
        opt.step()
        state, ours = plus.update(state, ours, grads, 0.01)
        alike(ours, places, step)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lorafa(decay: float, rslora: bool) -> None:
    model, places, ours = made(use_rslora=rslora)
    before = {module: p.A.copy() for module, p in ours.items()}
    opt = create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=0.01, weight_decay=decay)
    fa = LoRAFA(weight_decay=decay)
    state, root = fa.init(ours), 3**0.5 if rslora else 3
    for step in range(STEPS):
        grads = given(places, step)
        opt.step()
        state, ours = fa.update(state, ours, grads, 0.01, {"q": 6 / root, "k": 2 / root, "table": 6 / root})
        alike(ours, places, step)
    assert all(np.array_equal(ours[module].A, A) for module, A in before.items())


def test_hfs_lorafa_multiplies_in_bfloat16_unless_it_is_float64() -> None:
    model, _, ours = made(("q",))
    model.float()
    own = [model.base_model.model["q"].lora_A["default"].weight, model.base_model.model["q"].lora_B["default"].weight]
    grads = given({"q": own}, 0)
    opt = create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=0.01)
    opt.step()
    state = LoRAFA().update(LoRAFA().init(ours), ours, grads, 0.01, {"q": 2.0})[0]
    theirs = opt.state[next(iter(opt.state))]["exp_avg_B"].double().numpy()
    error = np.max(np.abs(theirs - state.m["q"].B)) / np.max(np.abs(state.m["q"].B))
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("reg", [1e-2, 0.5])
def test_riemannian(reg: float) -> None:
    model, places, ours = made()
    opt = create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.01, reg=reg, weight_decay=0.1)
    adam = AdamW(weight_decay=0.1)
    state = adam.init(ours)
    for step in range(STEPS):
        grads = preconditioned(ours, given(places, step), reg, frozenset({"table"}))
        opt.step()
        state, ours = adam.update(state, ours, grads, 0.01)
        alike(ours, places, step)


def test_a_ratio_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="ratio=0"):
        LoRAPlus(ratio=0)
