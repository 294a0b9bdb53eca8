"""What no file of an adapter holds and its configuration makes again: projections drawn from a seed, places in a weight.

It is made for all layers of an adapter together, and kept for the last adapter that was asked for.
"""

from __future__ import annotations

import threading
from functools import cache, lru_cache
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


def remade(home: Home, adapter: Path, module: str, fields: tuple[str, ...], known: Any) -> dict[str, NDArray]:
    """These fields of the parameters at `module`, of which `known` has the others."""
    with _one_at_a_time:
        model, placed, made = _made(home, adapter)
        method, layer = placed.config.method_for(module), placed.layers[module]
        drawn = [s.field for s in method.spec(layer) if s.field in fields and not s.derived]
        params = made() if drawn else {}
    found = {field: getattr(params[module], field) for field in drawn} if module in params else {}
    found = {field: value for field, value in found.items() if value is not None}
    if left := [field for field in fields if field not in found]:  # worked out of the frozen weight, and of what is known
        start = method.start(layer, Matrices(model, placed.layers)[module], np.random.default_rng(0), known._replace(**found)).params
        found |= {field: getattr(start, field) for field in left}
    return {field: np.asarray(value) for field, value in found.items()}


@lru_cache(maxsize=1)
def _made(home: Home, adapter: Path) -> Any:
    model = adapt(CheckpointGraph(home.folder, prefix=home.prefix))
    placed = place(model, load_config(adapter))
    return model, placed, cache(lambda: common(model, placed, np.random.default_rng(0)))
