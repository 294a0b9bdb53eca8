"""What a method is, for a report: its formula, and the clauses of a topic where the spec is at hand (it is not in the wheel)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from peft_ref.methods import METHODS


def idea(method: str) -> str:
    """The first line of the method's file: "LoRA: add a low-rank matrix to a frozen weight." """
    return _docstring(method).partition("\n")[0]


def formula(method: str) -> str:
    """The formula and its shapes: the indented lines that follow."""
    lines = _docstring(method).splitlines()[1:]
    block: list[str] = []
    for line in lines:
        if line.strip() and not line.startswith("    "):
            break
        block.append(line[4:])
    return "\n".join(block).strip("\n")


def clauses(method: str, cited: str) -> list[tuple[str, str]]:
    """The clause of that id, or all under the topic of that name: [("LORA-C3", "The scale is `s = lora_alpha / r`."), ...]."""
    path = Path(__file__).parents[2] / "spec" / "methods" / f"{method}.md"
    if not path.is_file():
        return []
    found: list[tuple[str, str]] = []
    inside = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            inside = line.lstrip("# ").strip() == cited
        match = re.match(r"- \*\*([A-Z0-9]+-C\d+)\*\* (.*)", line)
        if match and (inside or match[1] == cited):
            found.append((match[1], match[2]))
    return found


def _docstring(method: str) -> str:
    return (sys.modules[METHODS[method].__module__].__doc__ or "") if method in METHODS else ""
