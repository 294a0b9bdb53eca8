"""Reports written by hand, one of every kind, for laws about what is made of them; and a reader of the page that checks its making."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from math import inf, nan

import pytest

from peft_ref.check.result import Counterexample, Diagnosis, PortInfo, Report, Verdict, Worst

PORT = PortInfo(name="my_port", dtype="float32", language="Rust", version="0.3", homepage="https://example.org/my_port")
HOSTILE = "\x1b[2J\x00\x08\u202e</pre><script>alert(1)</script> \"'><img src=x onerror=alert(1)> ]]> \ud800 \uffff & \r done"


def verdict(case: str, status: str, reason: str = "", worst: Worst | None = None, exact: bool = False) -> Verdict:
    method, layer, *_, operation = case.split(".")
    layer = "" if operation in ("targets", "config") else layer
    return Verdict(
        case=case, method=method, operation=operation, layer=layer, clause="", status=status, reason=reason, worst=worst, exact=exact
    )


def report(*verdicts: Verdict, diagnoses: Sequence[Diagnosis] = (), port: PortInfo = PORT, broken: str = "") -> Report:
    return Report(port=port, verdicts=verdicts, diagnoses=tuple(diagnoses), seconds=1.25, broken=broken)


WORST = Worst("y", (0, 2), 21.5, 8.375, inf)
SMALLEST = Counterexample(
    case={
        "id": "lora.linear.plain.forward.smallest",
        "operation": "forward",
        "layer": {"kind": "linear", "weight": [[0.0]], "bias": [0.0]},
        "adapters": [{"config": {"r": 2, "lora_alpha": 6}, "tensors": {"lora_A.weight": [[0.0], [1.0]]}, "dropout": None}],
        "x": [[-41.0]],
    },
    got={"y": [[6.0, 7.0]]},
    want={"y": [[3.0, 7.0]]},
    text="W=[[0]] b=[0] x=[[-41]] -> you 6, want 3 at y[0, 0]",
    round_trips=66,
)
ALPHA = Diagnosis(
    method="lora",
    operations=("forward", "merge"),
    layers=("linear", "conv2d"),
    cases=("lora.linear.plain.forward", "lora.conv2d.plain.merge"),
    mistakes=("scale-is-alpha",),
    text="Your numbers are what you get when the scale is alpha instead of alpha / r.",
    clause="LORA-C3",
    links=("https://github.com/a/b/issues/1",),
    worst=WORST,
    counterexample=SMALLEST,
)
WRONG = report(
    verdict("lora.linear.plain.forward", "wrong", "y[0, 2]: got 21.5", WORST, exact=True),
    verdict("lora.conv2d.plain.merge", "wrong", "weight[0]: got 1", Worst("weight", (0,), 1.0, 2.0, 512.0)),
    verdict("lora.linear.plain.backward", "right", worst=Worst("x", (1,), 1.0, 1.0, 0.25)),
    verdict("lora.embedding.plain.forward", "error", "the program ended with exit code 3"),
    verdict("lora.x.list.targets", "wrong", "missing: layers.10.q_proj"),
    verdict("ia3.linear.output.forward", "right", worst=Worst("y", (0,), 1.0, 1.0, 0.0), exact=True),
    verdict("ia3.linear.output.unmerge", "dialect", "ia3-unmerge-epsilon"),
    verdict("ia3.linear.output.merge", "undecidable", "in float32 too close"),
    verdict("loha.linear.plain.forward", "skipped", "not built yet"),
    verdict("dora.linear.plain.forward", "not asked", "the port does not do dora"),
    diagnoses=[ALPHA],
)
RIGHT = report(verdict("lora.linear.plain.forward", "right"), verdict("lora.linear.plain.merge", "right"))
# One of everything, for laws about all of them.
REPORTS = {
    "wrong": WRONG,
    "right": RIGHT,
    "errors": report(verdict("lora.linear.plain.forward", "error", "it hung"), verdict("lora.linear.plain.merge", "right")),
    "nothing": report(verdict("lora.linear.plain.forward", "skipped", "no"), verdict("ia3.linear.output.merge", "not asked", "no")),
    "undecided": report(verdict("lora.linear.plain.forward", "undecidable", "in float32 too close")),
    "dialect": report(verdict("ia3.linear.output.unmerge", "dialect", "e"), verdict("ia3.linear.output.merge", "right")),
    "broken": report(port=PortInfo(name="?"), broken="./my_port: asked to start, it ended with exit code 1"),
    "no cases": report(),
    "hostile": report(
        verdict("lora.linear.plain.forward", "error", HOSTILE),
        verdict(f"lora.{HOSTILE.replace('.', '')}.forward", "wrong", HOSTILE),
        verdict("lora.linear.plain.merge", "skipped", HOSTILE),
        diagnoses=[replace(ALPHA, cases=("lora.linear.plain.delta",), text=HOSTILE, worst=replace(WORST, name=HOSTILE, got=nan))],
        port=PortInfo(name=HOSTILE, version=HOSTILE, language=HOSTILE, homepage=f"javascript:{HOSTILE}"),
        broken=HOSTILE,
    ),
}
ALL = pytest.mark.parametrize("which", REPORTS)


class Page(HTMLParser):
    """Checks that elements nest, and collects them."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.elements if name in attrs]


ELEMENTS = {
    *("html", "head", "meta", "title", "style", "script", "body", "header", "main", "section", "footer"),
    *("div", "span", "p", "h1", "h2", "h3", "h4", "small", "ul", "li", "i", "b", "a", "pre", "code"),
    *("table", "thead", "tbody", "tr", "th", "td", "details", "summary", "input"),
}
ATTRIBUTES = {
    *("lang", "charset", "name", "content", "http-equiv", "class", "style", "id", "href", "rel", "title", "colspan"),
    *("type", "placeholder", "aria-label"),
}
