"""What the tests need to know about each method: tests/methods/<name>.py says it in `FACTS`. Without such a file all is by default."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from peft_ref.contracts import WeightMethod, declared
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Layer
from peft_ref.methods import METHODS
from tests.methods.facts import Facts


@cache
def facts(name: str) -> Facts:
    if find_spec(f"tests.methods.{name}") is None:
        return Facts()
    found: Facts = import_module(f"tests.methods.{name}").FACTS
    return found


def made(name: str, **options: Any) -> WeightMethod[Any]:
    """The method with its defaults; where a hyper-parameter has none, with the least that it needs."""
    return METHODS.weights[name](**{**facts(name).required, **options})


def small(name: str) -> WeightMethod[Any]:
    """The method in sizes for layers of a few inputs."""
    return made(name, **facts(name).small)


def free(name: str) -> bool:
    """Whether every number of each layer may be any, and is trained: no places, nothing that layers share or compute from their weight."""
    keys = [key for _, given in declared(METHODS.weights[name].params_type).values() for key in given]
    return all(key.trained and not key.shared for key in keys)


def takes(method: WeightMethod[Any], layer: Layer) -> bool:
    """Whether the method works on a layer like this."""
    try:
        method.check_layer(layer)
    except UnsupportedLayerError:
        return False
    return True
