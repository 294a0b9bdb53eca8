"""What all layers of an adapter share is trained once: its gradient is the sum over the layers, and a step keeps it one array."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_ref.files.adapter import all_tensors
from peft_ref.files.config import from_dict
from peft_ref.nn.optim import SGD, global_norm
from peft_ref.train import Recipe, Training, begin, file_of, put_back, start, step
from tests.laws.test_gradients import slope
from tests.train.test_steps import MODEL, batch, graph, weights

CONFIGS: dict[str, dict[str, Any]] = {
    "frod": {"peft_type": "FROD", "sparse_rate": 0.2},
    "tinylora": {"peft_type": "TINYLORA", "r": 2, "u": 3, "weight_tying": 0.5, "init_weights": "uniform", "init_v_bound": 0.5},
    "vblora": {"peft_type": "VBLORA", "r": 2, "num_vectors": 3, "vector_length": 2, "topk": 3, "init_vector_bank_bound": 0.5},
    "vera": {"peft_type": "VERA", "r": 3, "d_initial": 0.5},
}
HELD = {"frod", "vera"}  # what is shared is not trained


def training(name: str) -> Training:
    said = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], **CONFIGS[name]}
    return start(MODEL, graph(weights()), from_dict(said), np.random.default_rng(3))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_of_what_is_shared_is_the_slope_of_the_loss(name: str) -> None:
    made, rng = training(name), np.random.default_rng(5)
    p = made.params
    got = made.learner.loss_vjp(p, [batch()]).gradients
    assert p.shared
    for key, value in p.shared.items():
        if got.shared[key] is None:
            assert name in HELD, key
            continue
        v = rng.normal(size=value.shape)

        def loss(t: float, key: str = key, value: Any = value, v: Any = v) -> float:
            return float(made.learner.loss(p._replace(shared={**p.shared, key: value + t * v}), [batch()]))

        assert np.sum(got.shared[key] * v) == pytest.approx(slope(loss), rel=1e-6)
    for name_, params in got.adapters.items():
        assert all(getattr(params, field) is None for field in made.learner.references[name_])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_keeps_it_one_array_and_counts_it_once(name: str) -> None:
    made = training(name)
    recipe = Recipe(optimizer=SGD(), lr=0.5)
    done = step(made.learner, recipe, begin(recipe, made.params), [batch()])
    modules = put_back(made, done.state.params).attached("default").modules
    used = set()
    for module, keys in made.learner.references.items():
        for field, key in keys.items():
            assert getattr(modules[module].params, field) is done.state.params.shared[key]
            moved = bool(np.any(done.state.params.shared[key] != made.params.shared[key]))
            assert moved == (name not in HELD)
            used.add(key)
    assert used == set(made.params.shared)
    assert done.norm == global_norm(made.learner.loss_vjp(made.params, [batch()]).gradients)
    tensors = all_tensors(file_of(made, done.state))
    assert sorted(k for k in tensors if not k.startswith("base_model.model.")) == sorted(f"base_model.{k}" for k in made.params.shared)
