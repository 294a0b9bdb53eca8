"""Opening what is a file. A pipe would hold the reader up until somebody writes, a device may never end: neither is opened.

A symlink is followed, wherever it leads: the Hub's cache is made of links that leave their folder. What it leads to has to be a file.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from peft_ref.errors import FileFormatError


class Stamp(NamedTuple):
    """Which file it was, and in which state."""

    device: int
    inode: int
    size: int
    changed: int  # in nanoseconds


def opened(path: Path) -> BufferedReader:
    """The file at `path`, open for reading. What is there and is no file is a `FileFormatError`, what cannot be read an `OSError`."""
    try:
        # a pipe is opened without its writer, and then seen to be one: asked before, another could have taken its place since
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENXIO, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENODEV):
            raise
        raise FileFormatError(f"{str(path)[:200]!r} cannot be a file ({getattr(error, 'strerror', None) or error}).") from None
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise FileFormatError(f"{path} is {_kind(mode)}, expected a file.")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def stamp(file: BufferedReader) -> Stamp:
    """The state of an open file."""
    found = os.fstat(file.fileno())
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def span(path: Path, name: str, begin: int, end: int, before: Stamp | None) -> bytearray:
    """The bytes from `begin` to `end`, which belong to the tensor `name`; the file has to be as it was `before`."""
    with opened(path) as file:
        now = stamp(file)
        if before is not None and now != before:
            raise FileFormatError(f"{path} was changed since its header was read; it was to give {name!r}.\n  Is it being written?")
        if end > now.size:  # asked before memory is taken
            raise FileFormatError(f"{path}: tensor {name!r} was cut off since the file was opened.\n  Is it being written?")
        data = bytearray(end - begin)
        file.seek(begin)
        if file.readinto(data) != end - begin:
            raise FileFormatError(f"{path}: tensor {name!r} was cut off since the file was opened.\n  Is it being written?")
    return data


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
