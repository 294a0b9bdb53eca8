"""HF's patterns over module names, matched as Python's `re` matches them, but for a limited time.

`re` says whether a pattern is valid, because it is what PEFT compiles; the `regex` package matches, because it can be stopped. The two read
a few spellings differently, so those are escaped first:

    a{e<=1}       a fuzzy match to `regex`, plain text to `re`
    [[:alpha:]]   a POSIX class to `regex`, a set of characters and a bracket to `re`

`regex` writes counted repetitions out, so nested counts can fill the memory before anything is matched: they are counted first.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from functools import lru_cache
from typing import Any

from peft_ref.errors import TargetError

SECONDS = 0.5  # of the thread's processor time
SECONDS_PER_NAME = 1e-4  # more where many names are asked about: 10,000 modules have 1.5 s in all
LARGEST = 20_000  # single steps in a pattern when its counts are written out, and letters in it

_COUNT = re.compile(r"\{(?:(\d+)(?:,(\d*))?|,(\d*))\}")


class Matcher:
    """Matches patterns, all of them together on all names for no longer than `seconds`, and reading them counts too."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._left = seconds

    def full(self, pattern: str, name: str) -> bool:
        return self._run(pattern, name, pattern, "fullmatch") is not None

    def start(self, expression: str, name: str, pattern: str) -> Any:
        """The match of `expression`, in which the user's `pattern` is set, at the start of `name`."""
        return self._run(expression, name, pattern, "match")

    def anywhere(self, pattern: str, name: str) -> bool:
        """Whether it matches some part of the name."""
        return self._run(pattern, name, pattern, "search") is not None

    def allow(self, seconds: float) -> None:
        """Give it more time."""
        self._left += seconds

    def charge(self, seconds: float, pattern: str) -> None:
        """Count time that was spent beside it."""
        self._left -= seconds
        if self._left <= 0:
            raise TargetError(
                f"the patterns took too long together; {_short(pattern)} was the last one tried.\n  Write fewer, or plain names."
            )

    def _run(self, expression: str, name: str, pattern: str, how: str) -> Any:
        began = time.thread_time()
        compiled = _compiled(expression, pattern)
        left = self._left - (time.thread_time() - began)
        try:
            found = getattr(compiled, how)(name, timeout=max(left, 0.001))
        except TimeoutError:
            raise TargetError(
                f"the pattern {_short(pattern)} was still undecided on {_short(name)} when its time was up.\n"
                "  It backtracks: write it without a repetition inside a repetition."
            ) from None
        self.charge(time.thread_time() - began, pattern)
        return found


def pattern_key(patterns: Collection[str], name: str, matcher: Matcher | None = None) -> str | None:
    """The first of `patterns` that is `name`, or its end from a dot on: whose rank or alpha a module gets. None where none is."""
    clock = matcher or Matcher()
    return next((p for p in patterns if clock.start(rf"(.*\.)?({p})$", name, p) is not None), name if name in patterns else None)


def key_below(patterns: Collection[str], name: str, matcher: Matcher | None = None) -> str | None:
    """The first of `patterns` that ends `name` after a dot, or else `name` itself: PEFT's rule for sizes, with no group around it."""
    clock = matcher or Matcher()
    return next((p for p in patterns if clock.start(rf".*\.{p}$", name, p) is not None), name if name in patterns else None)


def check_length(pattern: str) -> None:
    """Raise `TargetError` for what would take long to be read, before it is matched."""
    if len(pattern) > LARGEST:
        raise TargetError(f"the pattern {_short(pattern)} has {len(pattern):,} letters, at most {LARGEST:,} are read.\n  List the names.")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


@lru_cache(maxsize=1024)
def _compiled(expression: str, pattern: str) -> Any:
    import regex  # type: ignore[import-untyped]  # it ships no types

    check_length(pattern)
    try:
        re.compile(expression)
        return regex.compile(_as_regex(expression, pattern), flags=regex.VERSION0)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise TargetError(
            f"{_short(pattern)} is no regular expression ({error!s:.80}).\n  Escape what is meant as it stands: 'layers\\.0\\.q_proj'."
        ) from None


def _as_regex(expression: str, pattern: str) -> str:
    """`expression`, valid to `re`, so that `regex` reads it the same way; refused where its counts would not fit into memory."""
    out: list[str] = []
    sizes = [0]  # of the open groups
    last = 0  # of the item before a count
    at = 0
    in_set = False
    while at < len(expression):
        char = expression[at]
        count = None if in_set else _COUNT.match(expression, at)
        token = _escape(expression, at) if char == "\\" else count[0] if count else char
        at += len(token)
        if in_set:
            out.append("\\[" if token == "[" else token)
            in_set = token != "]"
            continue
        out.append("\\{" if token == "{" else token)
        if token == "[":
            start = re.compile(r"\^?\]?").match(expression, at)  # a bracket that comes first is in the set
            first = start[0] if start else ""
            out.append(first.replace("]", "\\]"))
            at += len(first)
            in_set = True
        if token == "(":
            sizes.append(0)
            last = 0
        elif token == ")":
            last = sizes.pop()
            sizes[-1] += last
        elif count:
            times = max([int(n) for n in count.groups() if n] or [1])
            sizes[-1] += last * (times - 1)
            last *= times
        else:
            last = 1
            sizes[-1] += 1
        if sizes[-1] > LARGEST:
            raise TargetError(f"the pattern {_short(pattern)} repeats too much to be matched.\n  Use + or * instead of a large count.")
    return "".join(out)


def _escape(expression: str, at: int) -> str:
    """The escape that starts at `at`."""
    if expression.startswith(("\\N{",), at):
        return expression[at : expression.index("}", at) + 1]
    return expression[at : at + 2]
