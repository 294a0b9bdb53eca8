"""Files that are replaced as a whole: whenever a save stops, the old files are there or the new ones.

A new folder is prepared beside its place and renamed into it. In a folder that is there, every file is first written and synced under
a pending name, the last one's pending name being the decision: before it exists the old files count, from then on the new ones do.
`committed` says which file counts, so a save killed between two renames still reads as the new state; the next save finishes it first.
PEFT knows no pending names: after such a kill it sees one new and one old file until `finish` or the next save.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that no reader ever sees a part of it."""
    _rename(_write_beside(path, data), path)


def replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` by name into `folder`, all or none."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        return _new_folder(folder, files)
    finish(folder, tuple(files))
    try:
        for name, data in files.items():
            _rename(_write_beside(folder / name, data), _pending(folder, name))
    except BaseException:
        for name in reversed(tuple(files)):  # the decision is taken back first
            _discard(_pending(folder, name))
        raise
    finish(folder, tuple(files))
    return None


def finish(folder: Path, names: tuple[str, ...]) -> None:
    """Finish a save that was decided and interrupted; throw away what one left that was not."""
    decided = _pending(folder, names[-1]).exists()
    for name in names:
        if decided and _pending(folder, name).exists():
            _rename(_pending(folder, name), folder / name)
        else:
            _discard(_pending(folder, name))


def committed(folder: Path, name: str, names: tuple[str, ...]) -> Path:
    """Where the file `name` of the last decided save lies; `names` are the files that are saved together."""
    decided = _pending(folder, names[-1]).exists()
    return _pending(folder, name) if decided and _pending(folder, name).exists() else folder / name


def _new_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    beside = _temporary(folder)
    beside.mkdir()
    try:
        for name, data in files.items():
            replace_file(beside / name, data)
        _rename(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _pending(folder: Path, name: str) -> Path:
    return folder / f".{name}.pending"


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")


def _write_beside(path: Path, data: bytes) -> Path:
    """A synced file with a name of its own in `path`'s folder, with the permissions of the file it is to replace."""
    temporary = _temporary(path)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        try:
            if path.exists():
                os.chmod(temporary, path.stat().st_mode & 0o777)
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
        finally:
            os.close(handle)
    except BaseException:
        _discard(temporary)
        raise
    return temporary


def _rename(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except BaseException:
        if source.is_file() and source.suffix == ".tmp":
            _discard(source)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened, nor its entries synced
        handle = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _discard(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
