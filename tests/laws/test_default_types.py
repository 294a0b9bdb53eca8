"""The default of every field is of the type that the field says, so that nobody needs to know what else counts as missing."""

from __future__ import annotations

from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

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
