"""The mutants that no test can kill, each with the reason: `equivalent/<file>.toml`, by line and change, not by number."""

from __future__ import annotations

import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent / "equivalent"


def equivalents() -> dict[tuple[str, str, str], str]:
    """(file, the lines before, the lines after) -> why nothing is different."""
    return {
        (file.stem, " ".join(old.split()), " ".join(new.split())): reason["why"]
        for file in sorted(FOLDER.glob("*.toml"))
        for reason in tomllib.loads(file.read_text("utf-8"))["reason"]
        for old, new in reason["changes"]
    }
