"""What installed packages announce in `[project.entry-points]`, asked of `importlib.metadata` only where there is something to ask.

That module brings email, zipfile, csv and socket with it: 4 MB and 40 ms, for an answer that is nearly always "nothing". So the files that
it would parse are first searched for the group's name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

INFO = (".dist-info", ".egg-info")


def announced(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of `group`."""
    if not any(_may_name(folder, group.encode()) for folder in sys.path) and not _others():
        return ()
    from importlib.metadata import entry_points

    return tuple(entry_points(group=group))


def _others() -> bool:
    """Whether packages are found by other means than folders on sys.path."""
    return any(finder is not PathFinder and getattr(finder, "find_distributions", None) is not None for finder in sys.meta_path)


def _may_name(folder: str, group: bytes) -> bool:
    path = Path(folder or ".")
    if not path.is_dir():
        return path.exists()  # an archive, which only importlib looks into
    return any(group in text for text in _texts(path))


def _texts(folder: Path) -> Iterator[bytes]:
    try:
        names = [name for name in os.listdir(folder) if name.endswith(INFO)]
    except OSError:
        return
    for name in ("EGG-INFO", *names):
        try:
            yield (folder / name / "entry_points.txt").read_bytes()
        except OSError:  # it announces nothing
            continue
