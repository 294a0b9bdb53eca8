"""One BLAS thread for every thread of ours: workers that share BLAS's pool wait for one another (merging 2.2 GB: 1.58 s instead of 0.90).

`quiet` before NumPy is imported, in a program of our own; `one_thread` where it already was. NumPy has no call for it, the libraries have.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "OMP_NUM_THREADS")
# NumPy's wheels carry OpenBLAS under names of its own.
PREFIXES, SUFFIXES = ("", "scipy_"), ("", "64_", "_64")


# Of glibc's mallopt. One heap, as one for each thread costs 2 MB; and what is freed of it is kept: an exact merge that gave its small
# arrays back to the kernel each time took 2.2 s instead of 1.9.
MALLOPT = {"M_ARENA_MAX": (-8, 1), "M_MMAP_THRESHOLD": (-3, 1 << 19), "M_TRIM_THRESHOLD": (-1, 1 << 21)}


def quiet() -> None:
    """Ask every BLAS for one thread, also the one that is not loaded yet; and glibc for little memory."""
    os.environ.update(dict.fromkeys(VARIABLES, "1"))
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another C library, or none that can be asked
        for option, value in MALLOPT.values():
            ctypes.CDLL(None).mallopt(option, value)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread in every OpenBLAS that is loaded, for as long as this lasts. Others are left as they are."""
    found = list(_openblas())
    before = [get() for get, _ in found]
    try:
        for _, put in found:
            put(1)
        yield
    finally:
        for (_, put), n in zip(found, before, strict=True):
            put(n)


def _openblas() -> Iterator[tuple[Callable[[], int], Callable[[int], Any]]]:
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # no Linux
        return
    for path in sorted(set(re.findall(r"/\S*openblas\S*\.so\S*", maps))):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(path)
            for prefix in PREFIXES:
                for suffix in SUFFIXES:
                    get = getattr(library, f"{prefix}openblas_get_num_threads{suffix}", None)
                    put = getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)
                    if get is not None and put is not None:
                        yield get, put
