"""The command line: exit codes for scripts, reports where they were asked for, and errors that say what to do, never a traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, NoReturn

import pytest

from peft_ref.cli import main

ROOT = Path(__file__).resolve().parents[2]
PORTS = ROOT / "spec" / "ports" / "python"
NUMPY = "peft_ref_backends.numpy:NumpyBackend"
FEW = ("--method", "lora", "--case", "lora.linear.plain", "--no-search")
RIGHT = ("--", sys.executable, "-S", str(PORTS / "port.py"))
WRONG = ("--", sys.executable, "-S", str(PORTS / "planted.py"))
MISBEHAVING = ("--", sys.executable, "-S", str(Path(__file__).parent / "ports" / "misbehaving.py"))
VERBS = ("check", "cases", "ranks", "convert")

Capture = pytest.CaptureFixture[str]


def strict(text: str) -> Any:
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(name: str) -> NoReturn:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def refused(capsys: Capture, *arguments: str) -> str:
    """What standard error says of a call that must end with 2 and print nothing else."""
    try:
        code = main(arguments)
    except SystemExit as exit:  # argparse
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    return err


# ---- exit codes


EXITS = {
    "a right port": (0, RIGHT, "RIGHT  All 5 cases"),
    "a right backend": (0, ("--backend", NUMPY), "RIGHT  All 5 cases"),
    "a wrong port": (1, WRONG, "WRONG  5 of 5 cases wrong. 1 known mistake."),
    "a port that cannot be started": (2, ("--", "/nowhere/port"), "BROKEN  The port could not be judged."),
    "a port that dies at the start": (2, (*MISBEHAVING, "dies", "start"), "BROKEN  The port could not be judged."),
    "a port that dies once": (2, (*MISBEHAVING, "dies", "plain.merge"), "BROKEN  1 of 5 cases had no usable answer; 4 right, none wrong."),
    "a port that is not asked": (2, ("--method", "lora", *MISBEHAVING, "skips", "always"), "NOTHING WAS EXECUTED"),
}


@pytest.mark.parametrize("what", EXITS)
def test_the_exit_code_and_the_last_line_tell_how_it_went(what: str, capsys: Capture) -> None:
    code, arguments, last = EXITS[what]
    at = arguments.index("--") if "--" in arguments else len(arguments)
    assert main(["check", *FEW, *arguments[:at], *arguments[at:]]) == code
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith(last)
    assert err == ""


def test_the_program_runs_as_a_module_without_a_traceback() -> None:
    command = [sys.executable, "-m", "peft_ref.cli", "check", *FEW, *WRONG]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("WRONG")
    assert done.stderr == ""


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "peft_ref.cli", "cases", "list"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


# ---- reports in files


def test_json_on_standard_output_is_all_there_is_on_it(capsys: Capture) -> None:
    assert main(["check", *FEW, "--json", *WRONG]) == 1
    told = strict(capsys.readouterr().out)
    assert told["exit_code"] == 1
    assert told["counts"]["wrong"] == len(told["verdicts"]) == 5
    assert told["diagnoses"][0]["mistakes"] == ["scale-is-alpha"]
    assert told["verdicts"][0]["worst"]["ratio"] == "inf"  # bits must match


def test_json_of_a_broken_port_says_what_is_broken(capsys: Capture) -> None:
    assert main(["check", *FEW, "--json", "--", "/nowhere/port"]) == 2
    told = strict(capsys.readouterr().out)
    assert told["exit_code"] == 2
    assert "/nowhere/port" in told["broken"]


def test_every_report_is_written_where_it_was_asked_for_and_all_agree(tmp_path: Path, capsys: Capture) -> None:
    paths = {kind: tmp_path / f"verdict.{kind}" for kind in ("json", "junit", "html")}
    assert main(["check", *FEW, *(text for kind, path in paths.items() for text in (f"--{kind}", str(path))), *WRONG]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("WRONG  5 of 5")
    assert strict(paths["json"].read_text())["counts"]["wrong"] == 5
    assert ET.fromstring(paths["junit"].read_text()).attrib["failures"] == "5"
    assert "5 of 5 cases wrong" in paths["html"].read_text()


def test_json_on_standard_output_may_go_with_files(tmp_path: Path, capsys: Capture) -> None:
    page = tmp_path / "verdict.html"
    assert main(["check", *FEW, "--html", str(page), "--json", *RIGHT]) == 0
    assert strict(capsys.readouterr().out)["exit_code"] == 0
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("option", ["--json", "--junit", "--html"])
@pytest.mark.parametrize("place", ["missing/verdict", "."])
def test_a_file_that_cannot_be_written_is_told_before_the_port_is_asked(option: str, place: str, tmp_path: Path, capsys: Capture) -> None:
    started = tmp_path / "started"
    program = ("--", sys.executable, "-S", "-c", f"open({str(started)!r}, 'w')")
    told = refused(capsys, "check", *FEW, option, str(tmp_path / place), *program)
    assert str(tmp_path / place) in told
    assert "cannot be written" in told
    assert not started.exists()


def test_a_file_in_a_folder_of_others_is_refused(tmp_path: Path, capsys: Capture) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    assert "cannot be written" in refused(capsys, "check", *FEW, "--html", str(tmp_path / "verdict.html"), *RIGHT)


# ---- answers in a file


def answers(tmp_path: Path, capsys: Capture, change: float = 0.0) -> Path:
    """The exported right answers as a port's, each number of the first array moved by `change`."""
    assert main(["cases", "export", str(tmp_path), "--method", "lora"]) == 0
    capsys.readouterr()
    replies = []
    for name in ("smoke", "lora"):
        for case in json.loads((tmp_path / f"{name}.json").read_text())["cases"]:
            if name == "smoke" or case["id"].startswith("lora.linear.plain."):
                answer = dict(case["expected"]["answer"])
                if name != "smoke":
                    first = next(iter(answer))
                    answer[first] = moved(answer[first], change)
                replies.append({"id": case["id"], "answer": answer})
    path = tmp_path / "answers.json"
    path.write_text(json.dumps({"port": {"name": "by hand", "dtype": "float64"}, "answers": replies}))
    return path


def moved(value: Any, by: float) -> Any:
    return [moved(v, by) for v in value] if isinstance(value, list) else value + by


def test_exported_answers_are_right(tmp_path: Path, capsys: Capture) -> None:
    assert main(["check", *FEW, "--answers", str(answers(tmp_path, capsys))]) == 0
    out = capsys.readouterr().out
    assert out.startswith("by hand  (float64)")
    assert out.splitlines()[-1] == "RIGHT  All 5 cases that were asked."


def test_answers_that_are_off_are_wrong(tmp_path: Path, capsys: Capture) -> None:
    assert main(["check", *FEW, "--answers", str(answers(tmp_path, capsys, 1e-9))]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("WRONG  5 of 5 cases wrong.")


def test_answers_to_other_cases_are_no_verdict(tmp_path: Path, capsys: Capture) -> None:
    path = answers(tmp_path, capsys)
    assert main(["check", "--method", "dora", "--case", "dora.linear.plain", "--answers", str(path)]) == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("NOTHING WAS EXECUTED")


BAD_FILES = {
    "no JSON": ("{", "cannot be read as JSON"),
    "not text": (b"\xff\xfe\x00", "cannot be read as JSON"),
    "too deep": ("[" * 100_000, "cannot be read as JSON"),
    "a list": ("[]", 'expected {"port":'),
    "no port": ('{"answers": []}', "the answer to start is null"),
    "no id": ('{"port": {"name": "a"}, "answers": [{}]}', 'the "id" of a case'),
    "twice": ('{"port": {"name": "a"}, "answers": [{"id": "smoke"}, {"id": "smoke"}]}', "smoke is answered twice"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_file_of_answers_that_cannot_be_read_is_broken_and_says_why(what: str, tmp_path: Path, capsys: Capture) -> None:
    content, told = BAD_FILES[what]
    path = tmp_path / "answers.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["check", *FEW, "--answers", str(path)]) == 2
    out, err = capsys.readouterr()
    assert told in " ".join(out.split())
    assert out.splitlines()[-1] == "BROKEN  The port could not be judged."
    assert err == ""


def test_a_file_of_answers_that_is_not_there_is_broken(tmp_path: Path, capsys: Capture) -> None:
    assert main(["check", *FEW, "--answers", str(tmp_path / "answers.json")]) == 2
    assert "No such file" in capsys.readouterr().out


# ---- calls that make no sense


NONSENSE = {
    "an unknown backend": (("check", "--backend", "fortran", *FEW), "no backend named 'fortran'"),
    "a backend that is no module": (("check", "--backend", "nowhere:Backend", *FEW), "no module named 'nowhere'"),
    "a backend that is no class": (("check", "--backend", "json:dumps", *FEW), "no subclass"),
    "an unknown dtype": (("check", "--backend", NUMPY, "--dtype", "posit16", *FEW), "posit16"),
    "an unknown method": (("check", "--method", "lorax"), "lorax"),
    "an unknown operation": (("check", "--operation", "fly"), "fly"),
    "no case left": (("check", "--case", "no.such.case"), "no case is left"),
    "two ports": (("check", "--backend", NUMPY, *FEW, *RIGHT), "only one port"),
    "a dtype for a program": (("check", "--dtype", "float32", *FEW, *RIGHT), "--dtype is for --backend"),
    "no program": (("check", *FEW, "--"), "no program"),
    "no time": (("check", "--timeout", "0", *FEW, *RIGHT), "number of seconds"),
    "no end of time": (("check", "--timeout", "inf", *FEW, *RIGHT), "number of seconds"),
    "no number": (("check", "--timeout", "soon", *FEW, *RIGHT), "soon"),
    "an unknown option": (("check", "--quietly"), "--quietly"),
    "an unknown verb": (("judge",), "judge"),
    "no verb": ((), "VERB"),
    "export to nowhere": (("cases", "export"), "name the folder"),
    "export into a file": (("cases", "export", __file__), "File exists"),
    "a schedule with no step to allocate in": (("ranks", "--tinit", "300"), "no step is left"),
    "a module with nothing below": (("ranks", "--learn", "-1"), "rank -1"),
    "a rank that no module has room for": (("ranks", "--learn", "3", "19"), "rank 19"),
    "a trace that is no JSON": (("ranks", "--trace", __file__), "is not JSON"),
    "a trace that is not there": (("ranks", "--trace", "/nowhere/trace.json"), "No such file"),
    "a trace with a schedule beside it": (("ranks", "--trace", "t.json", "--tinit", "3"), "--tinit is for a training of our own"),
    "a picture in a folder that is not there": (("ranks", "--total-step", "120", "--svg", "/nowhere/ranks.svg"), "cannot be written"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_a_call_that_makes_no_sense_is_refused_with_a_reason(what: str, capsys: Capture) -> None:
    arguments, told = NONSENSE[what]
    assert told in refused(capsys, *arguments)


# ---- help


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_has_examples(verb: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit:
        main([verb, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert len(re.findall(rf"^  peft-ref {verb}\b", text.split("examples:")[1], re.M)) >= 2


def test_the_help_names_every_verb(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {verb} ", text, re.M) for verb in VERBS)


# ---- cases


def test_the_list_of_cases_is_narrowed_and_may_be_json(capsys: Capture) -> None:
    assert main(["cases", "list", "--method", "ia3", "--json"]) == 0
    listed = strict(capsys.readouterr().out)
    assert {case["method"] for case in listed} == {"ia3"}
    assert main(["cases", "list", "--method", "ia3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(listed) > 50
