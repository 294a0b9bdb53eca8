"""HF's patterns over module names, matched as Python's `re` would, but never for longer than a second.

`re` says whether a pattern is valid, because it is what PEFT compiles; the `regex` package matches, because it can be stopped.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache
from typing import Any

from peft_ref.errors import ConfigError

SECONDS = 1.0


def first_match(patterns: Collection[str], name: str) -> str | None:
    """The first pattern that is the end of `name`, from its start or a dot on: how rank_pattern and alpha_pattern are meant."""
    found = next((p for p in patterns if _decide(rf"(.*\.)?({p})$", name, p)), None)
    return name if found is None and name in patterns else found


def full_match(pattern: str, name: str) -> bool:
    return _decide(pattern, name, pattern, whole=True)


def check_pattern(pattern: str, where: str) -> None:
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"{where}: {pattern!r} is no regular expression ({error}).\n  A module's name has its dots escaped: 'h\\.0'."
        ) from None


def _decide(expression: str, name: str, pattern: str, whole: bool = False) -> bool:
    compiled = _compiled(expression)
    try:
        return (compiled.fullmatch if whole else compiled.match)(name, timeout=SECONDS) is not None
    except TimeoutError:
        raise ConfigError(
            f"the pattern {pattern!r} was still undecided on {name!r} after {SECONDS:g} s.\n  Write it without nested repetition."
        ) from None


@lru_cache(maxsize=256)
def _compiled(expression: str) -> Any:
    import regex  # type: ignore[import-untyped]  # it ships no types

    return regex.compile(expression)
