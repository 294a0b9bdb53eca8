"""What many hyper-parameters have in common: the values they may have, and what is said of another one.

A method calls these in its `__post_init__`. Each raises ConfigError with the field's name, what came and what there is.
"""

from __future__ import annotations

from typing import Any

from peft_ref.errors import ConfigError


def positive(method: Any, *names: str) -> None:
    """Ranks, sizes and counts: above zero. A field that is None was not given, and is not looked at."""
    for name in names:
        if (value := getattr(method, name)) is not None and not value > 0:
            raise ConfigError(f"{name}={value}: a positive number is needed.")


def not_negative(method: Any, *names: str) -> None:
    """Penalties, and counts of what need not be there."""
    for name in names:
        if not (value := getattr(method, name)) >= 0:
            raise ConfigError(f"{name}={value}: it cannot be negative.")


def probability(method: Any, name: str) -> None:
    """Of dropping an input: from 0 to below 1, where nothing would be left to scale up."""
    if not 0 <= (value := getattr(method, name)) < 1:
        raise ConfigError(f"{name}={value}: a probability from 0 to below 1 is needed.")


def share(method: Any, name: str) -> None:
    """A part of a whole: from 0 to 1."""
    if not 0 <= (value := getattr(method, name)) <= 1:
        raise ConfigError(f"{name}={value}: a share from 0 to 1 is needed.")


def one_of(method: Any, name: str, *words: bool | str | None) -> None:
    """Starts, kinds and forms. True is not 1: JSON tells them apart."""
    value = getattr(method, name)
    if not any(type(value) is type(word) and value == word for word in words):
        raise ConfigError(f"{name}={value!r} is not known.\n  There are {', '.join(map(repr, words))}.")
