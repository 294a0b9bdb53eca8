"""An output folder that appears whole or not at all.

    OUT                the output, or what was there before
    .OUT.merge/        beside it, what is being written: finished files under their names, the others as NAME.part
    .OUT.merge.lock    held while somebody writes; it says for which plan the folder is. Taken away at the end
    .OUT.merge.old/    what was at OUT, for the moment between two renames, where the system cannot exchange two folders in one step

Whenever a run stops, also by SIGKILL, OUT is the old state or the new one (or, in that moment, the old one lies in `.old`, and the next
run puts it back). A next run with the same plan and the same sources keeps the finished files; with another it starts anew. An error
leaves nothing of this behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from peft_ref.errors import MergeError

PART = ".part"
EXCHANGE, HERE = 2, -100  # RENAME_EXCHANGE, AT_FDCWD


class Output:
    """`with Output(...) as output`: files are written into `output.folder`, then `output.publish()`. Without it, nothing is left."""

    def __init__(self, out: Path, *, fingerprint: str, overwrite: bool = False, fsync: bool = True, reads: Iterable[Path] = ()) -> None:
        self.out = Path(os.path.realpath(out))  # a link is followed: what it points to is replaced
        self.folder = self.out.with_name(f".{self.out.name}.merge")
        self.fsync, self.overwrite = fsync, overwrite
        # What was not synced is only there as long as the machine runs.
        self._paper = {"fingerprint": fingerprint, "until": "" if fsync else _boot()}
        self._old = self.folder.with_name(self.folder.name + ".old")
        self._lock = self.folder.with_name(self.folder.name + ".lock")
        self._reads = [Path(os.path.realpath(path)) for path in reads]
        self.handle = -1  # of the lock file, which is held
        self._made: list[Path] = []  # folders above OUT that were not there
        self.done = False  # whether OUT is complete

    def __enter__(self) -> Output:
        self._refuse_itself()
        self._make_parents()
        try:
            self.handle = _locked(self._lock, self.out)
            try:
                self._begin()
            except BaseException as error:
                if not isinstance(error, MergeError):  # which is a refusal: what a killed run left may still be of use
                    shutil.rmtree(self.folder, ignore_errors=True)
                if not self.folder.exists():
                    self._lock.unlink()
                os.close(self.handle)
                raise
        except BaseException:
            self._unmake_parents()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.done and error is None:
            self._remove_old()
        elif not self.done:
            if self._old.exists() and not self.out.exists():
                os.rename(self._old, self.out)
            shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            self._lock.unlink()
        os.close(self.handle)
        if not self.done:
            self._unmake_parents()

    def finished(self, sizes: Mapping[str, int]) -> set[str]:
        """Which of these files an earlier run left finished. What else is there goes, but for files that were begun."""
        kept = set()
        for path in self.folder.iterdir():
            name = path.name.removesuffix(PART)
            if path.name in sizes and path.stat().st_size == sizes[path.name]:
                kept.add(path.name)
            elif path.name == name or name not in sizes:
                path.unlink()
        return kept

    def free(self) -> int:
        """Bytes that may be written: what the disk has, and what lies here in files that were begun."""
        disk = os.statvfs(self.folder)
        begun = sum(path.stat().st_blocks * 512 for path in self.folder.iterdir() if path.name.endswith(PART))
        return disk.f_bavail * disk.f_frsize + begun

    def publish(self) -> None:
        """The folder becomes OUT."""
        if self.fsync:
            sync(self.folder)
        if not self.out.exists() or _empty(self.out):
            os.rename(self.folder, self.out)
        else:
            self._refuse_what_is_there()
            os.chmod(self.folder, self.out.stat().st_mode & 0o7777)
            if not exchange(self.folder, self.out):
                os.rename(self.out, self._old)
                os.rename(self.folder, self.out)
        self.done = True
        if self.fsync:
            sync(self.out.parent)

    def _begin(self) -> None:
        """Puts right what a killed run left, and makes the folder."""
        paper = _read(self.handle)
        ours, same = paper.get("folder"), {key: paper.get(key) for key in self._paper} == self._paper
        if self._old.exists():
            if self.out.exists():
                shutil.rmtree(self._old)
            else:
                os.rename(self._old, self.out)
        if self.folder.exists() and _identity(self.folder) != ours:  # after an exchange the old output has this name, and all its files
            shutil.rmtree(self.folder)
        if self.out.exists() and not _empty(self.out):
            if same and not self.overwrite and ours == _identity(self.out):
                self.done = True  # a run for this very plan was killed after its last rename
                return
            self._refuse_what_is_there()
        if self.folder.exists() and not same:
            shutil.rmtree(self.folder)
        self.folder.mkdir(exist_ok=True)
        _write(self.handle, {**self._paper, "folder": _identity(self.folder), "process": os.getpid()}, self.fsync)

    def _remove_old(self) -> None:
        for rest in (self.folder, self._old):
            if rest.exists():
                try:
                    shutil.rmtree(rest)
                except OSError as error:
                    raise MergeError(
                        f"{self.out} is complete, but what it replaced cannot be removed: {error}\n  Remove {rest} yourself."
                    ) from error

    def _refuse_itself(self) -> None:
        """What is read must not be what is replaced."""
        if not hasattr(os, "preadv"):
            raise MergeError("merging needs a system with preadv: Linux, macOS or BSD. On Windows, WSL is one.")
        for path in self._reads:
            if path == self.out or self.out in path.parents:
                raise MergeError(f"{self.out}: the output would replace {path}, which it is made of.\n  Name another folder.")

    def _refuse_what_is_there(self) -> None:
        if not self.overwrite:
            raise MergeError(f"{self.out} is there already.\n  Name another folder, or replace it with --overwrite.")
        if not self.out.is_dir() or not any(path.suffix == ".safetensors" for path in self.out.iterdir()):
            raise MergeError(
                f"{self.out} is there, and no checkpoint: no *.safetensors is in it.\n"
                "  --overwrite replaces a folder with all that is in it, so only a checkpoint's. Name another folder."
            )

    def _make_parents(self) -> None:
        missing = [path for path in self.out.parents if not path.exists()]
        for path in reversed(missing):
            path.mkdir()
            self._made.append(path)

    def _unmake_parents(self) -> None:
        for path in reversed(self._made):
            with contextlib.suppress(OSError):
                path.rmdir()


def exchange(one: Path, other: Path) -> bool:
    """Both change their names in one step, where the system and the file system can; False where they cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _locked(path: Path, out: Path) -> int:
    """The lock file, opened and held."""
    import fcntl

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except BlockingIOError:
            process = _read(handle).get("process", "unknown")
            os.close(handle)
            raise MergeError(f"{out} is being written by another run, process {process}.\n  Wait until it is done, or stop it.") from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder took it away when it was done: the next one is another file


def _read(handle: int) -> dict[str, Any]:
    try:
        paper = json.loads(os.pread(handle, 1 << 16, 0))
    except (ValueError, RecursionError):  # new, or a run that was killed while it wrote
        return {}
    return paper if isinstance(paper, dict) else {}


def _write(handle: int, paper: Mapping[str, Any], fsync: bool) -> None:
    text = json.dumps(paper).encode()
    os.ftruncate(handle, 0)
    os.pwrite(handle, text, 0)
    if fsync:
        os.fsync(handle)


def _empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _identity(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_dev, stat.st_ino]


def _boot() -> str:
    """Another text after every start of the machine, where the system tells."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return f"process {os.getpid()}"
