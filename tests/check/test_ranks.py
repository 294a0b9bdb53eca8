"""`peft-ref ranks`: what is drawn is what the allocator did, and the picture says so in words that can be read."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.check.case import Case, to_json
from peft_ref.check.corpus import corpus
from peft_ref.check.oracle import answer
from peft_ref.cli import main
from peft_ref.errors import ConfigError
from peft_ref.methods.adalora import AdaLoRA
from peft_ref.report.ranks import History, followed, table, trained
from peft_ref.report.ranks_svg import ROW, _apart, svg

ROOT = Path(__file__).parents[2]
TRACES = [c for c in corpus("adalora") if c.operation == "allocate"]
SHORT = AdaLoRA(init_r=4, target_r=2, tinit=10, tfinal=20, deltaT=7, total_step=80, orth_reg_weight=0.1)
SVG = "{http://www.w3.org/2000/svg}"


def texts(picture: str) -> list[str]:
    return [str(t.text) for t in ET.fromstring(picture).iter(f"{SVG}text")]


@pytest.fixture(scope="module")
def history() -> History:
    return trained(SHORT, (3, 1), seed=0)


@pytest.mark.parametrize("case", TRACES, ids=lambda c: c.id)
def test_the_ranks_of_a_trace_are_those_that_the_judge_expects(case: Case) -> None:
    """Where E was just masked, a rank is how many of its entries are left."""
    got, right, config = followed(to_json(case)), answer(case), case.question["adapter_config"]
    last = config["total_step"] - config["tfinal"]
    for i, step in enumerate(got.steps):
        if step >= last or (step > config["tinit"] and step % config["deltaT"] == 0):
            for name, ranks in got.ranks.items():
                assert ranks[i] == np.count_nonzero(right[f"steps.{step}.{name}.lora_E"])
    assert len(got.ranks) == 2


def test_a_training_keeps_to_the_budget_and_to_its_phases(history: History) -> None:
    ranks = np.asarray(list(history.ranks.values())).sum(axis=0)
    assert history.steps == tuple(range(1, 81))
    assert set(ranks[:10]) == {8}
    assert set(ranks[59:]) == {4}
    changed = {step for step, before, after in zip(history.steps[1:], ranks, ranks[1:], strict=False) if before != after}
    assert changed
    assert changed <= {14, 21, 28, 35, 42, 49, 56, 60}
    for step, kept, allowed in zip(history.steps, ranks, history.budget, strict=True):
        if step in changed:
            assert kept == allowed  # nothing ties


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_module_gets_about_the_rank_of_what_it_has_to_learn(seed: int) -> None:
    method = AdaLoRA(init_r=6, target_r=3, tinit=30, tfinal=80, deltaT=10, total_step=300, orth_reg_weight=0.1)
    ends = [ranks[-1] for ranks in trained(method, (5, 1, 4, 2), seed).ranks.values()]
    assert ends[0] >= ends[2] > ends[3] >= ends[1]


def test_a_training_is_the_same_for_the_same_seed_and_another_for_another(history: History) -> None:
    assert trained(SHORT, (3, 1), seed=0) == history
    assert trained(SHORT, (3, 1), seed=1) != history


def test_the_picture_has_a_title_axes_phases_and_every_module_with_its_last_rank(history: History) -> None:
    told = texts(svg(history))
    for wanted in ("AdaLoRA: how the allocator shares out the ranks", "step of the training", "rank of a module: triplets that stay"):
        assert wanted in told
    assert {"warm-up", "ranks are allocated every 7 steps", "the pattern is frozen", "2  budget, for each module"} <= set(told)
    for name, ranks in history.ranks.items():
        assert f"{ranks[-1]}  {name}" in told
    assert any("init_r 4, target_r 2, tinit 10, tfinal 20, deltaT 7, total_step 80" in text for text in told)


def test_a_line_passes_through_its_ranks(history: History) -> None:
    """Read back from the picture: as many heights as ranks, a change at every step at which one changed."""
    root = ET.fromstring(svg(history))
    lines = [p.attrib["d"] for p in root.iter(f"{SVG}path") if p.attrib.get("stroke-width") == "2.6"]
    assert len(lines) == len(history.ranks)
    for line, ranks in zip(lines, history.ranks.values(), strict=True):
        assert line.count("V") == sum(a != b for a, b in pairwise(ranks))
        heights = [float(y) for y in re.findall(r"V([\d.]+)", line)]
        order = [rank for before, rank in pairwise(ranks) if before != rank]
        assert sorted(zip(order, heights, strict=True), key=lambda p: -p[1]) == sorted(zip(order, heights, strict=True), key=lambda p: p[0])


@pytest.mark.parametrize("wanted", [[100.0] * 7, [10.0, 12.0, 300.0, 301.0, 302.0], [0.0, 50.0, 100.0], [5.0, 5.0, 30.0, 31.0]])
def test_names_stand_a_row_apart_in_their_order(wanted: list[float]) -> None:
    places = _apart(wanted)
    assert all(b - a >= ROW - 1e-9 for a, b in pairwise(places))
    assert np.mean(places) == pytest.approx(np.mean(wanted))


def test_a_name_from_a_trace_cannot_leave_its_place(history: History) -> None:
    nasty = replace(history, ranks={'</text><script>"&': history.ranks["module 1 (to learn: 3)"], "a\x1b[31m" + "b" * 60: (1,) * 80})
    picture = svg(nasty)
    assert "<script" not in picture
    assert "\x1b" not in picture + table(nasty)
    assert max(map(len, texts(picture))) < 120


def test_the_picture_in_the_spec_is_one_of_these() -> None:
    told = texts((ROOT / "spec/pictures/ranks.svg").read_text("utf-8"))
    assert "5  module 1 (to learn: 5)" in told
    assert "step of the training" in told


# ---- the verb


def test_the_verb_prints_a_table_or_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = [
        "--init-r",
        "4",
        "--target-r",
        "2",
        "--tinit",
        "10",
        "--tfinal",
        "20",
        "--deltaT",
        "7",
        "--total-step",
        "80",
        "--learn",
        "3",
        "1",
    ]
    assert main(["ranks", *schedule, "--svg", str(tmp_path / "ranks.svg")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "  [2] module 2 (to learn: 1)"
    assert out.splitlines()[1].split() == ["1", "8", "8", "4", "4"]
    assert ET.parse(tmp_path / "ranks.svg").getroot().tag == f"{SVG}svg"
    assert main(["ranks", *schedule, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["peft_ref_ranks"] == 1
    assert len(told["steps"]) == len(told["budget"]) == len(told["ranks"]["module 2 (to learn: 1)"]) == 80
    assert told["adapter_config"]["deltaT"] == 7


def test_the_verb_follows_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(to_json(TRACES[0])))
    assert main(["ranks", "--trace", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == followed(to_json(TRACES[0])).to_json()


def _without_E(trace: Any) -> None:
    del trace["steps"][0]["parameters"]["layers.0.up_proj"]["lora_E"]


def _other_shape(trace: Any) -> None:
    trace["steps"][1]["gradients"]["layers.0.up_proj"]["lora_E"] = [[1.0]]


def _ragged(trace: Any) -> None:
    trace["steps"][1]["gradients"]["layers.0.up_proj"]["lora_A"][0] = [1.0]


def _flat_E(trace: Any) -> None:
    for step in trace["steps"]:
        step["parameters"]["layers.0.up_proj"]["lora_E"] = [1.0, 1.0, 1.0]


def _out_of_order(trace: Any) -> None:
    trace["steps"][1]["step"] = 7


def _unknown_key(trace: Any) -> None:
    trace["adapter_config"]["r"] = 3


def _text(trace: Any) -> None:
    trace["steps"][0]["parameters"]["layers.0.up_proj"]["lora_E"] = [["a"]]


def _only_the_last(trace: Any) -> None:
    trace["steps"], trace["steps"][0]["step"] = trace["steps"][:1], 9


def _no_module(trace: Any) -> None:
    trace["steps"][0]["parameters"] = {}


BAD: list[tuple[Callable[[Any], None], str]] = [
    (_without_E, "no 'lora_E'"),
    (_other_shape, "step 2: the gradients of layers.0.up_proj are"),
    (_ragged, "ragged"),
    (_flat_E, "expected (r, in), (r, 1) and (out, r)"),
    (_out_of_order, "step 7 comes after step 1"),
    (_unknown_key, "no hyper-parameters"),
    (_text, "this is no trace"),
    (_only_the_last, "no step was before it"),
    (_no_module, "this is no trace"),
]


@pytest.mark.parametrize(("spoil", "told"), BAD, ids=lambda v: getattr(v, "__name__", ""))
def test_what_is_no_trace_is_refused_with_a_reason(spoil: Callable[[Any], None], told: str) -> None:
    trace = json.loads(json.dumps(to_json(TRACES[0])))
    spoil(trace)
    with pytest.raises(ConfigError, match=re.escape(told)):
        followed(trace)


@pytest.mark.parametrize("trace", [3, [], {}, {"steps": []}])
def test_what_is_not_even_an_object_of_a_trace_is_refused(trace: Any) -> None:
    with pytest.raises(ConfigError, match="a trace is a JSON object"):
        followed(trace)
