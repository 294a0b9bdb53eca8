"""What the layers of one adapter share: made once, held once, and referred to by the parameters of each.

    shared      the arrays by their keys in a file: equal references are one array
    unshared    the parameters without them, as they are trained layer by layer, and `link` of peft_ref.files undoes it

A method says what is made for all layers together (`WeightMethod.common`) and which file key each layer's field refers to (`shared_keys`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np

from peft_ref.arrays import Array, namespace
from peft_ref.contracts import WeightMethod
from peft_ref.errors import ConfigError
from peft_ref.files.adapter import AdapterModule, link
from peft_ref.layers import Layer
from peft_ref.model.adapted import Adapted
from peft_ref.model.numbers import as_stored, brought, wide
from peft_ref.model.placing import Placed
from peft_ref.model.tokens import followed


@final
class Matrices(Mapping[str, Array]):
    """The frozen weights of the adapted modules as matrices, each made when it is asked for."""

    def __init__(self, model: Adapted, layers: Mapping[str, Layer]) -> None:
        self._model, self._layers = model, layers

    def __getitem__(self, module: str) -> Array:
        key = self._model.modules()[module].weight
        if key is None:
            raise ConfigError(f"{module!r} has no parameter called weight, which an adapter could change.")
        return wide(self._layers[module].fold(self._model.frozen(key)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def common(model: Adapted, placed: Placed, rng: np.random.Generator) -> Mapping[str, Any]:
    """What a fresh adapter's layers are given that is made for all of them."""
    method = placed.config.method
    return method.common(placed.layers, Matrices(model, placed.layers), rng) if isinstance(method, WeightMethod) else {}


def completed(model: Adapted, placed: Placed, modules: Mapping[str, AdapterModule]) -> dict[str, AdapterModule]:
    """The modules with what their file left out, made again from the configuration, or from the frozen weight."""
    out = dict(modules)
    made: Mapping[str, Any] | None = None
    for name, (method, layer, params) in modules.items():
        if name in placed.following:
            continue
        absent = [s for s in method.spec(layer) if not s.saved and getattr(params, s.field) is None]
        if any(not s.derived for s in absent) and made is None:
            made = common(model, placed, np.random.default_rng(0))
        drawn = [s.field for s in absent if not s.derived and made and name in made]
        if made and drawn:
            out[name] = modules[name]._replace(params=params._replace(**{field: getattr(made[name], field) for field in drawn}))
        out[name] = worked_out(model, name, out[name], [s.field for s in absent if s.field not in drawn])
    return followed(out, placed.following, placed.following)


def worked_out(model: Adapted, name: str, module: AdapterModule, fields: Sequence[str]) -> AdapterModule:
    """A module with these fields as its `start` makes them of the frozen weight and of what the module holds."""
    if not fields:
        return module
    method, layer, params = module
    start = method.start(layer, Matrices(model, {name: layer})[name], np.random.default_rng(0), params).params
    return module._replace(params=params._replace(**{field: getattr(start, field) for field in fields}))


def given_apart(model: Adapted, placed: Placed, arrays: Mapping[str, Array], like: Array) -> dict[str, dict[str, Array]]:
    """By module, the fields that are not read from its own tensors: what it shares, and what is made again."""
    bare = {}
    for name, layer in placed.layers.items():
        method = placed.config.method_for(name)
        bare[name] = AdapterModule(method, layer, method.to_params())
    whole = completed(model, placed, brought_modules(link(bare, arrays), dict.fromkeys(bare, like)))
    return {name: {f: v for f, v in m.params._asdict().items() if v is not None} for name, m in whole.items()}


def shared(modules: Mapping[str, AdapterModule]) -> dict[str, Array]:
    """What the modules share, by key. Raises `ConfigError` where two of them have different arrays for one."""
    found: dict[str, Array] = {}
    keys: Mapping[str, Mapping[str, str]] = {}
    for name, (method, _, params) in modules.items():
        keys = keys or method.shared_keys(tuple(modules))
        for field, key in keys.get(name, {}).items():
            value = getattr(params, field)
            first = found.setdefault(key, value)
            if first is not value and not bool(namespace(first).all(first == value)):
                raise ConfigError(f"{name!r} has another {key} than the modules before it, with which it shares one.\n  Give all the same.")
    return found


def unshared(modules: Mapping[str, AdapterModule]) -> dict[str, AdapterModule]:
    """The modules without what they share."""
    out = {}
    for name, m in modules.items():
        gone = {s.field: None for s in m.method.spec(m.layer) if s.shared}
        out[name] = m._replace(params=m.params._replace(**gone)) if gone else m
    return out


def brought_modules(modules: Mapping[str, AdapterModule], likes: Mapping[str, Array]) -> dict[str, AdapterModule]:
    """Modules from a file with their numbers in the library and dtype of `likes`; what they share stays one array."""
    once: dict[int, Array] = {}
    out = {}
    for name, m in modules.items():
        fields = {s.field for s in m.method.spec(m.layer) if s.shared}
        values: dict[str, Array | None] = {}
        for field, value in m.params._asdict().items():
            if value is None:
                values[field] = None
            elif field in fields:
                values[field] = once[id(value)] if id(value) in once else once.setdefault(id(value), brought(value, likes[name]))
            else:
                values[field] = brought(value, likes[name])
                values[field] = as_stored(values[field], likes[name]) if m.method.swaps else values[field]
        out[name] = m._replace(params=type(m.params)(**values))
    return out
