"""A map within a configuration, as `kasa_config` is one: a frozen dataclass here, so that a method stays one value.

HF      writes such a map with every key, and drops a key that it does not know when it reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from peft_ref.errors import ConfigError

T = TypeVar("T")


def as_submap(cls: type[T], name: str, value: Any) -> T:
    """The dataclass that `value` of the key `name` says: one already, or a map. A key that is unknown is left out, as HF does."""
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}={value!r:.60}: a map is needed, {{}} for every default (HF PEFT refuses it too).")
    known = {f.name: f.default for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # a dataclass
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in value.items() if key in known}
    for key, v in given.items():
        wanted = (int, float) if isinstance(known[key], float) else (bool, int, str, tuple, type(None))
        if not isinstance(v, wanted) or (isinstance(v, bool) != isinstance(known[key], bool)):
            raise ConfigError(f"{name}: {key}={v!r:.60} is of type {type(v).__name__}, its default is {known[key]!r}.")
    try:
        return cls(**given)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
