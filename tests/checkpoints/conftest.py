"""What the tests of checkpoints beside HF PEFT share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers are threads, so that what is put in the place of a call counts those of all of them."""
    monkeypatch.setattr("peft_ref.checkpoints.engine.alone", lambda: False)
