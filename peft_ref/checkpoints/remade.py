"""What no file of an adapter holds and its configuration makes again: projections drawn from a seed, places in a weight.

It is made for all layers of an adapter together, and kept for the last adapter that was asked for.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_ref.checkpoints.plan import NDArray
from peft_ref.files.adapter import load_config
from peft_ref.graph import CheckpointGraph
from peft_ref.model.adapted import adapt
from peft_ref.model.placing import place
from peft_ref.model.sharing import Matrices, common

_one_at_a_time = threading.Lock()


class Home(NamedTuple):
    """The base, under the names of the live model."""

    folder: Path
    prefix: str


def remade(home: Home, adapter: Path, module: str, fields: tuple[str, ...]) -> dict[str, NDArray]:
    """These fields of the parameters at `module`."""
    with _one_at_a_time:
        model, placed, made = _made(home, adapter)
    params = made.get(module)
    if params is None or any(getattr(params, field) is None for field in fields):
        layer = placed.layers[module]
        params = placed.config.method_for(module).init(layer, Matrices(model, placed.layers)[module], np.random.default_rng(0)).params
    return {field: np.asarray(getattr(params, field)) for field in fields}


@lru_cache(maxsize=1)
def _made(home: Home, adapter: Path) -> Any:
    model = adapt(CheckpointGraph(home.folder, prefix=home.prefix))
    placed = place(model, load_config(adapter))
    return model, placed, common(model, placed, np.random.default_rng(0))
