"""Every named mistake shows in the corpus, and no two look alike: otherwise the judge would be silent, or would guess."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from peft_ref.check.case import Case, NDArray
from peft_ref.check.judge import judge
from peft_ref.check.mistake import Mistake
from peft_ref.check.mistakes import SUITES
from peft_ref.check.oracle import answer
from tests.check.discrimination import MARGIN, array_cases, between, replays, separation
from tests.check.function_port import FunctionPort
from tests.methods import facts

PRECISE = ("float64", "float32")
ALL = [(method, mistake) for method, suite in SUITES.items() for mistake in suite.mistakes]
NAMED = [pytest.param(method, mistake, id=f"{method}-{mistake.name}") for method, mistake in ALL]


@pytest.mark.parametrize("dtype", PRECISE)
@pytest.mark.parametrize("method", SUITES)
def test_every_mistake_stands_ten_tolerances_away_somewhere(method: str, dtype: str) -> None:
    unseen = {name: max(row.values()) for name, row in separation(method, dtype).items() if max(row.values()) <= MARGIN}
    assert not unseen


@pytest.mark.parametrize("dtype", PRECISE)
@pytest.mark.parametrize("method", SUITES)
def test_every_two_mistakes_stand_ten_tolerances_apart_somewhere(method: str, dtype: str) -> None:
    pairs = combinations(replays(method), 2)
    alike = [(one, other) for one, other in pairs if all(distance <= MARGIN for distance in between(method, one, other, dtype))]
    assert not alike


@pytest.mark.parametrize("method", SUITES)
def test_no_two_rows_of_the_matrix_are_equal(method: str) -> None:
    # The numbers of the answers, not the infinities that exact cases give.
    rows = separation(method, "float32")
    alike = []
    for one, other in combinations(rows, 2):
        same = all(
            (one in (a := replays(method)) and case.id in a[one]) == (case.id in a[other])
            and (
                case.id not in a[one]
                or all(k in a[other][case.id] and np.array_equal(a[one][case.id][k], a[other][case.id][k]) for k in a[one][case.id])
            )
            for case in array_cases(method)
        )
        alike += [(one, other)] if same else []
    assert not alike


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.sweep)])
@pytest.mark.parametrize(("method", "mistake"), NAMED)
def test_a_port_that_makes_a_mistake_hears_its_name_and_no_other(method: str, mistake: Mistake, dtype: str) -> None:
    made = replays(method)[mistake.name]
    port = FunctionPort(lambda case: made[case.id] if case.id in made else answer(case), dtype)
    report = judge(port, array_cases(method), search=False)
    assert not report.broken
    assert [d.mistakes for d in report.diagnoses] == [(mistake.name,)]
    assert mistake.sentence in report.diagnoses[0].text
    assert report.exit_code == (0 if mistake.dialect else 1)


@pytest.mark.parametrize("method", SUITES)
def test_a_replay_answers_in_the_right_shapes(method: str) -> None:
    """A replay of another shape would be an error of the harness, never a diagnosis."""
    for case in array_cases(method):
        right = {k: v.shape for k, v in answer(case).items()}
        for name, answers in replays(method).items():
            if case.id in answers:
                assert {k: np.shape(v) for k, v in answers[case.id].items()} == right, (name, case.id)


@pytest.mark.parametrize("method", SUITES)
def test_every_replay_is_finite(method: str) -> None:
    for name, answers in replays(method).items():
        for case, out in answers.items():
            assert all(np.all(np.isfinite(v)) for v in out.values()), (name, case)


@pytest.mark.parametrize(
    ("method", "at_least"), [("lora", 16), ("dora", 11), ("loha", 8), ("ia3", 8), ("hra", 15), ("oft", 18), ("road", 16)]
)
def test_there_are_as_many_mistakes_as_people_make(method: str, at_least: int) -> None:
    names = [m.name for m in SUITES[method].mistakes]
    assert len(set(names)) == len(names) >= at_least


@pytest.mark.parametrize(("method", "mistake"), NAMED)
def test_a_mistake_explains_itself(method: str, mistake: Mistake) -> None:
    assert mistake.name.replace("-", "").isalnum()
    assert mistake.sentence
    assert not mistake.sentence.endswith(".")
    assert mistake.clause
    assert all(link.startswith("https://") for link in mistake.links)


STEP = 1e-4
FORWARD_OF = {"backward": "forward", "prompt_backward": "prompt", "attention_backward": "attention"}


@pytest.mark.parametrize(("method", "mistake"), NAMED)
def test_the_gradients_of_a_mistake_are_those_of_its_own_forward_pass(method: str, mistake: Mistake) -> None:
    """A port that makes it differentiates what it computes: along a random direction of every tensor, gradient and difference agree."""
    asked = {case.operation for case in array_cases(method) if case.id in replays(method)[mistake.name]}
    if not asked & set(FORWARD_OF.values()):
        return  # its forward pass is right: only a hand-written backward pass, or merging, makes this mistake
    for case in array_cases(method):
        if case.operation in FORWARD_OF:
            _assert_own_gradient(mistake, case)


def _assert_own_gradient(mistake: Mistake, case: Case) -> None:
    assert case.dy is not None
    got = mistake.replay(case) or answer(case)
    rng = np.random.default_rng(1)
    several = len(case.adapters) > 1
    for name, gradient in got.items():
        if name == "0.frozen_embedding" or facts(case.method).no_derivative(name, several):  # what is frozen has no gradient
            continue
        if name not in ("q", "x") and case.adapters[int(name.split(".")[0])].config.get("coft"):
            continue  # no gradient goes through its projection
        direction = rng.choice([-1.0, 1.0], gradient.shape)
        above, below = (_output(mistake, _moved(case, name, sign * STEP * direction)) for sign in (1, -1))
        want = np.sum((above - below) * case.dy) / (2 * STEP)
        size = np.sum(np.abs(gradient)) + 1.0
        assert abs(np.sum(gradient * direction) - want) <= 1e-6 * size, (case.id, name)


def _output(mistake: Mistake, case: Case) -> NDArray:
    forward = replace(case, operation=FORWARD_OF[case.operation])
    (output,) = (mistake.replay(forward) or answer(forward)).values()
    return output


def _moved(case: Case, name: str, by: NDArray) -> Case:
    if name == "q":
        return replace(case, question={**case.question, "q": case.question["q"] + by})
    if name == "x":
        return replace(case, x=case.x + by)
    index, _, key = name.partition(".")
    adapters = list(case.adapters)
    tensors = dict(adapters[int(index)].tensors)
    adapters[int(index)] = replace(adapters[int(index)], tensors={**tensors, key: tensors[key] + by})
    return replace(case, adapters=tuple(adapters))
