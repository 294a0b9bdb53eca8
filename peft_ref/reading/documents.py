"""JSON from files: text in UTF-8 that is bounded in size, in values and in depth, and says nothing twice.

What a text will cost is known before it is parsed: a value needs a comma or a bracket of its own, so as many as there are of those, so many
values there can be. Measured with CPython 3.11, a value takes up to 140 bytes: 100 MB of "[],[],[]," would become 2.9 GB.

HF      `json.load` has no bounds but Python's own, and of a key that is there twice it keeps the last: whoever looks at such a file reads
        one value, and whoever runs it another. Here it is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from peft_ref.errors import FileFormatError
from peft_ref.reading.opening import opened


class Limit(NamedTuple):
    """The most that is read of one text."""

    size: int  # in bytes
    values: int


CONFIG = Limit(16 * 2**20, 300_000)  # with a name for each of 21,841 classes one has 2 MB
INDEX = Limit(32 * 2**20, 500_000)  # of a checkpoint: 91,000 tensors of 671 billion parameters take 10 MB
OWN = Limit(2**31, 10_000_000)  # of what was made here
DEEPEST = 64
LONGEST_NUMBER = 400  # digits; Python itself refuses 4,300, and nothing that is meant has more than 20

Pairs: TypeAlias = list[tuple[str, Any]]


def read_object(path: Path, limit: Limit = CONFIG) -> dict[str, Any]:
    """The object in the JSON file at `path`."""
    return parsed_object(read_bytes(path, limit), str(path), limit)


def read_value(path: Path, limit: Limit = CONFIG) -> Any:
    """The value in the JSON file at `path`."""
    return parsed(read_bytes(path, limit), str(path), limit)


def read_bytes(path: Path, limit: Limit = CONFIG) -> bytes:
    """What the file holds, if that is not more than the limit."""
    with opened(path) as file:
        data = file.read(limit.size + 1)
    if len(data) > limit.size:
        raise FileFormatError(f"{path} has more than {limit.size:,} bytes, which no such file needs.\n  Is it something else?")
    return data


def parsed_object(text: str | bytes, where: str, limit: Limit = CONFIG) -> dict[str, Any]:
    value = parsed(text, where, limit)
    if not isinstance(value, dict):
        raise FileFormatError(f"{where} is a JSON {type(value).__name__}, expected an object.")
    return value


def parsed(text: str | bytes, where: str, limit: Limit = CONFIG) -> Any:
    """The value that a JSON text holds."""
    value = decoded(text, where, limit, lambda pairs: once(pairs, where))
    _check_depth(value, where)
    return value


def decoded(text: str | bytes, where: str, limit: Limit, made: Callable[[Pairs], Any]) -> Any:
    """The value that a bounded JSON text holds, each object `made` of its pairs. How deep it goes is not asked."""
    if len(text) > limit.size:
        raise FileFormatError(f"{where}: {len(text):,} bytes of JSON, at most {limit.size:,} are read.\n  No such file needs more.")
    if (count := _values(text)) > limit.values:
        raise FileFormatError(f"{where}: JSON of up to {count:,} values, at most {limit.values:,} are read.\n  No such file needs more.")
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=made, parse_int=_whole)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half of a pair of them is no text: it could be neither written nor printed
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except FileFormatError:
        raise
    except UnicodeError as error:
        raise FileFormatError(f"{where} is not text in UTF-8: {error!s:.120}.") from None
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{where} is not JSON ({error!s:.120}).\n  Another kind of file, or a damaged one.") from None


def once(pairs: Pairs, where: str) -> dict[str, Any]:
    """The object of these pairs, if every key is there once."""
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise FileFormatError(f"{where} says {twice!r:.80} twice.\n  Which one counts is anybody's guess: keep one.")
    return made


def _values(text: str | bytes) -> int:
    return sum(text.count(c) for c in "[{,") if isinstance(text, str) else sum(text.count(c) for c in (b"[", b"{", b","))


def _whole(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
        if not level:
            return
    raise FileFormatError(f"{where}: JSON within JSON, more than {DEEPEST} deep.\n  No such file needs that.")
