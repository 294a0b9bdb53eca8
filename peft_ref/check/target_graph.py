"""The model of a question about targets: names and kinds, and not one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, final

from peft_ref.arrays import Array
from peft_ref.errors import KeyMismatchError
from peft_ref.graph.protocol import Graph, Module, Parameter
from peft_ref.graph.targets import Targets, match


@final
class NamesOnly(Graph):
    """Modules as a case lists them, and the model's config with the name of its output head."""

    def __init__(self, modules: Sequence[Mapping[str, str]], model: Mapping[str, Any]) -> None:
        self._modules = {m["name"]: Module(name=m["name"], kind=m["kind"], class_name=m.get("class", "")) for m in modules}
        self._model = model

    @property
    def config(self) -> Mapping[str, Any]:
        return self._model

    @property
    def output_head(self) -> str | None:
        head = self._model.get("output_head")
        return None if head is None else str(head)

    @property
    def pretrained(self) -> bool:
        return True

    def modules(self) -> Mapping[str, Module]:
        return self._modules

    def parameters(self) -> Mapping[str, Parameter]:
        return {}

    def weight(self, name: str) -> Array:
        raise KeyMismatchError(f"{name}: this model has names only.")


def matched_names(modules: Sequence[Mapping[str, str]], config: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """The names that a configuration targets, in the model's order. Raises `TargetError` where PEFT refuses."""
    known = {f.name for f in fields(Targets)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
    return list(match(Targets(**given), NamesOnly(modules, model)).modules)
