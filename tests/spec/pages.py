"""Reading the spec's pages: clauses and topics, tables, links, and the Python blocks with what they leave behind."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "spec"
METHOD_PAGES = {p.stem: p for p in sorted((SPEC / "methods").glob("*.md"))}
PAGES = {str(p.relative_to(SPEC)): p for p in (SPEC / "README.md", *METHOD_PAGES.values())}

ENTRY = re.compile(r"^- \*\*([A-Z0-9]+)-([CQ])(\d+)\*\* (\S.*)$")
ANY_ENTRY = re.compile(r"\*\*[A-Z0-9]+-[CQ]\d+\*\*")
CITED = re.compile(r"\b[A-Z][A-Z0-9]*-(?:[CQ]\d+|[a-z]+)\b")
TOPIC = re.compile(r"^### ([A-Z0-9]+-[a-z]+)$")


def prefix(method: str) -> str:
    """What the ids of a method's clauses begin with: LORA, PROMPTTUNING."""
    return method.replace("_", "").upper()


class Entry(NamedTuple):
    id: str  # LORA-C3
    prefix: str
    letter: str  # C, a clause, or Q, a quirk
    number: int
    topic: str  # the heading above it
    text: str


class Row(NamedTuple):
    names: tuple[str, ...]
    clause: str


class Block(NamedTuple):
    line: int
    source: str


def prose(page: Path) -> list[str]:
    """The page's lines, those of fenced blocks emptied."""
    lines, fenced = [], False
    for line in page.read_text("utf-8").splitlines():
        fence = line.startswith("```")
        lines.append("" if fenced or fence else line)
        fenced ^= fence
    return lines


def entries(page: Path) -> list[Entry]:
    found, topic = [], ""
    for line in prose(page):
        topic = line.removeprefix("### ") if TOPIC.match(line) else "" if line.startswith("#") else topic
        if match := ENTRY.match(line):
            prefix, letter, number, text = match.groups()
            found.append(Entry(f"{prefix}-{letter}{number}", prefix, letter, int(number), topic, text))
    return found


def topics(page: Path) -> list[str]:
    return [match.group(1) for line in prose(page) if (match := TOPIC.match(line))]


def mistake_rows(page: Path) -> list[Row]:
    """The last table: the names in code type of each row, and the clause."""
    rows = page.read_text("utf-8").split("## Common mistakes")[1].splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in rows if line.startswith("|")]
    return [Row(tuple(re.findall(r"`([\w-]+)`", c[0])), c[-1]) for c in cells[2:]]


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [Block(text[: m.start()].count("\n") + 1, m.group(1)) for m in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)]


class Ran(NamedTuple):
    block: Block
    failures: str  # what doctest reports
    names: dict[str, Any]  # every name of the page so far


def run(page: Path) -> Iterator[Ran]:
    """The page's blocks in order, one namespace for all of them."""
    names: dict[str, Any] = {}
    runner = doctest.DocTestRunner(verbose=False)
    for block in blocks(page):
        report: list[str] = []
        test = doctest.DocTestParser().get_doctest(block.source, names, page.name, str(page), block.line)
        runner.run(test, out=report.append, clear_globs=False)
        names = test.globs
        yield Ran(block, "".join(report), dict(names))


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(line.lstrip("#")) for line in prose(page) if re.match(r"#{1,6} ", line)}


def links(page: Path) -> list[str]:
    return [target for line in prose(page) for target in re.findall(r"\]\(([^)\s]+)\)", line) if "://" not in target]
