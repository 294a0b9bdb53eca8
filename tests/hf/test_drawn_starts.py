"""Fresh adapters are drawn as PEFT draws them: the numbers of all trained tensors are of one distribution with those of PEFT's.

Kolmogorov and Smirnov's distance between the two empirical distributions; the seeds are fixed, so a right start always passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft_ref.contracts import WeightMethod  # noqa: E402
from peft_ref.layers import Layer, Linear  # noqa: E402
from peft_ref.methods import METHODS, PSOFT  # noqa: E402
from tests.hf.peft_layers import own_facts, torch_layer  # noqa: E402
from tests.methods import facts, takes  # noqa: E402

pytestmark = pytest.mark.hf
LAYER = Linear(in_features=48, out_features=36)
DRAWS = 4


class Model(torch.nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.target = torch_layer(layer, True)


def started() -> Iterator[tuple[str, WeightMethod[Any]]]:
    for name, cls in METHODS.weights.items():
        words = {f.name: f.default for f in fields(cls)}  # type: ignore[arg-type]
        if facts(name).compared or not isinstance(words.get("init_weights"), bool):
            continue
        loose = {word: None for word in ("widest_in", "widest_out") if word in words}
        for label, method in facts(name).settings.items():
            for start in (True, False):
                wanted = replace(method, init_weights=start, **loose)
                if takes(wanted, LAYER):
                    yield f"{label} {start}", wanted


def distance(a: Any, b: Any) -> float:
    """The largest between the shares of their numbers that are not above some number; a rounding sets none apart."""
    a, b = np.sort(np.round(a, 5)), np.sort(np.round(b, 5))
    every = np.concatenate([a, b])
    shares = [np.searchsorted(some, every, "right") / len(some) for some in (a, b)]
    return float(np.max(np.abs(shares[0] - shares[1]), initial=0.0))


STARTED = dict(started()) | {  # of many numbers, where a method has few of some kind
    f"psoft of every direction {orth}": PSOFT(r=36, psoft_orth=orth, init_weights=False) for orth in (True, False)
}


@pytest.mark.parametrize("label", STARTED)
def test_every_trained_tensor_is_drawn_as_pefts(label: str) -> None:
    method = STARTED[label]
    cls: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type]
    options = {**own_facts(method).peft_options(method), "init_weights": method.init_weights, "target_modules": ["target"]}
    ours: dict[str, list[Any]] = {}
    theirs: dict[str, list[Any]] = {}
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        base = Model(LAYER)
        W = base.target.weight.detach().numpy().copy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(base, cls(**options))
        for key, value in peft.get_peft_model_state_dict(model).items():
            theirs.setdefault(key.rpartition("target.")[2].removeprefix("base_model.").removesuffix(".0"), []).append(value.numpy().ravel())
        start = method.init(LAYER, W, np.random.default_rng(seed))
        trained = {s.key for s in method.spec(LAYER) if s.trained}
        for key in trained:
            ours.setdefault(key, []).append(method.pack(LAYER, start.params)[key].ravel())
    assert ours.keys() <= theirs.keys()
    for key in ours:
        a, b = np.concatenate(ours[key]), np.concatenate(theirs[key])
        assert a.shape == b.shape, key
        assert distance(a, b) <= 2.2 * np.sqrt(2 / max(1, len(a))), key
