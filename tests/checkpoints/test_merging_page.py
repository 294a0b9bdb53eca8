"""spec/merging.md: its table is the code's, its links lead somewhere."""

from __future__ import annotations

import pytest

pytest.importorskip("peft", reason="the extra `hf` is not installed")

from tests.checkpoints.merging_table import PAGE, written
from tests.spec.pages import links


def test_the_table_is_that_of_the_code() -> None:
    assert written() == PAGE.read_text(encoding="utf-8"), "python -m tests.checkpoints.merging_table"


def test_every_relative_link_resolves() -> None:
    targets = links(PAGE)
    assert targets
    assert [t for t in targets if not (PAGE.parent / t.partition("#")[0]).resolve().is_file()] == []
