"""spec/protocol.md as the tests read it: its examples by label, its tables, its program."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PORTS = ROOT / "spec/ports"
PAGE = ROOT / "spec/protocol.md"
TEXT = PAGE.read_text(encoding="utf-8")
_BLOCK = re.compile(r"^```(\w+) ([\w ]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    """(label, text) of every fenced block of a language."""
    return [(label, text) for found, label, text in _BLOCK.findall(TEXT) if found == language]


def examples() -> list[tuple[str, Any]]:
    """(label, message) of every JSON example."""
    return [(label, json.loads(text)) for label, text in blocks("json")]


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    section = TEXT.split(f"\n{heading}\n", 1)[1].split("\n## ", 1)[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    first = section[section.index("|") :].split("\n\n", 1)[0].count("\n") + 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:first]]


def names(cell: str) -> list[str]:
    """What stands between backticks in a cell."""
    return re.findall(r"`([^`]+)`", cell)
