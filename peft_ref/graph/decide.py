"""The verdict on one module, and its reason, in PEFT's order: excluded, saved in full, named, named by its end, in the right layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from peft_ref.graph.patterns import Matcher

TARGET, EXCLUDED, SAVED, UNMATCHED = "target", "excluded", "saved", "unmatched"

# The first number with two parts of the name before it: "model.layers.1.experts.0.w" is in layer 1, and "h.1.attn" in none.
_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


class Verdict(NamedTuple):
    outcome: str
    reason: str
    near: bool = False  # the name was asked for, and something else kept the adapter away


def suffixes(name: str) -> Iterator[str]:
    """The ends of `name` that begin after a dot, the longest first."""
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Targets with everything written out that depends on the model."""

    target: str | tuple[str, ...] | None
    exclude: str | tuple[str, ...]
    guards: tuple[str, ...]  # modules_to_save, as the regexes that keep an adapter away
    layers: tuple[int, ...]
    layer_patterns: tuple[str, ...]
    matcher: Matcher

    @cached_property
    def _targets(self) -> frozenset[str]:
        return frozenset(self.target or ())

    @cached_property
    def _layers(self) -> frozenset[int]:
        return frozenset(self.layers)

    @cached_property
    def _excluded(self) -> frozenset[str]:
        return frozenset(self.exclude)

    def decide(self, name: str) -> Verdict:
        if isinstance(self.exclude, str):
            if self.matcher.full(self.exclude, name):
                return Verdict(EXCLUDED, f"{name}: exclude_modules={self.exclude!r} matches it.", True)
        elif (entry := _entry(self._excluded, name)) is not None:
            return Verdict(EXCLUDED, f"{name}: exclude_modules names {entry!r}.", True)
        for guard in self.guards:
            if self.matcher.start(rf"(^|.*\.){guard}($|\..*)", name, guard):
                return Verdict(SAVED, f"{name}: modules_to_save names {guard!r}, which is trained in full.", True)
        if self.target is None:
            return Verdict(UNMATCHED, f"{name}: there are no target_modules.")
        if isinstance(self.target, str):
            if self.matcher.full(self.target, name):
                return Verdict(TARGET, f"{name}: the regex {self.target!r} matches the whole name.")
            return Verdict(UNMATCHED, f"{name}: the regex {self.target!r} does not match the whole name.")
        if name in self._targets:
            return Verdict(TARGET, f"{name}: target_modules names it.")
        if (entry := _entry(self._targets, name)) is None:
            return Verdict(UNMATCHED, f"{name}: no entry of target_modules is its name or its end from a dot on.")
        return self._in_layer(name, entry)

    def _in_layer(self, name: str, entry: str) -> Verdict:
        if not self.layers:
            return Verdict(TARGET, f"{name}: ends with .{entry} of target_modules.")
        index = self._index(name)
        if index is None:
            where = f"layers_pattern={self.layer_patterns!r} finds" if self.layer_patterns else "there is"
            return Verdict(UNMATCHED, f"{name}: ends with .{entry}, but {where} no layer's number in it.", True)
        if index not in self._layers:
            return Verdict(
                UNMATCHED, f"{name}: ends with .{entry}, but is in layer {index}; layers_to_transform={self.layers!r:.60}.", True
            )
        return Verdict(TARGET, f"{name}: ends with .{entry} of target_modules and is in layer {index}.")

    def _index(self, name: str) -> int | None:
        if not self.layer_patterns:
            found = _FIRST_NUMBER.match(name)
            return int(found["idx"]) if found else None
        for pattern in self.layer_patterns:
            match = self.matcher.start(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name, pattern)
            if match:
                return None if match["idx"] is None else int(match["idx"])
        return None


def _entry(entries: frozenset[str], name: str) -> str | None:
    """The entry that is `name`, or its end from a dot on."""
    return next((end for end in (name, *suffixes(name)) if end in entries), None)
