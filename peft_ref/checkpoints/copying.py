"""Bytes from file to file: by the kernel where it can, and never more than one block of them in our memory.

    copy      a range of one file into another: copy_file_range, which shares blocks where the file system can, else pread and pwrite
    fill      a buffer from a file, write  a buffer into one: all of it, however the kernel cuts it
    Stamps    what files looked like when they were first seen. A source that changes while it is read would give a mixture

pread and pwrite, not mmap: mapped pages count as our memory, 1.9 GB of them in a merge of 2.2 GB.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from peft_ref.checkpoints.plan import NDArray
from peft_ref.errors import MergeError

AT_ONCE = 1 << 30  # the kernel takes a little less than 2 GB in one call
BLOCK = 1 << 20  # of a copy by hand
# What says that the kernel, or these two file systems, cannot: then it is done by hand. A full disk is none of them.
CANNOT = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}


class Seen(NamedTuple):
    """A file as it was seen. No copy, no touch and no second download leaves all of it as it was."""

    device: int
    inode: int
    size: int
    mtime: int
    ctime: int


def seen(path: Path) -> Seen:
    stat = path.stat()
    return Seen(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


class Stamps:
    """What the files that are read looked like before the first byte was."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.files: Mapping[Path, Seen] = {path: seen(path) for path in sorted(set(paths))}

    def check(self, paths: Iterable[Path]) -> None:
        for path in paths:
            now, then = seen(path), self.files[path]
            if now[:4] != then[:4]:  # a new link to a file changes its ctime alone
                raise MergeError(
                    f"{path} changed while it was read: {then.size} bytes before, {now.size} now.\n"
                    "  What was made of it would be a mixture. Wait until it is whole, then merge again."
                )


def copy(source: int, begin: int, target: int, at: int, length: int) -> None:
    """The bytes `begin` to `begin + length` of `source` to `at` in `target`; both are open files."""
    done = _by_kernel(source, begin, target, at, length) if hasattr(os, "copy_file_range") else 0
    if done == length:
        return
    buffer = np.empty(min(BLOCK, length - done), np.uint8)
    while done < length:
        part = buffer[: length - done]
        fill(part, source, begin + done)
        write(part.data, target, at + done)
        done += len(part)


def _by_kernel(source: int, begin: int, target: int, at: int, length: int) -> int:
    """How many bytes the kernel copied: all, or as many as it could."""
    done = 0
    while done < length:
        try:
            n = os.copy_file_range(source, target, min(AT_ONCE, length - done), begin + done, at + done)
        except OSError as error:
            if error.errno in CANNOT:
                break
            raise
        if n == 0:  # the file ends here, or some file systems' way to say no: reading will tell
            break
        done += n
    return done


def fill(buffer: NDArray, source: int, at: int) -> None:
    """`buffer`, of bytes, from `source`."""
    rest = buffer.data
    while rest:
        n = os.preadv(source, [rest], at)
        if n == 0:
            raise EOFError(f"it ends at byte {at}, {len(rest)} too early")
        rest, at = rest[n:], at + n


def write(buffer: memoryview | bytes, target: int, at: int) -> None:
    """`buffer`, of bytes, into `target`."""
    rest = memoryview(buffer)
    while rest:
        n = os.pwrite(target, rest, at)
        rest, at = rest[n:], at + n
