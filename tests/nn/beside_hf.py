"""A transformers model, in float64 throughout, under PEFT or not, beside the same model here.

transformers computes norms, softmaxes, rotary angles and losses in float32 whatever the model's dtype. `float64()` takes that away by
giving torch.float32 the meaning of torch.float64, so that a comparison can ask for nine digits and more.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import transformers

from peft_ref.contracts import WeightMethod
from peft_ref.files.adapter import AdapterFile, AdapterModule, load_adapter, load_config, state_dict
from peft_ref.files.keys import PREFIX
from peft_ref.graph import match
from peft_ref.nn import Gradients, Inputs, Model, ModelGraph, Net, model_of
from peft_ref.stack import Adapter
from tests.methods.widened import still_rounding

Host = np.ndarray[Any, Any]
transformers.logging.set_verbosity_error()
CLOSE = 1e-9


@contextmanager
def float64() -> Iterator[None]:
    before = {name: getattr(torch, name) for name in ("float32", "float")}
    method = torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    try:
        with still_rounding():
            torch.float32 = torch.float = torch.float64
            torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
            yield
    finally:
        torch.float32, torch.float = before["float32"], before["float"]
        torch.Tensor.float = method  # type: ignore[method-assign]
        torch.set_default_dtype(torch.float32)


class Pair(NamedTuple):
    live: Any  # transformers' model, or PEFT's around it
    model: Model
    net: Net
    graph: ModelGraph
    adapter: AdapterFile | None = None

    @property
    def inner(self) -> Any:
        """transformers' model with PEFT's layers in it."""
        return self.live if self.adapter is None else self.live.base_model.model


def scatter(module: Any, seed: int) -> None:
    """Every trained number of `module` random: norms and magnitudes away from 0, nothing at its special start."""
    rng = np.random.default_rng(seed)
    for name, p in module.named_parameters():
        if p.requires_grad:
            values = 0.4 * rng.normal(size=tuple(p.shape))
            p.data = torch.tensor(1 + 0.5 * values if p.ndim == 1 or "ia3_l" in name or "magnitude" in name else values)


def share_again(live: Any) -> None:
    """The factors of a head that is tied to its table are in the table's memory, as PEFT's are before `scatter`."""
    config = live.peft_config["default"]
    if getattr(config, "ensure_weight_tying", False) and config.target_modules_to_tie:
        table, head = (getattr(live.base_model.model, f"get_{side}_embeddings")() for side in ("input", "output"))
        head.lora_A["default"].weight.data = table.lora_embedding_B["default"].data.t()
        head.lora_B["default"].weight.data = table.lora_embedding_A["default"].data.t()


def pair(cls: Any, **config: Any) -> Pair:
    """The transformers model of class `cls` for a config, its numbers random, and ours with the same numbers."""
    with float64():
        live = cls(cls.config_class(attn_implementation="eager", **config)).eval()
        scatter(live, 1)
        live.tie_weights()
    said = {**live.config.to_dict(), "architectures": [cls.__name__]}
    model = model_of(said)
    held = {name: p.detach().numpy().copy() for name, p in live.named_parameters()}
    return Pair(live, model, model.net(held), ModelGraph(model=model, weights=held, model_config=said))


def adapted(plain: Pair, config: Any, folder: Path) -> Pair:
    """`plain` under a PEFT config: ours reads the adapter that PEFT saved, and puts it where our graph matches."""
    with float64(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = peft.get_peft_model(plain.live, config).eval()
        scatter(live, 2)
        live.save_pretrained(folder, save_embedding_layers=False)
    said = load_config(folder)
    assert isinstance(said.method, WeightMethod)
    found = match(said.targets, plain.graph, peft_type=said.method.peft_type, kinds=said.method.kinds)
    read = load_adapter(folder, layers={name: plain.net.layers[name] for name in found.modules})
    adapters = {name: (Adapter(m.method, m.params),) for name, m in read.modules.items()}
    # What PEFT trains whole, a classifier's head say, is a weight of ours.
    whole = {key.removeprefix(PREFIX): tensor for key, tensor in read.modules_to_save.items()}
    assert whole.keys() <= plain.net.weights.keys()
    net = replace(plain.net, weights={**plain.net.weights, **whole}, adapters=adapters, trainable=frozenset(whole))
    return Pair(live, plain.model, net, plain.graph, read)


def live_gradients(both: Pair) -> dict[str, Host]:
    """The gradients that backward left on PEFT's parameters, under the names in an adapter file."""
    held = {name: p.grad for name, p in both.live.named_parameters() if p.grad is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = peft.get_peft_model_state_dict(both.live, state_dict=held, save_embedding_layers=False)
    return {name: value.numpy() for name, value in saved.items()}


def our_gradients(both: Pair, gradients: Gradients) -> dict[str, Host]:
    assert both.adapter is not None
    modules = {}
    for name, (params,) in gradients.adapters.items():
        m = both.adapter.modules[name]
        modules[name] = AdapterModule(m.method, m.layer, params)
    return {**state_dict(modules), **{PREFIX + name: d for name, d in gradients.weights.items()}}


def to_torch(given: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.tensor(value) for name, value in given.items()}


def close(got: Any, expected: Any, what: str, rounding: float = CLOSE) -> None:
    """Equal shapes, and no number further off than `rounding` of the largest."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    size = max(1e-3, float(np.max(np.abs(expected), initial=0.0)))
    off = float(np.max(np.abs(got - expected), initial=0.0))
    assert off <= rounding * size, f"{what} is off by {off:.3g}, {rounding * size:.3g} is allowed"


def all_close(got: dict[str, Any], expected: dict[str, Any], rounding: float = CLOSE) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        close(got[name], value, name, rounding)


def check_outputs(both: Pair, given: dict[str, Any]) -> None:
    """Logits and loss are the live model's."""
    with float64(), torch.no_grad():
        expected = both.live(**to_torch(given))
    got = both.model.forward(both.net, Inputs(**given))
    close(got.logits, expected.logits, "logits", 1e-12)
    close(got.loss, expected.loss, "loss", 1e-12)
