"""Optimisers, clipping and schedules do what torch's and transformers' do, step after step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

import torch  # noqa: E402
import transformers  # noqa: E402

from peft_ref.errors import ConfigError, KeyMismatchError  # noqa: E402
from peft_ref.nn import schedules  # noqa: E402
from peft_ref.nn.optim import SGD, AdamW, clip_by_global_norm, global_norm  # noqa: E402
from peft_ref.nn.tree import leaves, mapped  # noqa: E402

STEPS = 60


class Inner(NamedTuple):
    a: Any
    b: Any


def tree(rng: np.random.Generator) -> dict[str, Any]:
    """Every kind of node; a size that varies over many orders, a zero gradient now and then."""
    sizes = rng.integers(0, 2, (2, 3)) * 10.0 ** rng.integers(-9, 4, (2, 3))
    return {"x": (Inner(rng.normal(size=(2, 3)) * sizes, None), rng.normal(size=4)), "y": {"z": rng.normal(size=())}}


OPTIMISERS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "adamw": (AdamW(), torch.optim.AdamW),
    "adamw set": (
        AdamW(betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3),
    ),
    "sgd": (SGD(weight_decay=0.1), lambda p: torch.optim.SGD(p, weight_decay=0.1)),
    "momentum": (SGD(momentum=0.9, dampening=0.3), lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.3)),
    "nesterov": (
        SGD(momentum=0.8, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, momentum=0.8, nesterov=True, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers(name: str) -> None:
    ours, theirs = OPTIMISERS[name]
    rng = np.random.default_rng(0)
    params = tree(rng)
    live = {where: torch.tensor(p, requires_grad=True) for where, p in leaves(params)}
    optimiser, state = theirs(list(live.values())), ours.init(params)
    for step in range(STEPS):
        grads, lr = tree(rng), 0.1 / (1 + step)
        for group in optimiser.param_groups:
            group["lr"] = lr
        for where, g in leaves(grads):
            live[where].grad = torch.tensor(g)
        optimiser.step()
        state, params = ours.update(state, params, grads, lr)
        for where, p in leaves(params):
            np.testing.assert_allclose(p, live[where].detach().numpy(), rtol=1e-12, atol=1e-14, err_msg=f"{where} at step {step}")
    assert state.step == STEPS


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_parameter_without_a_gradient_stays_and_so_does_what_is_remembered_of_it(name: str) -> None:
    ours = OPTIMISERS[name][0]
    params = {"moved": np.ones(2), "still": np.ones(2)}
    state, before = ours.update(ours.init(params), params, params, 0.1)
    remembered, after = state, before
    for _ in range(3):
        state, after = ours.update(state, after, {"moved": np.ones(2), "still": None}, 0.1)
    assert np.array_equal(after["still"], before["still"])
    assert not np.array_equal(after["moved"], before["moved"])
    for old, new in zip(remembered[1:], state[1:], strict=True):
        assert old is None or np.array_equal(old["still"], new["still"])


@pytest.mark.parametrize("part", [1e-3, 0.8, 1.3, 1e9])
def test_clipping(part: float) -> None:
    """At a part of the norm, and where it is longer than that."""
    grads = tree(np.random.default_rng(1))
    most = part * float(global_norm(grads))
    live = [torch.nn.Parameter(torch.tensor(g)) for _, g in leaves(grads)]
    for p in live:
        p.grad = p.detach().clone()
    norm = torch.nn.utils.clip_grad_norm_(live, most)
    got = clip_by_global_norm(grads, most)
    np.testing.assert_allclose(got.norm, norm.numpy(), rtol=1e-14)
    for (_, g), p in zip(leaves(got.grads), live, strict=True):
        np.testing.assert_allclose(g, p.grad, rtol=1e-13)


W, N = 7, 50
LR = 0.3
SCHEDULES: dict[str, tuple[Callable[[int], float], Callable[[Any], Any]]] = {
    "constant": (schedules.constant, transformers.get_constant_schedule),
    "warm-up": (
        lambda t: schedules.constant_with_warmup(t, warmup=W),
        lambda o: transformers.get_constant_schedule_with_warmup(o, W),
    ),
    "linear": (lambda t: schedules.linear(t, warmup=W, total=N), lambda o: transformers.get_linear_schedule_with_warmup(o, W, N)),
    "linear, cold": (lambda t: schedules.linear(t, warmup=0, total=N), lambda o: transformers.get_linear_schedule_with_warmup(o, 0, N)),
    "cosine": (lambda t: schedules.cosine(t, warmup=W, total=N), lambda o: transformers.get_cosine_schedule_with_warmup(o, W, N)),
    "cosine, 2": (
        lambda t: schedules.cosine(t, warmup=W, total=N, cycles=2),
        lambda o: transformers.get_cosine_schedule_with_warmup(o, W, N, num_cycles=2),
    ),
    "restarts": (
        lambda t: schedules.restarts(t, warmup=W, total=N, cycles=3),
        lambda o: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(o, W, N, num_cycles=3),
    ),
    "polynomial": (
        lambda t: schedules.polynomial(t, warmup=W, total=N, lr=LR, end=1e-3, power=2.5),
        lambda o: transformers.get_polynomial_decay_schedule_with_warmup(o, W, N, lr_end=1e-3, power=2.5),
    ),
    "inverse sqrt": (lambda t: schedules.inverse_sqrt(t, warmup=W), lambda o: transformers.get_inverse_sqrt_schedule(o, W)),
    "inverse sqrt, cold": (lambda t: schedules.inverse_sqrt(t, warmup=0), lambda o: transformers.get_inverse_sqrt_schedule(o, 0)),
    "inverse sqrt, 20": (
        lambda t: schedules.inverse_sqrt(t, warmup=W, timescale=20),
        lambda o: transformers.get_inverse_sqrt_schedule(o, W, timescale=20),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str) -> None:
    ours, theirs = SCHEDULES[name]
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    schedule = theirs(optimiser)
    for step in range(2 * N):
        assert abs(LR * ours(step) - schedule.get_last_lr()[0]) <= 1e-12, step
        optimiser.step()
        schedule.step()


def test_what_makes_no_sense_is_refused() -> None:
    for wrong in (lambda: AdamW(betas=(1.0, 0.9)), lambda: AdamW(eps=-1.0), lambda: SGD(nesterov=True), lambda: SGD(weight_decay=-1.0)):
        with pytest.raises(ConfigError):
            wrong()
    with pytest.raises(ConfigError, match="not below"):
        schedules.polynomial(0, warmup=0, total=5, lr=1e-8)
    with pytest.raises(KeyMismatchError, match=r"trees differ at /a: .*'b', 'c'"):
        mapped(lambda x, y: x, {"a": {"b": np.ones(1)}}, {"a": {"c": np.ones(1)}})
    with pytest.raises(ConfigError, match="no gradients"):
        clip_by_global_norm({}, 1.0)
