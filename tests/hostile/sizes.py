"""Every integer of every method's configuration said to be a billion, beside tensors that are small: `python -m tests.hostile.sizes`.

A line of JSON for each: what became of it in a child with a limit of memory. The integers are found by the types of the fields.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from peft_ref.attending import AttentionMethod
from peft_ref.errors import PeftRefError
from peft_ref.files.adapter import AdapterModule, load_adapter, spanned, state_dict
from peft_ref.files.config import DERIVED, AdapterConfig, flatten, from_dict
from peft_ref.files.rules import field_names
from peft_ref.files.safetensors import serialize
from peft_ref.layers import Embedding, Layer, Linear
from peft_ref.methods import METHODS
from peft_ref.prompts import SAVED, Prompt
from tests.hostile.corpus import CONFIG, WEIGHTS
from tests.hostile.doors import in_a_child
from tests.methods import facts

BILLION = 10**9
LAYERS: Mapping[str, Mapping[str, Layer]] = {
    "linear": {f"layers.{i}.q": Linear(in_features=16, out_features=16) for i in range(2)},
    "embedding": {"embed": Embedding(num_embeddings=16, embedding_dim=16)},
}
INTEGERS = (int, int | None, float | int, list[int] | None)


def integers(cls: Any) -> list[str]:
    hints = get_type_hints(cls)
    return [name for name in field_names(cls) if name not in DERIVED and hints[name] in INTEGERS]


def made(data: Mapping[str, Any]) -> tuple[Mapping[str, Layer], dict[str, Any]] | None:
    """The layers, and what a file holds of fresh adapters on them; None where the configuration is for no layer here."""
    for layers in LAYERS.values():
        try:
            config, rng = spanned(from_dict(data), layers, {}), np.random.default_rng(0)
            weights = {name: rng.normal(size=layer.shape) for name, layer in layers.items()}
            method: Any = config.method
            together = method.common(layers, weights, rng)
            modules = {}
            for name, layer in layers.items():
                own = config.method_for(name)
                own.check_layer(layer, name)
                modules[name] = AdapterModule(own, layer, own.start(layer, weights[name], rng, together.get(name)).params)
            return layers, state_dict(modules)
        except PeftRefError:
            continue
    return None


def given(name: str) -> tuple[Mapping[str, Any], Mapping[str, Layer], dict[str, Any]] | None:
    """A configuration of the method, its layers and its tensors."""
    own, cls = facts(name), METHODS[name]
    if issubclass(cls, Prompt):
        data = {"peft_type": cls.peft_type, "task_type": "CAUSAL_LM", "num_virtual_tokens": 2, "token_dim": 8, "num_layers": 1}
        return data, {}, {SAVED: np.zeros((2, 8), np.float32)}
    tried = [{**own.config, **own.small}] if own.config else []
    tried += [flatten(AdapterConfig(method=method)) for method in own.settings.values()]
    return next(((data, *found) for data in tried if (found := made(data)) is not None), None)


def told(cls: Any, data: Mapping[str, Any], layers: Mapping[str, Layer], tensors: Mapping[str, Any], folder: Path) -> int:
    """How many of the integers were refused; any other error is raised under the integer's name."""
    refused = 0
    (folder / WEIGHTS).write_bytes(serialize(tensors, {}))
    for word in integers(cls):
        (folder / CONFIG).write_text(json.dumps({**data, word: BILLION}))
        for known in (None, layers or None):
            try:
                load_adapter(folder, layers=known)
            except PeftRefError:
                refused += 1
            except BaseException as error:
                raise AssertionError(f"{word}: {type(error).__name__}: {error!s:.200}") from error
    return refused


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, cls in METHODS.items():
            if issubclass(cls, AttentionMethod):
                continue
            found = given(name)
            if found is None:
                print(json.dumps({"case": name, "error": "not made", "message": ""}), flush=True)
                continue
            row = in_a_child(lambda folder, right, cls=cls, found=found: told(cls, *found, folder), folder, folder)  # type: ignore[misc]
            print(json.dumps({"case": name, "integers": len(integers(cls)), **row}), flush=True)


if __name__ == "__main__":
    main()
