"""The JUnit file is what Jenkins and GitLab read, and tells every case by its status."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from peft_ref.report import junit
from tests.check.reports import ALL, ALPHA, REPORTS, WRONG

# The attributes that jenkins-junit.xsd and GitLab know.
JUNIT = {
    "testsuites": {"name", "time", "tests", "failures", "errors"},
    "testsuite": {"name", "tests", "failures", "errors", "skipped", "time"},
    "properties": set(),
    "property": {"name", "value"},
    "testcase": {"name", "classname", "time"},
    "failure": {"message", "type"},
    "error": {"message", "type"},
    "skipped": {"message"},
    "system-out": set(),
}
OUTCOMES = {"wrong": "failure", "error": "error", "skipped": "skipped", "not asked": "skipped", "undecidable": "skipped"}


@ALL
def test_junit_is_what_its_readers_know(which: str) -> None:
    root = ET.fromstring(junit.render(REPORTS[which]).encode())
    for element in root.iter():
        assert set(element.attrib) <= JUNIT[element.tag]
    assert root.tag == "testsuites"
    for suite in root:
        assert suite[0].tag == "properties"
        for total, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.attrib[total]) == len(list(suite.iter(tag)))
    for total in ("tests", "failures", "errors"):
        assert int(root.attrib[total]) == sum(int(suite.attrib[total]) for suite in root)


def test_junit_tells_every_case_by_its_status() -> None:
    root = ET.fromstring(junit.render(WRONG))
    tests = {test.attrib["name"]: [child.tag for child in test] for test in root.iter("testcase")}
    for v in WRONG.verdicts:
        assert tests.pop(v.case) == ([OUTCOMES[v.status]] if v.status in OUTCOMES else ["system-out"] if v.status == "dialect" else [])
    assert not tests
    failure = next(root.iter("failure"))
    assert failure.attrib == {"type": "scale-is-alpha", "message": f"scale-is-alpha: {ALPHA.text}"}
    assert "LORA-C3, in spec/methods/lora.md" in (failure.text or "")
    assert "y[0, 2]: got 21.5" in (failure.text or "")


def test_junit_of_a_port_that_could_not_be_judged_is_an_error() -> None:
    root = ET.fromstring(junit.render(REPORTS["broken"]))
    error = next(root.iter("error"))
    assert (root.attrib["tests"], root.attrib["errors"]) == ("1", "1")
    assert "ended with exit code 1" in error.attrib["message"]
