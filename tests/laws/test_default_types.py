"""What a class says, and the default of every field, is of the type that it names: nobody needs to know what else counts as missing."""

from __future__ import annotations

from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

import pytest

from peft_ref.methods import METHODS

CLASSES = [*METHODS.weights.values(), *METHODS.prompts.values(), *METHODS.attention.values()]


def is_of(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(is_of(value, one) for one in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is None or hint is NoneType:
        return value is None
    return hint is Any or isinstance(value, get_origin(hint) or hint)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_default_is_of_its_fields_type(cls: Any) -> None:
    hints = get_type_hints(cls)
    wrong = [f.name for f in fields(cls) if f.default is not MISSING and not is_of(f.default, hints[f.name])]
    assert not wrong


@pytest.mark.parametrize("cls", CLASSES)
def test_what_a_class_says_of_its_method_is_of_its_type(cls: Any) -> None:
    said = {name: get_args(hint)[0] for name, hint in get_type_hints(cls).items() if get_origin(hint) is ClassVar}
    wrong = [name for name, hint in said.items() if hasattr(cls, name) and not is_of(getattr(cls, name), hint)]
    assert said
    assert not wrong
