"""PEFT's BOFT asks torch for its compiler, which imports setuptools; that refuses to come after somebody's import of distutils."""

from __future__ import annotations

import contextlib

with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401
