"""The page tells what the judge found, needs nothing else, and holds no markup but ours."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

from peft_ref.report import html
from peft_ref.report.spec import clauses, formula, idea
from tests.check.reports import ALL, ALPHA, ATTRIBUTES, ELEMENTS, REPORTS, SMALLEST, WRONG, Page


@ALL
def test_the_page_is_well_made_and_holds_nothing_but_what_we_wrote(which: str) -> None:
    page = Page(html.render(REPORTS[which]))
    assert {tag for tag, _ in page.elements} <= ELEMENTS
    assert {key for _, attrs in page.elements for key in attrs} <= ATTRIBUTES
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    html.render(REPORTS[which]).encode("utf-8")


@ALL
def test_the_page_needs_nothing_else(which: str) -> None:
    text = html.render(REPORTS[which])
    page = Page(text)
    assert "src" not in {key for _, attrs in page.elements for key in attrs}
    assert not re.search(r"url\(|@import|<link|fetch\(|import\(", text)
    assert "default-src 'none'" in page.attributes("content")[0]
    assert all(re.match(r"#|https://", href) for href in page.attributes("href"))


@ALL
def test_every_link_within_the_page_leads_somewhere(which: str) -> None:
    page = Page(html.render(replace(REPORTS[which], diagnoses=())))
    there = page.attributes("id")
    assert len(there) == len(set(there))
    assert {href[1:] for href in page.attributes("href") if href.startswith("#")} <= set(there)


@ALL
def test_the_map_has_a_square_for_every_case_that_was_asked(which: str) -> None:
    shown = REPORTS[which]
    page = Page(html.render(shown))
    squares = Counter(attrs["class"] for tag, attrs in page.elements if tag == "a" and "class" in attrs)
    passed = {v.method for v in shown.verdicts} - {v.method for v in shown.verdicts if v.status != "not asked"}
    assert squares == Counter(v.status.replace(" ", "-") for v in shown.verdicts if v.method not in passed)


def test_the_page_tells_the_diagnosis_as_a_story() -> None:
    text = Page(html.render(WRONG)).text
    for part in (
        "Wrong 3 of 8 cases wrong. 1 known mistake.",
        "scale-is-alpha",
        ALPHA.text,
        "LoRA: add a low-rank matrix to a frozen weight.",
        "W' = W + s B A",
        "got 21.5 want 8.375 off by bits must match here",
        "https://github.com/a/b/issues/1",
        "missing: layers.10.q_proj",
        "the program ended with exit code 3",
        "not built yet",
    ):
        assert part in text


def test_the_counterexample_is_drawn_with_both_answers_and_marks_where_they_differ() -> None:
    page = html.render(WRONG)
    assert '<b>x</b> 1 x 1</span><table class="m"><tr><td>\N{MINUS SIGN}41</td></tr></table>' in page
    assert 'you: <b>y</b> 1 x 2</span><table class="m"><tr><td class="off">6</td><td>7</td></tr></table>' in page
    assert 'right: <b>y</b> 1 x 2</span><table class="m"><tr><td class="off">3</td><td>7</td></tr></table>' in page


def test_an_answer_that_is_not_finite_is_drawn() -> None:
    example = replace(SMALLEST, got={"y": [["nan", "-inf"]]})
    page = html.render(replace(WRONG, diagnoses=(replace(ALPHA, counterexample=example),)))
    assert '<td class="off">nan</td><td class="off">\N{MINUS SIGN}inf</td>' in page


def test_the_formula_and_the_clauses_come_from_the_method_and_its_page() -> None:
    assert idea("lora") == "LoRA: add a low-rank matrix to a frozen weight."
    assert formula("lora").startswith("W' = W + s B A ")
    assert formula("lora").endswith("only with lora_bias")
    assert [name for name, _ in clauses("lora", "LORA-scale")] == ["LORA-C3", "LORA-C4"]
    assert clauses("lora", "LORA-C3") == [("LORA-C3", "The scale is `s = lora_alpha / r`.")]
    assert clauses("lora", "nowhere") == clauses("nothing", "LORA-C3") == []
    assert idea("nothing") == formula("nothing") == ""
