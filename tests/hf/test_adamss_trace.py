"""AdaMSS's allocator of subspaces, step by step beside HF PEFT's: who is still trained, and both averages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("sklearn")

from peft_ref.methods.adamss import AdaMSS  # noqa: E402
from peft_ref.methods.adamss_asa import State, after_step, scores, target, trained  # noqa: E402
from tests.methods.adamss import clustered, options  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]

MODULES = ("one", "two", "three")
SHARED: dict[str, Any] = {"r": 6, "num_subspaces": 4, "subspace_rank": 2, "use_asa": True}
SCHEDULES = {
    "down to five": {"asa_target_subspaces": 5, "init_warmup": 2, "final_warmup": 14, "mask_interval": 3},
    "at every step": {"asa_target_subspaces": 2, "init_warmup": 0, "final_warmup": 9, "mask_interval": 1},
    "linear": {"asa_target_subspaces": 3, "init_warmup": 1, "final_warmup": 11, "mask_interval": 2, "asa_schedule_exponent": 1.0},
    "steep": {"asa_target_subspaces": 4, "init_warmup": 3, "final_warmup": 15, "mask_interval": 4, "asa_schedule_exponent": 5.0},
    "only once": {"asa_target_subspaces": 6, "init_warmup": 4, "final_warmup": 9, "mask_interval": 8},
    "more than there are": {"asa_target_subspaces": 50, "init_warmup": 2, "final_warmup": 10, "mask_interval": 2},
    "other averages": {
        "asa_target_subspaces": 5,
        "init_warmup": 2,
        "final_warmup": 14,
        "mask_interval": 5,
        "asa_importance_beta": 0.5,
        "asa_uncertainty_beta": 0.95,
    },
}


def live(**schedule: Any) -> tuple[Any, dict[str, AdaMSS]]:
    """PEFT's model of three layers in float64, and every layer's method here."""
    torch.manual_seed(5)
    base = torch.nn.ModuleDict({"one": torch.nn.Linear(7, 9), "two": torch.nn.Linear(5, 12, bias=False), "three": torch.nn.Linear(8, 10)})
    method = AdaMSS(**SHARED, **schedule)
    config = peft.AdamssConfig(target_modules=list(MODULES), **options(method))
    model = peft.get_peft_model(base.double(), config, autocast_adapter_dtype=False)
    return model, {name: clustered(getattr_of(model, name), "default", method) for name in MODULES}


def getattr_of(model: Any, name: str) -> Any:
    return model.base_model.model[name]


def step_of(model: Any, methods: dict[str, AdaMSS], rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    """New numbers and gradients in PEFT's parameters, and the same here. What is trained no longer has none there."""
    params, grads = {}, {}
    for name, method in methods.items():
        own: dict[str, Any] = {}
        slopes: dict[str, Any] = {}
        layer = getattr_of(model, name)
        for end in "AB":
            for i, parameter in enumerate(getattr(layer, f"adamss_{end}")["default"]):
                p, g = rng.normal(size=parameter.shape), rng.normal(size=parameter.shape)
                own[f"{end}{i}"], slopes[f"{end}{i}"] = p, g
                parameter.data = torch.tensor(p)
                parameter.grad = torch.tensor(g) if parameter.requires_grad else None
        params[name], grads[name] = method.to_params(**own), method.to_params(**slopes)
    return params, grads


def trained_there(model: Any) -> dict[str, list[int]]:
    lists = {name: getattr_of(model, name).adamss_A["default"] for name in MODULES}
    return {name: [i for i, A in enumerate(found) if A.requires_grad] for name, found in lists.items()}


def assert_same_averages(model: Any, state: State) -> None:
    for name in MODULES:
        layer = getattr_of(model, name)
        for ours, word in ((state.importance, "ipt"), (state.uncertainty, "unc")):
            for end in "AB":
                theirs = getattr(layer, f"exp_avg_{word}_{end}")["default"]
                there = {f"{end}{i}": v.numpy() for i, v in enumerate(theirs) if v is not None}
                mine = {field: v for field, v in ours.get(name, {}).items() if field.startswith(end)}
                assert mine.keys() == there.keys()
                for field, value in there.items():
                    np.testing.assert_allclose(mine[field], value, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("seed", [1, 2])
def test_every_step_of_the_allocator_is_pefts(schedule: dict[str, Any], seed: int) -> None:
    model, methods = live(**schedule)
    rng, state, counts = np.random.default_rng(seed), State(), []
    for step in range(18):
        params, grads = step_of(model, methods, rng)
        model.base_model.update_and_allocate(step)
        state = after_step(methods["one"], state, params, grads, step)
        assert trained(state, params) == trained_there(model), step
        assert_same_averages(model, state)
        counts.append(sum(map(len, trained(state, params).values())))
    assert counts == sorted(counts, reverse=True)
    assert (counts[-1] < 12) == (schedule["asa_target_subspaces"] < 12)


def test_of_k_subspaces_hf_keeps_one_less_and_whole_keeps_k() -> None:
    """ADAMSS-Q1"""
    model, methods = live(**SCHEDULES["only once"])
    method, rng, theirs, ours = methods["one"], np.random.default_rng(3), State(), State()
    for step in range(9):
        params, grads = step_of(model, methods, rng)
        model.base_model.update_and_allocate(step)
        before = ours
        theirs, ours = after_step(method, theirs, params, grads, step), after_step(method, ours, params, grads, step, whole=True)
    wanted = target(method, 12, 8)
    kept = sum(map(len, trained_there(model).values()))
    assert kept == sum(map(len, trained(theirs, params).values())) == wanted - 1
    assert sum(map(len, trained(ours, params).values())) == wanted
    assert len(scores(before)) == 12


def test_without_asa_and_outside_its_steps_nothing_happens() -> None:
    _, methods = live(**SCHEDULES["only once"])
    method = methods["one"]
    nothing = {"one": method.to_params(A0=np.ones((1, 2)), B0=np.ones((3, 1)))}
    for off, step in ((replace(method, use_asa=False), 8), (method, 3), (method, 10)):
        assert after_step(off, State(), nothing, nothing, step) == State()
