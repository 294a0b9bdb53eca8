"""The operations about training: what is asked leaves nothing to rounding, and the exact answers and the mistakes are what they say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal, getcontext
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest

from peft_ref.check import training
from peft_ref.check.allocator import RIGHT
from peft_ref.check.case import Answer, Case, NDArray, encode, to_json
from peft_ref.check.corpus import corpus
from peft_ref.check.diagnose import expectation, rounded
from peft_ref.check.mistake import Mistake
from peft_ref.check.oracle import answer, exact_answer
from peft_ref.check.penalty_mistakes import PENALTY
from peft_ref.check.port import Failed
from peft_ref.check.protocol import flatten, nest, read_reply
from peft_ref.check.search import smallest
from peft_ref.check.tolerance import PRECISION, compare
from peft_ref.check.training_cases import ODD, SMALL, TRACES, Trace, trace_case
from peft_ref.report import one_line
from peft_ref.report.markup import example
from tests.check.function_port import FunctionPort
from tests.check.honest.port import HonestPort

CASES = {c.id.split(".", 2)[2]: c for c in corpus("adalora") if c.operation in ("aux_loss", "allocate")}
ALLOCATE = [c for c in CASES.values() if c.operation == "allocate"]
AUX_LOSS = [c for c in CASES.values() if c.operation == "aux_loss"]


def random_traces(seed: int, count: int) -> Iterator[Case]:
    """Traces of any schedule: long or short, with and without warm-up, beat and final phase, ties and rounding among them."""
    rng = np.random.default_rng(seed)
    for n in range(count):
        last, tinit = int(rng.integers(2, 8)), int(rng.integers(0, 2))
        config = {
            "init_r": int(rng.integers(2, 5)),
            "target_r": int(rng.integers(0, 3)),
            "tinit": tinit,
            "tfinal": int(rng.integers(0, 3)),
            "deltaT": int(rng.integers(1, 4)),
            "beta1": float(rng.choice([0.5, 0.75, 0.85, 0.9])),
            "beta2": float(rng.choice([0.5, 0.75, 0.85, 0.9])),
        }
        config["target_r"] = min(config["target_r"], config["init_r"])
        config["total_step"] = last + config["tfinal"]
        first, steps = int(rng.integers(0, 2)), int(rng.integers(1, 9))
        draw, sizes = str(rng.choice(["small", "dyadic", "rounded"])), ODD if n % 2 else TRACES[0].sizes
        twins = (("layers.0.up_proj", 0, 1),) if n % 6 == 0 else ()
        yield trace_case(
            Trace(
                name=f"random-{n}",
                clause="",
                config=config,
                first=first,
                last=first + steps,
                salt=seed,
                sizes=sizes,
                draw=draw,
                twins=twins,
            )
        )


# ---- what is asked


@pytest.mark.parametrize("case", ALLOCATE, ids=lambda c: c.id)
def test_no_mask_of_the_corpus_is_decided_by_rounding_in_the_precise_formats(case: Case) -> None:
    for dtype in ("float64", "float32"):
        assert not any(where.any() for where in training.open_triplets(case, dtype).values())


@pytest.mark.parametrize("trace", TRACES, ids=lambda t: t.name)
def test_no_budget_is_decided_by_rounding(trace: Trace) -> None:
    """Neither down, up nor to the nearest: it is off every integer and every half."""
    config = trace_case(trace).question["adapter_config"]
    init, target, last = 2 * config["init_r"], 2 * config["target_r"], config["total_step"] - config["tfinal"]
    for t in range(config["tinit"] + 1, min(trace.last, last - 1) + 1):
        rest = 1 - Fraction(t - config["tinit"], last - config["tinit"])
        doubled = 2 * ((init - target) * rest**3 + target)
        assert t % config["deltaT"] or init == target or abs(doubled - round(doubled)) > Fraction(1, 1000), (t, doubled)


def test_every_part_of_a_schedule_is_asked() -> None:
    asked = set()
    for trace in TRACES:
        config = trace_case(trace).question["adapter_config"]
        last = config["total_step"] - config["tfinal"]
        asked |= {"warm-up"} if config["tinit"] > trace.first else set()
        asked |= {"beat"} if config["deltaT"] > 1 else set()
        asked |= {"last allocation off the beat"} if last % config["deltaT"] and trace.last >= last else set()
        asked |= {"two frozen steps"} if trace.last >= last + 2 else set()
        asked |= {"never ends"} if trace.last < last else set()
        asked |= {f"starts at {trace.first}"}
        asked |= {"nothing goes"} if config["init_r"] == config["target_r"] else set()
        asked |= {"nothing stays"} if config["target_r"] == 0 else set()
    assert len(asked) == 9


def test_the_case_of_ties_has_one_at_the_threshold() -> None:
    """More goes than the budget asks: of the two that tie, one should."""
    kept = [int(np.count_nonzero(v)) for name, v in answer(CASES["ties.allocate"]).items() if name.endswith("2.layers.0.up_proj.lora_E")]
    others = [int(np.count_nonzero(v)) for n, v in answer(CASES["ties.allocate"]).items() if n.endswith("2.layers.0.down_proj.lora_E")]
    left = 4 * Fraction(3, 5) ** 3 + 2  # the budget of step 2 of 5
    assert kept[0] + others[0] == math.floor(left) - 1


# ---- what is right


def test_the_allocator_in_parts_is_the_methods_own_to_the_bit() -> None:
    for case in [*ALLOCATE, *random_traces(1, 120)]:
        want, got = answer(case), RIGHT(case)
        assert got is not None
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], err_msg=f"{case.id} {name}")


@pytest.mark.parametrize("case", AUX_LOSS, ids=lambda c: c.id)
def test_the_exact_penalty_and_its_gradient_are_those_of_decimals(case: Case) -> None:
    getcontext().prec = 60
    modules, weight = case.question["parameters"], Decimal(case.question["adapter_config"]["orth_reg_weight"])
    share, loss = weight / (2 * len(modules)), Decimal(0)
    near = Decimal(10) ** -50 if len(modules) == 2 else Decimal(2) ** -52  # a third of the weight is a constant that was rounded once
    want: dict[str, Any] = {}
    for name, own in modules.items():
        for key in ("lora_A", "lora_B"):
            F = [[Decimal(v) for v in row] for row in (own[key] if key == "lora_A" else own[key].T).tolist()]
            M = [[sum(a * b for a, b in zip(x, y, strict=True)) - (i == j) for j, y in enumerate(F)] for i, x in enumerate(F)]
            size = sum(m * m for row in M for m in row).sqrt()
            loss += share * size
            d = [[2 * share * sum(m * f for m, f in zip(row, col, strict=True)) / (size or 1) for col in zip(*F, strict=True)] for row in M]
            want[f"gradients.{name}.{key}"] = d if key == "lora_A" else [list(column) for column in zip(*d, strict=True)]
        want[f"gradients.{name}.lora_E"] = [[Decimal(0)] for _ in own["lora_E"]]
    want["loss"] = loss
    got = exact_answer(case, 53)
    assert got.keys() == want.keys()
    for name, value in want.items():
        flat = np.asarray(value, dtype=object).reshape(-1)
        for e, w in zip(got[name].reshape(-1), flat, strict=True):
            assert abs(Decimal(e.fraction.numerator) / Decimal(e.fraction.denominator) - w) <= near, name


@pytest.mark.parametrize("mistake", [m for m in PENALTY if "gradient" not in m.name], ids=lambda m: m.name)
def test_the_gradients_of_a_wrong_penalty_are_its_own(mistake: Mistake) -> None:
    step, rng = 1e-5, np.random.default_rng(2)
    case = CASES["plain.aux_loss"]

    def moved(module: str, key: str, by: NDArray) -> float:
        tensors = case.question["parameters"]
        other = {**tensors, module: {**tensors[module], key: tensors[module][key] + by}}
        return float(replayed(replace(case, question={**case.question, "parameters": other}))["loss"])

    def replayed(asked: Case) -> Answer:
        return mistake.replay(asked) or answer(asked)

    for name, gradient in replayed(case).items():
        if name != "loss":
            module, _, key = name.removeprefix("gradients.").rpartition(".")
            direction = rng.choice([-1.0, 1.0], gradient.shape)
            slope = (moved(module, key, step * direction) - moved(module, key, -step * direction)) / (2 * step)
            assert abs(np.sum(gradient * direction) - slope) <= 1e-6 * (1 + np.sum(np.abs(gradient))), name


# ---- where rounding may decide


def near_tie() -> Case:
    """Two triplets whose scores differ in the seventh bit, right at the threshold."""
    case = trace_case(Trace(name="near", clause="", config={**SMALL, "total_step": 4}, first=1, last=2, salt=0))
    [step, _] = case.question["steps"]
    tensors: dict[str, Any] = {
        what: {n: {k: np.full(v.shape, 0.5) for k, v in t.items()} for n, t in step[what].items()} for what in step if what != "step"
    }
    tensors["parameters"]["layers.0.up_proj"]["lora_E"] = np.asarray([[1.0], [1.0078125], [2.0]])
    tensors["parameters"]["layers.0.down_proj"]["lora_E"] = np.asarray([[1.5], [1.75], [2.5]])
    return replace(case, question={**case.question, "steps": [{"step": 1, **tensors}]})


def test_where_rounding_may_decide_both_answers_are_right_and_elsewhere_one() -> None:
    case = near_tie()
    name = "steps.1.layers.0.up_proj.lora_E"
    pruned = [int(np.count_nonzero(v == 0)) for n, v in answer(case).items() if n.endswith("lora_E") and n.startswith("steps")]
    assert sum(pruned) == 3  # 4 (3/4)^3 + 2 = 3.69 stay of 6
    for dtype, is_open in (("float64", False), ("bfloat16", True)):
        where = training.open_triplets(case, dtype)
        assert any(w.any() for w in where.values()) is is_open
    expected = expectation(case, "bfloat16")
    at = np.argwhere(training.open_triplets(case, "bfloat16")[name])[0]
    for value in (0.0, float(case.question["steps"][0]["parameters"]["layers.0.up_proj"]["lora_E"][tuple(at)])):
        other = {k: v.copy() for k, v in rounded(answer(case), "bfloat16").items()}
        other[name][tuple(at)] = value
        assert compare(other, expected).ratio <= 1
        other[name][tuple(at)] = 5.0
        assert compare(other, expected).ratio > 1


def test_what_may_go_and_may_stay_is_what_does_both_at_the_ends_of_the_drifts() -> None:
    """By trying every score at its lowest, in the middle and at its highest."""
    rng, found = np.random.default_rng(4), 0
    for _ in range(300):
        score, drift = rng.choice([1.0, 2.0, 3.0, 4.0, 4.5], 5), rng.choice([0.0, 0.125, 0.375, 0.75], 5)
        pruned, fates = int(rng.integers(1, 6)), [set[bool]() for _ in range(5)]
        for signs in product((-1.0, 0.0, 1.0), repeat=5):
            tried = score + drift * np.asarray(signs)
            for fate, stays in zip(fates, tried > np.sort(tried)[pruned - 1], strict=True):
                fate.add(bool(stays))
        want = np.asarray([len(fate) == 2 for fate in fates])
        np.testing.assert_array_equal(training.either_way(score, drift, pruned), want)
        found += int(want.sum())
    assert found > 100


def test_nothing_is_open_where_nothing_is_masked() -> None:
    for case in ALLOCATE:
        config = case.question["adapter_config"]
        last = config["total_step"] - config["tfinal"]
        for name in training.open_triplets(case, "bfloat16"):
            step = int(name.split(".")[1])
            assert step >= last or (step > config["tinit"] and step % config["deltaT"] == 0), name


@pytest.mark.parametrize("dtype", PRECISION)
def test_no_honest_allocator_is_accused_on_random_traces(dtype: str) -> None:
    """And the judge does look: in every format most of what is masked is not open."""
    masked, is_open = 0, 0
    for seed, case in enumerate(random_traces(3, 40)):
        expected = expectation(case, dtype)
        reply = HonestPort(dtype, seed).ask(case)
        assert compare(reply.answer, expected).ratio <= 1, case.id  # type: ignore[union-attr]
        for name, where in training.open_triplets(case, dtype).items():
            masked, is_open = masked + int(np.count_nonzero(expected.values[name] == 0)), is_open + int(where.sum())
    assert masked > 150
    assert is_open < {"float64": 0.2, "float32": 0.3, "float16": 1.0, "bfloat16": 3.0}[dtype] * masked


# ---- messages


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.id)
def test_an_answer_survives_the_way_through_json(case: Case) -> None:
    right = answer(case)
    sent = json.loads(json.dumps(nest(case, {k: encode(v) for k, v in right.items()})))
    read = flatten(sent)
    assert read.keys() == right.keys()
    for name in right:
        assert read[name].shape == right[name].shape
        np.testing.assert_array_equal(read[name], right[name])


@pytest.mark.parametrize("steps", [[{"layers.0.up_proj": {"lora_A": [[1.0]]}}], 3, {"1": [1.0]}, {"1": {"layers.0.up_proj": [1.0]}}])
def test_steps_of_another_make_are_an_answer_that_cannot_be_read(steps: Any) -> None:
    case = CASES["plain.allocate"]
    reply = read_reply(case, {"id": case.id, "answer": {"steps": steps}})
    assert isinstance(reply, Failed)


def test_integers_in_a_question_are_numbers_like_others() -> None:
    case = CASES["plain.aux_loss"]
    whole = {n: {k: np.ceil(np.abs(v)).astype(int) for k, v in t.items()} for n, t in case.question["parameters"].items()}
    real = {n: {k: v.astype(float) for k, v in t.items()} for n, t in whole.items()}
    one, other = (expectation(replace(case, question={**case.question, "parameters": p}), "float32") for p in (whole, real))
    for name in one.values:
        np.testing.assert_array_equal(one.values[name], other.values[name])
        np.testing.assert_array_equal(one.tolerance[name], other.tolerance[name])


# ---- the smallest counterexample


@pytest.mark.parametrize(("name", "steps"), [("penalty-summed", 0), ("score-summed", 1), ("ties-kept", 2), ("freeze-not-masked", 7)])
def test_a_training_shrinks_to_its_first_wrong_step_and_a_handful_of_ones(name: str, steps: int) -> None:
    mistake = next(m for m in corpus_mistakes() if m.name == name)
    port = FunctionPort(lambda case: mistake.replay(case) or answer(case), "float32")
    wrong = [c for c in CASES.values() if compare(mistake.replay(c) or answer(c), expectation(c, "float32")).ratio > 1]
    found = smallest(port, wrong, "float32", seconds=60)
    assert found is not None
    numbers = [
        v for v in json.dumps({k: v for k, v in found.case.items() if k in ("parameters", "steps")}).split() if v.strip("[],}") == "1.0"
    ]
    assert len(numbers) <= 16
    assert len(found.case.get("steps", ())) == steps
    assert found.got != found.want
    assert to_json(wrong[0])["adapter_config"] == found.case["adapter_config"]
    told = one_line(found)
    assert "layers." in told
    assert "<b>" in example(found)
    if steps:
        assert "all else zero" in told
        assert f"step {found.case['steps'][-1]['step']} " in told
        assert f"steps.{found.case['steps'][-1]['step']}." in told


def corpus_mistakes() -> tuple[Mistake, ...]:
    from peft_ref.check.mistakes import SUITES

    return SUITES["adalora"].mistakes
