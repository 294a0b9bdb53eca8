"""The spec's pages are complete, cite what exists, and their numbers come out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peft_ref.check.corpus import corpus
from peft_ref.check.mistakes import SUITES
from peft_ref.methods import METHODS
from tests.spec.pages import ANY_ENTRY, CITED, METHOD_PAGES, PAGES, SPEC, anchors, blocks, entries, links, mistake_rows, prefix, run, topics

SECTIONS = ["Clauses", "The gradient", "Numbers to check by hand", "What HF does differently", "Common mistakes"]
ALL = {e.id: e for page in METHOD_PAGES.values() for e in entries(page)}
TOPICS = {topic for page in METHOD_PAGES.values() for topic in topics(page)}

every_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
every_method = pytest.mark.parametrize("name", METHOD_PAGES)


def test_every_method_has_a_page_and_every_page_a_method() -> None:
    assert set(METHOD_PAGES) == set(METHODS)


def test_the_readme_lists_every_page() -> None:
    assert {f"methods/{name}.md" for name in METHODS} <= set(links(SPEC / "README.md"))


@every_method
def test_a_page_has_every_section_in_order(name: str) -> None:
    headings = re.findall(r"^## (.*)$", METHOD_PAGES[name].read_text("utf-8"), re.M)
    assert headings == SECTIONS


@every_page
def test_a_page_is_readable_at_one_sitting(page: Path) -> None:
    lines = page.read_text("utf-8").splitlines()
    lines = [line for line in lines if not line.startswith("| [")]  # nobody reads a list of all methods through
    assert 120 <= len(lines) <= 250


@every_method
@pytest.mark.parametrize("letter", ["C", "Q"])
def test_ids_are_unique_and_sequential(name: str, letter: str) -> None:
    found = [e for e in entries(METHOD_PAGES[name]) if e.letter == letter]
    assert [e.number for e in found] == list(range(1, len(found) + 1))
    assert found
    assert {e.prefix for e in found} == {prefix(name)}


@every_method
def test_every_line_with_an_id_is_read_as_an_entry(name: str) -> None:
    text = METHOD_PAGES[name].read_text("utf-8")
    assert len(ANY_ENTRY.findall(text)) == len(entries(METHOD_PAGES[name]))


@every_method
def test_every_clause_stands_under_a_topic_and_every_topic_has_a_clause(name: str) -> None:
    page = METHOD_PAGES[name]
    under = [e.topic for e in entries(page) if e.letter == "C"]
    assert set(under) == set(topics(page))
    assert len(topics(page)) == len(set(topics(page)))


@every_page
def test_every_id_a_page_cites_exists(page: Path) -> None:
    prefixes = {prefix(name) for name in METHODS}
    cited = {c for c in CITED.findall(page.read_text("utf-8")) if c.split("-")[0] in prefixes}
    assert cited <= ALL.keys() | TOPICS


@every_page
def test_every_relative_link_resolves(page: Path) -> None:
    broken = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.is_file() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@every_method
def test_the_judge_cites_clauses_that_exist(name: str) -> None:
    cited = {c.clause for c in corpus(name)} | {m.clause for m in SUITES[name].mistakes}
    assert cited
    assert cited <= ALL.keys()


@every_method
def test_the_table_of_mistakes_names_every_mistake_of_the_judge(name: str) -> None:
    listed = {n for row in mistake_rows(METHOD_PAGES[name]) for n in row.names}
    assert {m.name for m in SUITES[name].mistakes} <= listed


@every_method
def test_the_table_of_mistakes_cites_the_clause_that_the_judge_prints(name: str) -> None:
    clause = {n: row.clause for row in mistake_rows(METHOD_PAGES[name]) for n in row.names}
    wrong = {m.name: (m.clause, clause[m.name]) for m in SUITES[name].mistakes if m.clause != clause[m.name]}
    assert not wrong


@every_method
def test_a_name_in_code_type_is_one_the_judge_can_print(name: str) -> None:
    source = "\n".join(p.read_text("utf-8") for p in (SPEC.parent / "peft_ref/check").rglob("*.py"))
    names = {n for row in mistake_rows(METHOD_PAGES[name]) for n in row.names if not n.startswith("-")}
    unknown = {n for n in names if n not in source and n.rpartition("-")[0] + "-{" not in source}
    assert not unknown


@every_page
def test_the_blocks_of_a_page_give_what_they_say(page: Path) -> None:
    assert "".join(r.failures for r in run(page)) == ""


@every_method
def test_a_page_works_out_forward_gradient_merge_and_unmerge(name: str) -> None:
    source = "".join(b.source for b in blocks(METHOD_PAGES[name]))
    words: tuple[str, ...] = ("prompt(", "prompt_vjp(", "saved(", "splice(")
    if name in METHODS.weights:
        words = ("forward(", "vjp(", "merge(", "unmerge(")
    elif name in METHODS.attention:
        words = ("added(", "output(", "output_vjp(", "merge(")
    missing = [word for word in words if not re.search(rf"(?<![a-z_]){re.escape(word)}", source)]
    assert not missing
    assert all(">>> " in b.source for b in blocks(METHOD_PAGES[name]))
