"""The keys of a rank_pattern, asked for the first that matches a name: by looking it up where a key is no more than a name.

PEFT puts every key into a regex and tries one after the other on every module: n modules with a key each cost n^2 / 2 matches. A key of
letters, digits, "_", "-" and "." means itself, but for its dots, which match any letter. Keys of one length whose dots stand in the same
places are one table: put dots into a name's end there, and look it up.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator
from typing import final

from peft_ref.graph.patterns import Matcher

_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")


def is_plain(pattern: str) -> bool:
    """Whether it is a name, in which nothing but dots is more than a letter to a regex."""
    return _PLAIN.fullmatch(pattern) is not None


@final
class Keys:
    """The keys in their order. With `below` they are PEFT's patterns of sizes, which end a name after a dot, with no group around them."""

    def __init__(self, patterns: Collection[str], *, below: bool = False) -> None:
        self._patterns, self._below = tuple(patterns), below
        self._own = frozenset(self._patterns)
        self._tables: dict[tuple[int, tuple[int, ...]], dict[str, int]] = {}
        self._others: list[int] = []
        for place, key in enumerate(self._patterns):
            if is_plain(key):
                dots = tuple(i for i, letter in enumerate(key) if letter == ".")
                self._tables.setdefault((len(key), dots), {})[key] = place
            else:
                self._others.append(place)

    def first(self, name: str, clock: Matcher) -> str | None:
        """The first key that matches the name, or else the key that is the name."""
        place = next(self._places(name, clock), None)
        return self._patterns[place] if place is not None else name if name in self._own else None

    def all(self, name: str, clock: Matcher) -> set[str]:
        """Every key that matches the name."""
        return {self._patterns[place] for place in self._places(name, clock)}

    def _places(self, name: str, clock: Matcher) -> Iterator[int]:
        """Where the matching keys stand, in order."""
        began = time.thread_time()
        dotless = "\n" in name  # what no dot matches
        known = [] if dotless else sorted(self._looked_up(name))
        clock.charge(time.thread_time() - began, self._patterns[-1] if self._patterns else "")
        for place in range(len(self._patterns)) if dotless else self._others:
            while known and known[0] < place:
                yield known.pop(0)
            if self._matches(self._patterns[place], name, clock):
                yield place
        yield from known

    def _looked_up(self, name: str) -> Iterator[int]:
        for (length, dots), table in self._tables.items():
            before = len(name) - length
            if before < 0 or (before == 0 and self._below) or (before > 0 and name[before - 1] != "."):
                continue
            end = name[before:]
            for i in dots:
                if end[i] != ".":
                    end = f"{end[:i]}.{end[i + 1 :]}"
            if (place := table.get(end)) is not None:
                yield place

    def _matches(self, key: str, name: str, clock: Matcher) -> bool:
        return clock.start(rf".*\.{key}$" if self._below else rf"(.*\.)?({key})$", name, key) is not None
