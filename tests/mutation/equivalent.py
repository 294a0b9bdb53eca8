"""The mutants that no test can kill, each with the reason: `equivalent.toml`, by file, line and change, not by number."""

from __future__ import annotations

import tomllib
from pathlib import Path

FILE = Path(__file__).with_suffix(".toml")


def equivalents() -> dict[tuple[str, str, str], str]:
    """(file, the lines before, the lines after) -> why nothing is different."""
    return {
        (stem, " ".join(old.split()), " ".join(new.split())): entry["why"]
        for stem, entries in tomllib.loads(FILE.read_text("utf-8")).items()
        for entry in entries
        for old, new in entry["changes"]
    }
