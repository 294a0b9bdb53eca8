"""The pages about conversion and about LoRA's special starts and places: their numbers come out, and their links lead somewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.spec.pages import SPEC, links, run

every_page = pytest.mark.parametrize("page", [SPEC / "conversion.md", SPEC / "lora_special.md"], ids=lambda page: page.name)


@every_page
def test_the_blocks_of_a_page_give_what_they_say(page: Path) -> None:
    results = run(page)
    assert results
    assert "".join(r.failures for r in results) == ""


@every_page
def test_every_relative_link_resolves(page: Path) -> None:
    targets = links(page)
    assert targets
    assert [t for t in targets if not (page.parent / t.partition("#")[0]).resolve().is_file()] == []
