"""The cases: every variant of every method on every layer and operation it is asked about, always the same and in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from peft_ref.check.attending import attention_cases
from peft_ref.check.case import Case, build_method
from peft_ref.check.mistake import Suite
from peft_ref.check.mistakes import SUITES
from peft_ref.check.prompting import prompt_cases
from peft_ref.check.text_cases import text_cases
from peft_ref.check.variants import LAYERS, Variant, make_case
from peft_ref.contracts import Additive, LowRank, Method, WeightMethod
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Layer
from peft_ref.methods import METHODS


def corpus(method: str | None = None) -> tuple[Case, ...]:
    """Every case, of one method or of all, those of installed packages too."""
    SUITES.discover()
    names = [method] if method else sorted(METHODS)
    return tuple(case for name in names for case in _of(name, METHODS[name], SUITES.of(name)))


@cache
def _of(name: str, cls: type[Method], suite: Suite) -> tuple[Case, ...]:
    """One method's. Class and suite are what the cache goes by: a registered method can be taken out and come back changed."""
    text = () if name in METHODS.registered else text_cases(name)  # those know the methods of HF PEFT
    return (*_cases(name, suite.variants), *prompt_cases(name, suite.prompts), *attention_cases(name, suite.attention), *suite.cases, *text)


def _cases(name: str, variants: tuple[Variant, ...]) -> Iterator[Case]:
    for variant in variants:
        for layer_name in variant.layers:
            layer = LAYERS[layer_name]
            methods = [build_method(name, {"peft_type": METHODS[name].peft_type, **c}) for c in variant.configs]
            for operation in variant.operations:
                if _asked(methods, layer, operation, variant):
                    yield make_case(name, variant, layer_name, layer, methods, operation)


def _asked(methods: list[WeightMethod[Any]], layer: Layer, operation: str, variant: Variant) -> bool:
    for method in methods:
        try:
            method.check_layer(layer)
        except UnsupportedLayerError:
            return False
    if operation == "delta":  # it knows neither bias nor dropout: the plain variants say it all
        return variant.name == "plain" and layer.groups == 1 and isinstance(methods[0], LowRank | Additive)
    if operation in ("merge", "unmerge"):
        held = layer.groups == 1 or not any(isinstance(m, LowRank) for m in methods)
        return held and not variant.dropout and (variant.bias or not any(c.get("lora_bias") for c in variant.configs))
    return True
