"""Trainings with PVeRA's and MonteCLoRA's noise: PEFT in training mode is given the draws that ours acted with."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.hf

import peft  # noqa: E402
import torch  # noqa: E402

from peft_ref.methods import MonteCLoRA  # noqa: E402
from peft_ref.nn.optim import AdamW  # noqa: E402
from peft_ref.stack import Drawn, Dropout  # noqa: E402
from peft_ref.train import Recipe, begin, step  # noqa: E402
from peft_ref.train.dropout import with_dropout  # noqa: E402
from tests.nn.beside_hf import close, float64  # noqa: E402
from tests.train.beside_methods import Q  # noqa: E402
from tests.train.test_beside_peft import Case, Masked, batch, both, compare, example, live_loss  # noqa: E402

SAMPLED = {"num_samples": 3, "sample_scaler": 0.5, "buffer_size": 2}
CASES = {
    "pvera": Case(peft.PveraConfig, {"r": 3, "target_modules": Q, "pvera_dropout": 0.25}),
    "monteclora": Case(
        peft.LoraConfig,
        {"r": 2, "lora_alpha": 5, "target_modules": Q, "lora_dropout": 0.25, "monteclora_config": peft.MontecloraConfig(**SAMPLED)},
        accumulate=2,
    ),
}


class Given(torch.nn.Module):
    """A sampler's buffer, or a dropout, that hands out what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Any] = []

    def get(self) -> Any:
        return self.draws.pop(0)

    def forward(self, x: Any) -> Any:
        return Masked(self.draws.pop(0))(x)


def tuners(live: Any) -> dict[str, Any]:
    return {name: m for name, m in live.base_model.model.named_modules() if hasattr(m, "lora_A") or hasattr(m, "pvera_lambda_b")}


def prepared(name: str, live: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Given, Given]]:
    """By module the places that its noise and its dropout come from."""
    places = {}
    for module, tuner in tuners(live).items():
        noise, dropout = Given(), Given()
        if name == "pvera":
            tuner.pvera_dropout["default"] = dropout
            monkeypatch.setattr(tuner, "_reparametrize", lambda mu, logvar, _, noise=noise: mu + noise.get() * torch.exp(0.5 * logvar))
        else:
            tuner.lora_dropout["default"] = dropout
            tuner.lora_monteclora_sampler["default"].sampler = noise
        places[module] = noise, dropout
    return places


def as_pefts(noise: Any) -> Any:
    if isinstance(noise, np.ndarray):
        return torch.from_numpy(noise)
    return {"z_mvn": torch.from_numpy(noise.z), "z_wishart": torch.from_numpy(noise.Z), "z_dirichlet": torch.from_numpy(noise.zeta)}


@pytest.mark.parametrize("name", CASES)
def test_a_training_with_noise_stays_beside_pefts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's Cholesky decompositions are in float32, so MonteCLoRA's noise has 1e-7 of itself as its error."""
    case, near = CASES[name], 1e-8 if name == "pvera" else 1e-5
    live, training = both(case, tmp_path)
    live.train()  # this Llama has no dropout of its own
    places, rng = prepared(name, live, monkeypatch), np.random.default_rng(5)
    assert places.keys() == training.learner.methods.keys()
    trained = [p for p in live.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=0.03, weight_decay=0.1)
    recipe = Recipe(optimizer=AdamW(weight_decay=0.1), lr=0.03)
    state = begin(recipe, training.params)
    for number in range(5):
        given = [example(case, rng) for _ in range(case.accumulate)]
        drawn = [with_dropout(training.learner, batch(g), rng, np.zeros(0)) for g in given]
        for module, (noise, dropout) in places.items():
            for every in drawn:
                drops = every.dropout[module]
                assert isinstance(drops, Drawn)
                assert isinstance(drops.input, Dropout)
                noise.draws.append(as_pefts(drops.noise))
                dropout.draws.append(drops.input.mask / 0.75)
        with float64(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = live_loss(live, case, given)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        assert not any(noise.draws or dropout.draws for noise, dropout in places.values())
        without = training.learner.loss(state.params, [batch(g) for g in given])
        state, ours, _ = step(training.learner, recipe, state, drawn)
        close(ours, loss.detach(), f"loss {number}", near)
        assert abs(float(ours) - float(without)) > 1e-4
    compare(live, training, state, near)


def test_noise_is_normal_and_of_wisharts_law_and_each_token_has_its_own(tmp_path: Path) -> None:
    """Means and variances of 400 draws, within five of their deviations. E Z = r I; Z_ii is chi-squared, of variance 2 r."""
    rng = np.random.default_rng(0)
    for name, case in CASES.items():
        _, training = both(case, tmp_path / name)
        given = batch(example(case, rng))
        draws = [with_dropout(training.learner, given, rng, np.zeros(0)).dropout for _ in range(400)]
        module = "model.layers.0.mlp.down_proj"  # 10 numbers in
        noise: list[Any] = [d[module].noise for d in draws]  # type: ignore[union-attr]
        normal = {"zeta": np.stack([n.zeta for n in noise]), "z": np.stack([n.z for n in noise])} if name == "monteclora" else {"e": noise}
        for which, numbers in normal.items():
            sample = np.asarray(numbers)
            assert sample.shape == (400, *{"zeta": (3,), "z": (3, 10, 2), "e": (3, 6, 3)}[which])
            assert abs(sample.mean()) < 5 / sample.size**0.5
            assert abs(sample.var() - 1) < 5 * (2 / sample.size) ** 0.5
            assert len(np.unique(sample)) == sample.size
        if name == "monteclora":
            Z = np.stack([n.Z for n in noise])
            assert isinstance(training.learner.methods[module], MonteCLoRA)
            np.testing.assert_allclose(Z.mean(axis=0), 2 * np.eye(2), atol=5 * (4 / 400) ** 0.5)
            np.testing.assert_allclose(Z[:, [0, 1], [0, 1]].var(axis=0), 4, rtol=5 * (8 / 400) ** 0.5)
            np.testing.assert_array_equal(Z, Z.mT)
