"""The report as JUnit XML, as Jenkins and GitLab read it: a suite per method, a test case per case.

What is wrong is a failure with its diagnosis, no usable answer is an error, and what was skipped, not asked or cannot be decided is
skipped with the reason. A port that cannot be judged is one suite with one error.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

from peft_ref.check.result import Diagnosis, Report, Verdict
from peft_ref.errors import clean
from peft_ref.report import headline, one_line, page, port_name, title

SKIPPED = ("skipped", "not asked", "undecidable")


def render(report: Report) -> str:
    """The XML document."""
    causes = {case: d for d in report.diagnoses for case in d.cases}
    root = ET.Element("testsuites", name=f"peft-ref check: {port_name(report)}", time=f"{report.seconds:.3f}")
    if report.broken:
        suite = _suite(root, report, "port", [])
        test = ET.SubElement(suite, "testcase", classname="peft_ref.port", name="start and smoke test", time="0")
        _outcome(test, "error", report.broken)
        suite.set("tests", "1")
        suite.set("errors", "1")
    for method in dict.fromkeys(v.method for v in report.verdicts):
        verdicts = [v for v in report.verdicts if v.method == method]
        suite = _suite(root, report, method, verdicts)
        for v in verdicts:
            _case(suite, v, causes.get(v.case))
    for total in ("tests", "failures", "errors"):
        root.set(total, str(sum(int(suite.get(total, "0")) for suite in root)))
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _suite(root: ET.Element, report: Report, name: str, verdicts: list[Verdict]) -> ET.Element:
    suite = ET.SubElement(root, "testsuite", name=name, tests=str(len(verdicts)), time="0")
    suite.set("failures", str(sum(v.status == "wrong" for v in verdicts)))
    suite.set("errors", str(sum(v.status == "error" for v in verdicts)))
    suite.set("skipped", str(sum(v.status in SKIPPED for v in verdicts)))
    properties = ET.SubElement(suite, "properties")
    for key in ("name", "version", "language", "dtype", "homepage"):
        if value := getattr(report.port, key):
            ET.SubElement(properties, "property", name=f"port.{key}", value=clean(value))
    ET.SubElement(properties, "property", name="verdict", value=" ".join(headline(report)[1:]))
    return suite


def _case(suite: ET.Element, v: Verdict, cause: Diagnosis | None) -> None:
    where = f"peft_ref.{v.method}.{v.operation}"
    test = ET.SubElement(suite, "testcase", classname=clean(where), name=clean(v.case), time="0")
    if v.status == "wrong":
        message = v.reason if cause is None else f"{title(cause)}: {cause.text}"
        _outcome(test, "failure", message, _story(v, cause), "wrong" if cause is None else title(cause))
    elif v.status == "error":
        _outcome(test, "error", v.reason)
    elif v.status in SKIPPED:
        _outcome(test, "skipped", f"{v.status}: {v.reason}")
    elif v.status == "dialect":
        ET.SubElement(test, "system-out").text = clean(f"a dialect: {v.reason}. {cause.text if cause else ''}")


def _outcome(test: ET.Element, kind: str, message: str, body: str = "", what: str = "") -> None:
    first, *_ = clean(message).splitlines() or ["no reason given"]
    element = ET.SubElement(test, kind, message=first[:500])
    if kind != "skipped":
        element.set("type", clean(what or kind))
    element.text = clean(body or message)


def _story(v: Verdict, cause: Diagnosis | None) -> str:
    lines = [v.reason]
    if cause is not None:
        lines += [f"{title(cause)}: {cause.text}", f"clause {cause.clause}, in {page(cause.method)}"]
        lines += [f"seen before: {link}" for link in cause.links]
        lines += [f"smallest: {one_line(cause.counterexample)}"] if cause.counterexample else []
    return "\n".join(lines)
