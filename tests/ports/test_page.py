"""spec/protocol.md says what is: its examples are valid and right, its tables are those of the methods, its program is a right port."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from peft_ref.check import program
from peft_ref.check.answers import AnswersPort
from peft_ref.check.case import Case, build_attention, build_prompt, config_of, from_json, layer_to_json
from peft_ref.check.corpus import corpus
from peft_ref.check.judge import judge
from peft_ref.check.protocol import VERSION, schema_document, violation
from peft_ref.check.variants import LAYERS
from peft_ref.methods import METHODS
from peft_ref.prompts import Prompt
from tests.ports.page import ROOT, TEXT, blocks, examples, names, rows
from tests.ports.tables import with_tables

EXAMPLES = examples()


@pytest.mark.parametrize(("label", "message"), EXAMPLES, ids=[f"{i}-{label}" for i, (label, _) in enumerate(EXAMPLES)])
def test_an_example_fits_the_schema(label: str, message: Any) -> None:
    if label.startswith("adds "):  # fields of a case; the whole case is checked below
        assert set(message) <= schema_document()["$defs"]["case"]["properties"].keys()
    else:
        assert violation(message, label) == ""


# From which question a further one is made, and which field it does not have.
PUT_TOGETHER = {
    "backward": ("forward", ""),
    "delta": ("forward", "x"),
    "merge": ("forward", "x"),
    "unmerge": ("forward", "x"),
    "prompt_backward": ("prompt", ""),
    "saved": ("prompt", "batch"),
    "attention_backward": ("attention", ""),
}


def _questions() -> dict[str, Case]:
    """The questions on the page, also those that it puts together from one there and further fields."""
    asked = [message["case"] for label, message in EXAMPLES if label == "run"]
    adds = {label.removeprefix("adds "): message for label, message in EXAMPLES if label.startswith("adds ")}
    whole = {case["operation"]: case for case in reversed(asked)}
    for operation, (base, dropped) in PUT_TOGETHER.items():
        case = {k: v for k, v in whole[base].items() if k != dropped}
        asked.append({**case, "id": case["id"].removesuffix(base) + operation, "operation": operation, **adds.get(operation, {})})
    assert [violation(case, "case") for case in asked] == [""] * len(asked)
    return {case["id"]: from_json(case) for case in asked}


def test_every_question_on_the_page_has_its_right_answer_there(tmp_path: Path) -> None:
    questions = _questions()
    replies = [message for label, message in EXAMPLES if label == "reply" and "answer" in message]
    assert {reply["id"] for reply in replies} == questions.keys()
    file = tmp_path / "answers.json"
    file.write_text(json.dumps({"port": {"name": "the page", "dtype": "float64"}, "answers": replies}))
    report = judge(AnswersPort(file, validate=True), list(questions.values()), search=False)
    assert [(v.case, v.reason) for v in report.verdicts if v.status != "right"] == []


def test_the_port_in_forty_lines_is_right_and_has_forty_lines(tmp_path: Path) -> None:
    [(_, text)] = [block for block in blocks("python") if block[0] == "port"]
    assert text.count("\n") == 40
    file = tmp_path / "port.py"
    file.write_text(text)
    report = judge(program.ProgramPort([sys.executable, str(file)], validate=True), corpus("lora"), search=False)
    assert {v.case.rpartition(".")[2] for v in report.verdicts if v.status == "right"} == {"forward"}
    assert report.counts["right"] == 8
    assert report.exit_code == 0


def test_the_port_of_prompts_is_right(tmp_path: Path) -> None:
    [(_, text)] = [block for block in blocks("python") if block[0] == "prompts"]
    file = tmp_path / "port.py"
    file.write_text(text)
    asked = corpus("prompt_tuning")
    report = judge(program.ProgramPort([sys.executable, str(file)], validate=True), asked, search=False)
    right = {v.case for v in report.verdicts if v.status == "right"}
    assert right == {c.id for c in asked if c.operation in ("prompt", "prompt_backward", "saved")}
    assert report.exit_code == 0


def test_the_tables_of_weight_methods_are_what_the_code_says() -> None:
    assert with_tables(TEXT) == TEXT, "run: python -m tests.ports.tables"


def _configurations(heading: str) -> dict[str, set[str]]:
    said = {}
    for cells in rows(heading):
        said[names(cells[0])[0]] = {name.split(":")[0].strip('"') for name in names(cells[1])}
        assert f'"peft_type": "{METHODS[names(cells[0])[0]].peft_type}"' in cells[1]
    return said


def test_the_table_of_prompt_configurations_is_the_methods_own() -> None:
    sizes = {f.name for f in fields(Prompt)}
    assert sizes <= set(names(TEXT.split("### Prompt configurations")[1].split("|")[0]))
    own = {name: set(config_of(build_prompt(name, {}))) - sizes for name in METHODS.prompts}
    assert _configurations("### Prompt configurations") == own


OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "cartridge": ({"num_frozen_tokens": 2}, {"inference_mode": True}),
    "cpt": ({"cpt_token_ids": [5, 6, 7]}, {"cpt_token_ids": [5, 6, 7], "inference_mode": True}),
    "multitask_prompt_tuning": ({"num_tasks": 13, "num_ranks": 17},),
    "p_tuning": ({}, {"encoder_reparameterization_type": "LSTM"}, {"inference_mode": True}),
    "prefix_tuning": ({}, {"prefix_projection": True}, {"prefix_projection": True, "inference_mode": True}),
    "prompt_tuning": ({},),
}


@pytest.mark.parametrize("method", METHODS.prompts)
def test_the_table_of_prompt_tensors_is_the_methods_own(method: str) -> None:
    sizes = {"num_virtual_tokens": 3, "token_dim": 5, "num_transformer_submodules": 2, "num_attention_heads": 1, "num_layers": 7}
    hidden = {"encoder_hidden_size": 11} if method in ("p_tuning", "prefix_tuning") else {}
    letters = {"tokens": 3, "rows": 6, "dim": 5, "layers": 7, "hidden": 11, "tasks": 13, "ranks": 17, "frozen": 2, "trained": 1}
    for option in OPTIONS[method]:
        built = build_prompt(method, {**sizes, **hidden, **option})
        encodes = not built.inference_mode
        when = {"", *(str(v) for v in config_of(built).values() if encodes), *(k for k, v in option.items() if v is True and encodes)}
        when |= set() if encodes else {"inference_mode"}
        found, current = {}, ""
        for cells in rows("### Prompt tensors"):
            current = names(cells[0])[0] if cells[0] else current
            there = encodes if cells[3] == "not `inference_mode`" else "".join(names(cells[3])) in when
            if current == method and there:
                found |= {key: _prompt_sizes(cells[2], letters) for key in names(cells[1])}
        assert found == built.shapes()


def test_the_tables_of_attention_are_the_methods_own() -> None:
    built = {name: build_attention(name, {"adapter_len": 3}) for name in METHODS.attention}
    assert _configurations("### Attention configurations") == {name: set(config_of(method)) for name, method in built.items()}
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for cells in rows("### Attention tensors"):
        current = names(cells[0])[0] if cells[0] else current  # noqa: F821 - the first row names one
        found.setdefault(current, {})[names(cells[1])[0]] = _prompt_sizes(cells[2], {"n": 3, "hidden": 11})
    assert found == {name: {s.key: s.shape for s in method.spec(11)} for name, method in built.items()}


def _prompt_sizes(cell: str, letters: dict[str, int]) -> tuple[int, ...]:
    """The shape that a cell such as "(4 hidden, dim)" stands for."""
    return tuple(math.prod(letters.get(factor) or int(factor) for factor in entry.split()) for entry in cell.strip("()").split(", "))


def test_the_table_of_layers_names_every_kind_and_its_sizes() -> None:
    said = {kind: set(names(cells[1])) for cells in rows("### Layers") for kind in names(cells[0])}
    assert said == {layer.kind: layer_to_json(layer).keys() - {"kind"} for layer in LAYERS.values()}


def test_the_limits_on_the_page_are_the_judges_own() -> None:
    limits = {"GIVE_UP_METHOD": program.GIVE_UP_METHOD, "GIVE_UP_PORT": program.GIVE_UP_PORT, "STOP_TIME": program.STOP_TIME}
    assert limits == {"GIVE_UP_METHOD": 3, "GIVE_UP_PORT": 9, "STOP_TIME": 2.0}
    assert "Three failures in a row on a method, or nine" in TEXT
    assert "end within two seconds" in TEXT
    assert f"than {program.LONGEST_ANSWER >> 20} MiB" in re.sub(r"\s+", " ", TEXT)
    assert EXAMPLES[0] == ("start", {"command": "start", "protocol": VERSION})


def test_every_file_and_heading_that_the_page_leads_to_is_there() -> None:
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert target.removeprefix("#") in headings if target.startswith("#") else (ROOT / "spec" / target).exists(), target
    for path in re.findall(r"`(spec/ports/[^`]+)`", TEXT):
        assert (ROOT / path).exists(), path
