"""The errors of the package. Each message says where, what came, what was expected and what to do.

Names from files are in them, and whoever wrote the file chose the names: a message neither steers a terminal nor fills it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 4000  # letters of a message


class PeftRefError(Exception):
    """The root of every error raised on purpose here."""

    def __str__(self) -> str:
        text = str(self.args[0]) if len(self.args) == 1 else super().__str__()
        return clean(text if len(text) <= LONGEST else f"{text[: LONGEST * 3 // 4]} ... {text[-LONGEST // 4 :]}")


class ShapeError(PeftRefError, ValueError):
    """An array has another shape than its place asks for."""


class KeyMismatchError(PeftRefError, KeyError):
    """A tensor is missing, or one is there that nothing asked for."""


class ConfigError(PeftRefError, ValueError):
    """A hyper-parameter or a combination of them cannot be."""


class TargetError(PeftRefError, ValueError):
    """Target modules match nothing, or a pattern cannot be used."""


class UnsupportedLayerError(PeftRefError, TypeError):
    """A method does not work on this kind of layer."""


class NotMergeableError(PeftRefError, RuntimeError):
    """The adapter's effect does not fit into the frozen weight, or cannot be taken out again."""


class FileFormatError(PeftRefError, ValueError):
    """A file is not what its name promises."""


class MergeError(PeftRefError, RuntimeError):
    """A merge ended before its output was whole. Nothing of it is left, and what was there before still is."""


@contextmanager
def naming(place: object) -> Iterator[None]:
    """An error of ours in here says which file or folder it is about, if it does not say so already."""
    try:
        yield
    except PeftRefError as error:
        if str(place) in str(error):
            raise
        error.args = (f"{place}: {error}",)
        raise


def clean(text: str) -> str:
    """The text without anything that could steer a terminal, break XML or turn the reading direction; such characters are spelled out."""
    return text if text.isprintable() else "".join(_spelled(c) if c not in "\n\t" else c for c in text.replace("\r\n", "\n"))


def _spelled(c: str) -> str:
    if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") or ord(c) & 0xFFFE == 0xFFFE:
        return c.encode("unicode_escape").decode("ascii")
    return c
