"""Fresh adapters whose start has a name, or another word than init_weights: their numbers are of one distribution with PEFT's."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft_ref.contracts import WeightMethod  # noqa: E402
from peft_ref.layers import Conv, Embedding, Layer, Linear  # noqa: E402
from peft_ref.methods import C3A, IA3, AdaMSS, DoRA, LoKr, LoRA, VeLoRA  # noqa: E402
from tests.hf.peft_layers import own_facts  # noqa: E402
from tests.hf.test_drawn_starts import Model, distance  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
DRAWS = 3
LAYER, TABLE = Linear(in_features=48, out_features=36), Embedding(num_embeddings=48, embedding_dim=36)
GROUPS = Conv(in_channels=24, out_channels=36, kernel_size=(3,), groups=4)
RANDOM = {"velora_config": {"init_type": "random", "num_groups": 2}}
STARTS: list[tuple[WeightMethod[Any], Layer]] = [
    *((LoRA(r=4, init_lora_weights=word), layer) for word in (True, False, "gaussian") for layer in (LAYER, TABLE, GROUPS)),
    (LoRA(r=4, init_lora_weights="orthogonal"), LAYER),
    (LoRA(r=4, init_lora_weights="orthogonal"), TABLE),
    *((LoRA(r=8, init_lora_weights=word, lora_bias=True), layer) for word in (True, False) for layer in (LAYER, GROUPS)),
    *((DoRA(r=4, init_lora_weights=word), LAYER) for word in (False, "gaussian")),
    *((C3A(block_size=6, init_weights=word), LAYER) for word in ("gaussian", "kaiming_uniform", "xavier_uniform", True, False)),
    *((IA3(is_feedforward=where, init_ia3_weights=word), LAYER) for where in (True, False) for word in (True, False)),
    *((AdaMSS(r=8, num_subspaces=1, subspace_rank=4, init_weights=word), LAYER) for word in (None, "orthogonal")),
    *((LoKr(r=r, init_weights="lycoris", **more), LAYER) for r in (2, 8) for more in ({}, {"decompose_both": True, "decompose_factor": 2})),
    (VeLoRA(r=4, **RANDOM), LAYER),  # type: ignore[arg-type]
]


def options(method: WeightMethod[Any]) -> dict[str, Any]:
    more = {"feedforward_modules": ["target"] if method.is_feedforward else []} if isinstance(method, IA3) else {}
    return {**own_facts(method).peft_options(method), "target_modules": ["target"], **more}


def said(value: Any) -> str:
    word = next((getattr(value, name) for name in ("init_lora_weights", "init_weights", "init_ia3_weights") if hasattr(value, name)), "")
    return f"{type(value).__name__.lower()}-{word}"


@pytest.mark.parametrize(("method", "layer"), STARTS, ids=said)
def test_every_trained_tensor_is_drawn_as_pefts(method: WeightMethod[Any], layer: Layer) -> None:
    layer = layer.with_bias(not isinstance(layer, Embedding))
    ours: dict[str, list[Any]] = {}
    theirs: dict[str, list[Any]] = {}
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        base = Model(layer)
        W = layer.fold(base.target.weight.detach().numpy().copy())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(base, peft.PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type](**options(method)))
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, value in held.items():
            theirs.setdefault(
                name.rpartition("target.")[2].replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector"), []
            ).append(value.detach().numpy().ravel())
        start = method.init(layer, W, np.random.default_rng(seed))
        for key, value in method.pack(layer, start.params).items():
            ours.setdefault(key, []).append(value.ravel())
    assert ours.keys() <= theirs.keys()
    for key in ours.keys() - {"lora_magnitude_vector", "adamss_newB"} - {k for k in ours if k.startswith("adamss_A.")}:
        a, b = np.concatenate(ours[key]), np.concatenate(theirs[key])
        assert a.shape == b.shape, key
        assert distance(a, b) <= 2.2 * np.sqrt(2 / len(a)), key


@pytest.mark.parametrize("word", ["pissa", "olora"])
def test_a_start_without_draws_asks_less_of_a_table(word: str) -> None:
    """PEFT falls back to the default there, whatever the rank."""
    method, small = LoRA(r=5, init_lora_weights=word), Embedding(num_embeddings=4, embedding_dim=3)
    method.check_layer(small)
    start = method.init(small, np.ones((3, 4)), np.random.default_rng(0))
    plain = replace(method, init_lora_weights=True).init(small, np.ones((3, 4)), np.random.default_rng(0))
    assert np.array_equal(start.params.B, plain.params.B)
    model = peft.get_peft_model(Model(small), peft.LoraConfig(r=5, init_lora_weights=word, target_modules=["target"]))
    assert model.base_model.model.target.lora_embedding_A["default"].shape == start.params.A.shape
