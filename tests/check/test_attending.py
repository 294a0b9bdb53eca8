"""Questions about attention: the pieces of wrong answers make the right one too, and what is wrong about names is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_ref.check.attending import pose_attention
from peft_ref.check.attending_text import BLOCK_MISTAKES
from peft_ref.check.attention_family import attended, keys_values, other_output
from peft_ref.check.case import ATTENTION_OPERATIONS, Case
from peft_ref.check.corpus import corpus
from peft_ref.check.judge import judge
from peft_ref.check.mistake import Suite
from peft_ref.check.mistakes import SUITES
from peft_ref.check.oracle import answer, float64
from peft_ref.check.suites import Suites
from peft_ref.check.text import grade_text, right_text
from peft_ref.errors import ConfigError
from peft_ref.methods import METHODS
from tests.check.function_port import FunctionPort

ASKED = [c for name in METHODS.attention for c in corpus(name) if c.operation in ATTENTION_OPERATIONS]
TEXT = {c.id: c for name in METHODS.attention for c in corpus(name) if c.operation in ("config", "state_dict")}
PLACED = [c for c in TEXT.values() if c.operation == "config" and "error" not in right_text(c)]


@pytest.mark.parametrize("case", ASKED, ids=lambda c: c.id)
def test_the_pieces_of_the_mistakes_and_autograd_make_the_right_answer(case: Case) -> None:
    """They are written apart from the method, plainly, head by head: so this also checks the method."""
    got = other_output(lambda p: attended(p, *keys_values(p)))(case)
    assert got is not None
    for name, want in answer(case).items():
        np.testing.assert_allclose(got[name], want, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("case", [c for c in ASKED if c.operation == "attention_backward"], ids=lambda c: c.id)
def test_the_gradients_are_difference_quotients(case: Case) -> None:
    p, rng = pose_attention(case, float64), np.random.default_rng(2)
    right = answer(case)
    moves = {"q": rng.normal(size=p.q.shape), **{f"0.{key}": rng.normal(size=v.shape) for key, v in p.method.pack(p.params).items()}}

    def at(step: float) -> float:
        moved = {key: v + step * moves[f"0.{key}"] for key, v in p.method.pack(p.params).items()}
        params = p.method.unpack(p.block.hidden_size, moved)
        return float(np.sum(p.method.output(p.block, params, p.w, p.q + step * moves["q"]) * case.dy))

    found = sum(float(np.sum(right[name] * move)) for name, move in moves.items())
    assert found == pytest.approx((at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-6, abs=1e-6)


def _wrong(case: Case, modules: set[str]) -> dict[str, Any]:
    return {"modules": {name: {"adapter_len": case.question["adapter_config"]["adapter_len"]} for name in modules}}


@pytest.mark.parametrize("name", BLOCK_MISTAKES)
def test_a_mistake_about_places_is_named(name: str) -> None:
    sentence, wrong = BLOCK_MISTAKES[name]
    named = [c for c in PLACED if grade_text(c, _wrong(c, wrong(c.question))) == f"{name}: {sentence}"]
    assert named


@pytest.mark.parametrize(
    ("case", "got", "says"),
    [
        ("adaption_prompt.config.top", {}, 'must hold "modules"'),
        ("adaption_prompt.config.top", {"error": "no"}, "refuses what must be accepted: no"),
        ("adaption_prompt.config.too-many", {"modules": {}}, "must be refused with an error"),
        ("adaption_prompt.config.no-such-architecture", {"modules": {}}, "must be refused with an error"),
        ("adaption_prompt.config.top", {"modules": {"model": {"adapter_len": 4}}}, "missing: model.layers.10.self_attn"),
        (
            "adaption_prompt.config.gpt2",
            {"modules": {f"transformer.h.{i}.attn": {"adapter_len": 5} for i in (1, 2)}},
            "has {'adapter_len': 5}, expected {'adapter_len': 4}",
        ),
    ],
)
def test_what_is_wrong_about_places_is_said(case: str, got: dict[str, Any], says: str) -> None:
    assert says in grade_text(TEXT[case], got)


def test_right_answers_about_names_are_right() -> None:
    for case in TEXT.values():
        assert grade_text(case, right_text(case)) == "", case.id


@pytest.mark.parametrize("adapter", ["default", "0"])
def test_a_name_in_the_keys_is_named(adapter: str) -> None:
    case = TEXT[f"adaption_prompt.state-dict.{adapter}"]
    right = right_text(case)["tensors"]
    assert grade_text(case, {"tensors": {f"{key}.{adapter}": v for key, v in right.items()}}).startswith("adapter-name-in-key")
    assert grade_text(case, {"tensors": {f"{key}.weight": v for key, v in right.items()}}).startswith("weight-suffix-added")
    assert "other numbers" in grade_text(case, {"tensors": {key: (0 * np.asarray(v)).tolist() for key, v in right.items()}})


def test_what_no_mistake_gives_is_unknown() -> None:
    def odd(case: Case) -> Any:
        return {name: value / (1 + value * value) for name, value in answer(case).items()}

    report = judge(FunctionPort(odd, "float64"), [c for c in ASKED if ".plain." in c.id], search=False)
    assert [d.mistakes for d in report.diagnoses] == [()]


def test_a_suite_of_another_kind_is_refused() -> None:
    suites = Suites({})
    with pytest.raises(ConfigError, match="no method of that name was registered"):
        suites.register("adaption_prompt", Suite(variants=(), mistakes=(), attention=SUITES["adaption_prompt"].attention))
