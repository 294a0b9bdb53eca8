"""Fresh adapters: right ones are never accused, in any format; wrong ones are, and by name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from peft_ref.backend import round_to
from peft_ref.check.case import Case, build_attention, build_method, build_prompt, encode
from peft_ref.check.corpus import corpus
from peft_ref.check.distributions import KS_LIMIT, normal, uniform
from peft_ref.check.init_laws import grade_init, laws, shapes_of
from peft_ref.check.judge import judge
from peft_ref.check.port import Answered, Port, Reply, Skipped
from peft_ref.check.prompt_starts import SIZES, sources_of
from peft_ref.check.result import PortInfo
from peft_ref.check.tolerance import PRECISION
from peft_ref.methods import METHODS
from tests.check.wrong_starts import WRONG, Draw, Host, Wrong

Draws = list[Draw]
CASES = {c.id: c for c in corpus() if c.operation == "init"}
PROMPTS = {i: c for i, c in CASES.items() if c.method in METHODS.prompts}
DTYPES = tuple(PRECISION)


def sent(value: Any, dtype: str) -> Any:
    """A tensor as a port of that dtype sends it: places are integers in any."""
    return value if value.dtype.kind in "iu" else round_to(value, dtype)


def fresh(case: Case, dtype: str, seed: int) -> Draws:
    """What an honest port draws: computed in float64 or float32, each number rounded once to its format."""
    wide = np.float64 if dtype == "float64" else np.float32
    if case.method in METHODS.prompts:
        prompt, sources = build_prompt(case.method, case.adapters[0].config), sources_of(case.question, lambda v: v.astype(wide))
        seeds = [np.random.default_rng([seed, i]) for i in range(case.question["draws"])]
        starts = [prompt.init(np.zeros(1, wide), rng, sources) for rng in seeds]
        return [{k: round_to(v, dtype) for k, v in start.items()} for start in starts]
    if case.method in METHODS.attention:
        added, hidden = build_attention(case.method, case.adapters[0].config), case.question["attention"]["hidden_size"]
        blocks = [added.init(hidden, np.zeros(1, wide), np.random.default_rng([seed, i])) for i in range(case.question["draws"])]
        return [{k: round_to(v, dtype) for k, v in added.pack(start).items()} for start in blocks]
    assert case.layer is not None
    assert case.weight is not None
    method = build_method(case.method, case.adapters[0].config)
    W = case.layer.fold(case.weight).astype(wide)
    out = []
    for i in range(case.question["draws"]):
        start = method.init(case.layer, W, np.random.default_rng([seed, i]))
        params = method.with_frozen_bias(start.params, None if case.bias is None else case.bias.astype(wide))
        tensors = {**method.pack(case.layer, params), "weight": case.layer.unfold(start.W)}
        out.append({k: sent(v, dtype) for k, v in tensors.items()})
    return out


def graded(case: Case, draws: Draws, dtype: str) -> str:
    return grade_init(case, {"draws": [{k: encode(sent(v, dtype)) for k, v in draw.items()} for draw in draws]}, dtype)


def accused(case: Case, dtype: str, seeds: range) -> list[str]:
    return [problem for seed in seeds if (problem := graded(case, fresh(case, dtype, seed), dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_right_start_is_never_accused(case: Case, dtype: str) -> None:
    # Two hundred seeds over the four formats of LoRA's linear starts; the others follow the same few laws.
    count = 50 if case.id.startswith("lora.linear.") else 6
    first = DTYPES.index(dtype) * count
    assert not accused(case, dtype, range(first, first + count))


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_right_start_is_never_accused_in_many_draws(case: Case, dtype: str) -> None:
    assert not accused(case, dtype, range(1000, 1200))


# ---- what goes wrong


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_start_is_named(what: str, dtype: str) -> None:
    case_id, wrong, name = WRONG[what]
    case = CASES[f"{case_id}.init"]
    for seed in range(4):
        rng = np.random.default_rng([seed, 99])
        problem = graded(case, [wrong(case, draw, rng) for draw in fresh(case, dtype, seed)], dtype)
        assert name in problem, f"{what} in {dtype}: {problem or 'not seen'}"


# ---- the statistics


@pytest.mark.parametrize("law", [uniform(0.4), normal(0.25)], ids=["uniform", "normal"])
def test_one_and_the_same_draw_again_and_again_is_seen(law: Any) -> None:
    """A generator that is seeded anew for every draw."""
    once = np.random.default_rng(0).uniform(-0.4, 0.4, (4, 5))
    assert law.problem(np.stack([once] * 48), "float64")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_distance_of_honest_draws_stays_far_from_the_limit(dtype: str) -> None:
    """At a limit of half the size nobody would be accused either: P(sqrt(n) D > 1.9) is 1.5e-3, and 400 sets are drawn."""
    rng = np.random.default_rng(5)
    n = 48 * 20
    worst = 0.0
    for _ in range(200):
        for values in (round_to(rng.uniform(-0.4, 0.4, n), dtype) / 0.4 / 2 + 0.5, _phi(round_to(rng.normal(0, 0.25, n), dtype) / 0.25)):
            ordered = np.sort(values)
            steps = np.arange(n + 1) / n
            worst = max(worst, np.sqrt(n) * max(np.max(steps[1:] - ordered), np.max(ordered - steps[:-1])))
    assert worst < KS_LIMIT * 0.75


def _phi(z: Host) -> Host:
    return np.asarray([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in z])


def test_every_tensor_has_a_law_or_any_other_numbers_are_noticed() -> None:
    """Computed starts (pissa, olora, orthogonal) and DoRA's magnitude have identities instead; what else has no law is tried here."""
    for case in CASES.values():
        if case.method in METHODS.prompts:
            assert list(laws(case)) == list(build_prompt(case.method, case.adapters[0].config).shapes()), case.id
            continue
        if case.method in METHODS.attention:
            assert list(laws(case)) == list(shapes_of(case)), case.id
            continue
        assert case.layer is not None
        keys = {s.key for s in build_method(case.method, case.adapters[0].config).spec(case.layer)} - {"lora_magnitude_vector"}
        computed = case.adapters[0].config.get("init_lora_weights") in ("pissa", "olora", "orthogonal")
        assert set(laws(case)) <= keys, case.id
        for key in sorted(set() if computed else keys - set(laws(case))):
            assert graded(case, [_other_numbers(draw, key) for draw in fresh(case, "float64", 0)], "float64"), (case.id, key)


def _other_numbers(draw: Draw, key: str) -> Draw:
    v = draw[key]
    return {**draw, key: v + 1 if v.dtype.kind in "iu" else np.random.default_rng(5).normal(size=v.shape)}


def test_a_start_from_words_can_be_told_from_another() -> None:
    """Every word is another one, and a text is once shorter and once longer than what it has to fill."""
    for case in PROMPTS.values():
        words = case.question.get("words")
        if words is not None:
            assert len({tuple(row) for row in words.tolist()}) == len(words), case.id
    lengths = {len(c.question["token_ids"]) - SIZES["num_virtual_tokens"] for c in PROMPTS.values() if "token_ids" in c.question}
    assert min(lengths) < 0 < max(lengths)
    for source in (c.question["source"] for c in PROMPTS.values() if "source" in c.question):
        for name in ("prefix_task_cols", "prefix_task_rows"):
            tasks = source[name]
            assert not np.array_equal(tasks[0], tasks[1])
            assert not np.array_equal(np.mean(tasks, axis=0), tasks[1])


# ---- malformed answers


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({}, "draws"),
        ({"draws": []}, "draws"),
        ({"draws": [{"lora_A.weight": [[1.0]]}]}, "keys"),
        ({"draws": [{"lora_A.weight": [[1.0]], "lora_B.weight": [[1.0]]}]}, "expected (4, 5)"),
    ],
)
def test_an_answer_that_cannot_be_judged_says_what_is_missing(answer: dict[str, Any], says: str) -> None:
    assert says in grade_init(CASES["lora.linear.init-default.init"], answer, "float64")


class FreshPort(Port):
    """Answers nothing but init, wrongly where told."""

    def __init__(self, dtype: str, wrong: Wrong | None = None) -> None:
        self._dtype, self._wrong = dtype, wrong

    def start(self) -> PortInfo:
        return PortInfo(name="fresh", dtype=self._dtype, operations=("init",))

    def ask(self, case: Case) -> Reply:
        if case.operation != "init":
            return Skipped("init only")
        draws = fresh(case, self._dtype, 7)
        rng = np.random.default_rng(1)
        draws = draws if self._wrong is None else [self._wrong(case, d, rng) for d in draws]
        return Answered({"draws": [{k: encode(v) for k, v in d.items()} for d in draws]})

    def forget(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_the_judge_grades_starts() -> None:
    report = judge(FreshPort("float32"), corpus(), search=False)
    assert report.counts["right"] == len(CASES)
    assert report.exit_code == 0
    case = CASES["lora.linear.init-default.init"]
    report = judge(FreshPort("float32", WRONG["B random"][1]), [case], search=False)
    assert report.counts["wrong"] == 1
    assert "init-B-random" in report.verdicts[0].reason
    assert report.exit_code == 1
