"""An adapter's modules read from their file when they are asked for, one at a time, each time anew: nothing of it stays in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

from peft_ref.arrays import Array
from peft_ref.contracts import ParamSpec
from peft_ref.errors import ShapeError
from peft_ref.files.adapter import AdapterModule
from peft_ref.files.config import AdapterConfig
from peft_ref.files.keys import PREFIX
from peft_ref.files.safetensors import SafetensorsFile
from peft_ref.layers import Layer
from peft_ref.model.numbers import as_stored, brought


def read_later(specs: Sequence[ParamSpec]) -> list[ParamSpec]:
    """What is read module by module: all but what is shared, or not in the file."""
    return [s for s in specs if s.saved and not s.shared]


@final
class LazyModules(Mapping[str, AdapterModule]):
    """The modules of an adapter in `file`. Its header is checked now, its numbers come later, like `like`."""

    def __init__(
        self,
        file: SafetensorsFile,
        config: AdapterConfig,
        layers: Mapping[str, Layer],
        like: Array,
        beside: Mapping[str, Any],
        following: Mapping[str, str],
    ) -> None:
        self.like = like
        self._beside = beside  # by module, what is not read from its own tensors: what it shares, what is made again
        self._file, self._config, self._layers, self._following = file, config, dict(layers), dict(following)
        for name, layer in self._layers.items():
            for spec in read_later(config.method_for(name).spec(layer)):
                if (came := file.entries[f"{PREFIX}{name}.{spec.key}"].shape) != spec.stored_shape:
                    raise ShapeError(f"{PREFIX}{name}.{spec.key} is {came}, expected {spec.stored_shape}.\n  {config.method} on {layer}.")

    def __getitem__(self, name: str) -> AdapterModule:
        layer = self._layers[name]
        if name in self._following:
            return AdapterModule(self._config.method_for(name), layer, self[self._following[name]].params)
        method = self._config.method_for(name)
        tensors = {s.key: brought(self._file.read(f"{PREFIX}{name}.{s.key}"), self.like) for s in read_later(method.spec(layer))}
        if method.swaps:
            tensors = {key: as_stored(tensor, self.like) for key, tensor in tensors.items()}
        params = method.unpack(layer, tensors, where=PREFIX + name, own=True)
        return AdapterModule(method, layer, params._replace(**self._beside.get(name, {})))

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensors
        return name in self._layers
