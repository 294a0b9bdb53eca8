"""Many names as few: model.layers.{0..31}.self_attn.{q,v}_proj.

Names are cut at their dots. Those that differ in one part alone become one name with all these parts in braces: first where the parts are
numbers, then where they are words. What a folded name spells out is exactly the names that went in, no more and no fewer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import TypeAlias

_Folded: TypeAlias = tuple[tuple[str, ...], ...]  # the parts between the dots, of each the words that stand there


def folded(names: Iterable[str]) -> list[str]:
    """The names, folded, in the order in which their first ones come."""
    return list(families(names))


def families(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The folded names, each with the names that it stands for."""
    found = _folded([tuple((part,) for part in name.split(".")) for name in dict.fromkeys(names)])
    return {_text(parts): tuple(".".join(words) for words in product(*parts)) for parts in found}


def _folded(names: list[_Folded]) -> list[_Folded]:
    while True:
        before = len(names)
        depth = max((len(name) for name in names), default=0)
        for numbers in (True, False):
            for at in reversed(range(depth)):
                names = _along(names, at, numbers)
        if len(names) == before:
            return names


def _along(names: Sequence[_Folded], at: int, numbers: bool) -> list[_Folded]:
    """The names that agree but in the part `at`, as one."""
    together: dict[tuple[_Folded, _Folded, object], list[tuple[str, ...]]] = {}
    for place, name in enumerate(names):
        fits = at < len(name) and all(word.isdecimal() for word in name[at]) == numbers
        key = (name[:at], name[at + 1 :], None) if fits else (name, (), place)
        together.setdefault(key, []).append(name[at] if fits else ())
    return [
        before if apart is not None else (*before, tuple(dict.fromkeys(word for words in found for word in words)), *after)
        for (before, after, apart), found in together.items()
    ]


def _text(parts: _Folded) -> str:
    return ".".join(words[0] if len(words) == 1 else _braces(words) for words in parts)


def _braces(words: Sequence[str]) -> str:
    if all(word.isdecimal() and str(int(word)) == word for word in words):
        return "{" + ",".join(_runs(sorted(map(int, words)))) + "}"
    head, tail = _shared(words), _shared([word[::-1] for word in words])[::-1]
    while head and not head.endswith("_"):
        head = head[:-1]
    while tail and not tail.startswith("_"):
        tail = tail[1:]
    inner = [word[len(head) : len(word) - len(tail)] for word in words]
    return f"{head}{{{','.join(inner)}}}{tail}" if all(inner) else "{" + ",".join(words) + "}"


def _shared(words: Sequence[str]) -> str:
    """What all of them begin with."""
    first, last = min(words), max(words)  # in alphabetical order the two that differ first
    return first[: next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))]


def _runs(numbers: Sequence[int]) -> list[str]:
    """0 1 2 3 7 as 0..3 and 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}{'..' if len(run) > 2 else ','}{run[-1]}" for run in runs]
