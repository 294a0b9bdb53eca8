"""The errors of the package. Each message says where, what came, what was expected and what to do."""

from __future__ import annotations


class PeftRefError(Exception):
    """The root of every error raised on purpose here."""


class ShapeError(PeftRefError, ValueError):
    """An array has another shape than its place asks for."""


class KeyMismatchError(PeftRefError, KeyError):
    """A tensor is missing, or one is there that nothing asked for."""

    def __str__(self) -> str:  # KeyError would print the repr of a many-lined message
        return str(self.args[0]) if self.args else ""


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
