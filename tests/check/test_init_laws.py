"""Fresh adapters: right ones are never accused, in any format; wrong ones are, and by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

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

Host: TypeAlias = Any  # an array
Draw = dict[str, Host]
Draws = list[Draw]
CASES = {c.id: c for c in corpus() if c.operation == "init"}
PROMPTS = {i: c for i, c in CASES.items() if c.method in METHODS.prompts}
DTYPES = tuple(PRECISION)


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
        tensors = {**method.pack(case.layer, start.params), "weight": case.layer.unfold(start.W)}
        out.append({k: round_to(v, dtype) for k, v in tensors.items()})
    return out


def graded(case: Case, draws: Draws, dtype: str) -> str:
    return grade_init(case, {"draws": [{k: encode(round_to(v, dtype)) for k, v in draw.items()} for draw in draws]}, dtype)


def accused(case: Case, dtype: str, seeds: range) -> list[str]:
    return [problem for seed in seeds if (problem := graded(case, fresh(case, dtype, seed), dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_right_start_is_never_accused(case: Case, dtype: str) -> None:
    count = 50 if case.layer is not None else 15  # two hundred seeds over the four formats; the others follow the same few laws
    first = DTYPES.index(dtype) * count
    assert not accused(case, dtype, range(first, first + count))


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_right_start_is_never_accused_in_many_draws(case: Case, dtype: str) -> None:
    assert not accused(case, dtype, range(1000, 1200))


# ---- what goes wrong

Wrong = Callable[[Case, Draw, np.random.Generator], Draw]


def _key(draw: Draw, part: str) -> str:
    return next(k for k in draw if part in k)


def replaced(part: str, number: Callable[[Case, Host, np.random.Generator], Host]) -> Wrong:
    """The tensor whose key has `part`, drawn otherwise."""

    def wrong(case: Case, draw: Draw, rng: np.random.Generator) -> Draw:
        key = _key(draw, part)
        return {**draw, key: number(case, draw[key], rng)}

    return wrong


def fan_in(case: Case) -> int:
    assert case.layer is not None
    return case.layer.fan_in


def rank(case: Case) -> int:
    return int(case.adapters[0].config["r"])


def base_kept(case: Case, draw: Draw, rng: np.random.Generator) -> Draw:
    assert case.weight is not None
    return {**draw, "weight": case.weight}


def no_base_sent(case: Case, draw: Draw, rng: np.random.Generator) -> Draw:
    return {k: v for k, v in draw.items() if k != "weight"}


def swapped(case: Case, draw: Draw, rng: np.random.Generator) -> Draw:
    a, b = _key(draw, "_A"), _key(draw, "_B")
    return {**draw, a: rng.normal(size=draw[a].shape), b: np.zeros_like(draw[b])}


def singular_values_in_B(case: Case, draw: Draw, rng: np.random.Generator) -> Draw:
    a, b = _key(draw, "_A"), _key(draw, "_B")
    root = np.linalg.norm(draw[a], axis=1)
    return {**draw, a: draw[a] / root[:, None], b: draw[b] * root}


def scale_not_taken_out(case: Case, draw: Draw, rng: np.random.Generator) -> Draw:
    """B A is the best part of W, instead of s B A."""
    s = case.adapters[0].config["lora_alpha"] / rank(case)
    a, b = _key(draw, "_A"), _key(draw, "_B")
    return {**draw, a: draw[a] * math.sqrt(s), b: draw[b] * math.sqrt(s)}


def orthogonal_apart(case: Case, draw: Draw, rng: np.random.Generator) -> Draw:
    """A and B each orthogonal, and not to each other."""
    a, b = _key(draw, "_A"), _key(draw, "_B")
    return {**draw, a: np.linalg.qr(rng.normal(size=draw[a].shape[::-1]))[0].T, b: np.linalg.qr(rng.normal(size=draw[b].shape))[0]}


def norm_of_columns(case: Case, v: Host, rng: np.random.Generator) -> Host:
    return np.full_like(v, np.linalg.norm(np.asarray(case.weight)))


def words_at(pick: Callable[[Case, np.random.Generator], Any]) -> Wrong:
    """The words of these ids as the first rows."""

    def wrong(case: Case, draw: Draw, rng: np.random.Generator) -> Draw:
        return {**draw, "embedding.weight": case.question["words"][np.asarray(pick(case, rng))]}

    return wrong


def padded_with_zeros(case: Case, v: Host, rng: np.random.Generator) -> Host:
    return np.concatenate([v[:2], v[2:] * 0])


WRONG: dict[str, tuple[str, Wrong, str]] = {
    "A zero": ("lora.linear.init-default", replaced("_A", lambda c, v, rng: v * 0), "init-A-zero"),
    "B random": ("lora.linear.init-default", replaced("_B", lambda c, v, rng: rng.normal(size=v.shape)), "init-B-random"),
    "A normal with deviation 1/r": (
        "lora.linear.init-default",
        replaced("_A", lambda c, v, rng: rng.normal(0, 1 / rank(c), v.shape)),
        "init-wrong",
    ),
    "A with torch's plain kaiming bound, sqrt(6 / fan in)": (
        "lora.linear.init-default",
        replaced("_A", lambda c, v, rng: rng.uniform(-1, 1, v.shape) * math.sqrt(6 / fan_in(c))),
        "init-wrong-bound",
    ),
    "A too wide by sqrt 3": ("lora.linear.init-default", replaced("_A", lambda c, v, rng: v * math.sqrt(3)), "init-wrong-bound"),
    "A too narrow by sqrt 3": ("lora.linear.init-default", replaced("_A", lambda c, v, rng: v / math.sqrt(3)), "init-wrong-law"),
    "A never negative": ("lora.linear.init-default", replaced("_A", lambda c, v, rng: np.abs(v)), "init-wrong-law"),
    "A by the fan out": (
        "lora.linear.init-default",
        replaced("_A", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(rank(c))),
        "init-wrong-bound",
    ),
    "A of a convolution without its kernel": (
        "lora.conv2d.init-default",
        replaced("_A", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(v.shape[1])),
        "init-wrong-bound",
    ),
    "A of groups by one group's inputs": (
        "lora.conv2d-groups.init-default",
        replaced("_A", lambda c, v, rng: v * math.sqrt(2)),
        "init-wrong-bound",
    ),
    "gaussian with deviation 1": (
        "lora.linear.init-gaussian",
        replaced("_A", lambda c, v, rng: rng.normal(size=v.shape)),
        "init-wrong-law",
    ),
    "gaussian with deviation 1/sqrt r": (
        "lora.linear.init-gaussian",
        replaced("_A", lambda c, v, rng: rng.normal(0, rank(c) ** -0.5, v.shape)),
        "init-wrong-law",
    ),
    "gaussian ignored": (
        "lora.linear.init-gaussian",
        replaced("_A", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(fan_in(c))),
        "init-wrong-law",
    ),
    "gaussian is zero": ("lora.linear.init-gaussian", replaced("_A", lambda c, v, rng: v * 0), "init-zero"),
    "False ignored, B zero": ("lora.linear.init-false", replaced("_B", lambda c, v, rng: v * 0), "zero"),
    "lora_bias random": (
        "lora.linear.init-default-bias",
        replaced("B.bias", lambda c, v, rng: rng.normal(size=v.shape)),
        "init-bias-random",
    ),
    "embedding roles swapped": ("lora.embedding.init-default", swapped, "embedding-init-swapped"),
    "embedding B as narrow as a linear's": (
        "lora.embedding.init-default",
        replaced("_B", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / 2),
        "init-wrong-law",
    ),
    "pissa without the base changed": ("lora.linear.init-pissa", base_kept, "init-pissa-base-kept"),
    "pissa without the base sent": ("lora.linear.init-pissa", no_base_sent, "init-pissa-base-kept"),
    "pissa without the scale": ("lora.linear.init-pissa", scale_not_taken_out, "init-pissa"),
    "pissa with all of S in B": ("lora.linear.init-pissa", singular_values_in_B, "init-pissa"),
    "olora without the base changed": ("lora.linear.init-olora", base_kept, "init-olora-base-kept"),
    "olora with a wrong Q": ("lora.linear.init-olora", replaced("_B", lambda c, v, rng: v * 2), "init-olora"),
    "orthogonal with B A not zero": ("lora.linear.init-orthogonal", orthogonal_apart, "init-orthogonal"),
    "orthogonal with B zero": ("lora.linear.init-orthogonal", replaced("_B", lambda c, v, rng: v * 0), "init-orthogonal"),
    "magnitude of ones": ("dora.linear.init-default", replaced("magnitude", lambda c, v, rng: np.ones_like(v)), "init-magnitude"),
    "one magnitude for all": ("dora.linear.init-default", replaced("magnitude", norm_of_columns), "init-magnitude"),
    "magnitude of squares": ("dora.conv1d.init-default", replaced("magnitude", lambda c, v, rng: v * v), "init-magnitude"),
    "magnitude of a table, ones": (
        "dora.embedding.init-default",
        replaced("magnitude", lambda c, v, rng: np.ones_like(v)),
        "init-magnitude",
    ),
    "AdaLoRA's E like A and B": (
        "adalora.linear.init-default",
        replaced("_E", lambda c, v, rng: rng.normal(0, 0.02, v.shape)),
        "init-E-random",
    ),
    "AdaLoRA's E of ones": ("adalora.conv2d.init-default", replaced("_E", lambda c, v, rng: np.ones_like(v)), "init-E-random"),
    "AdaLoRA's B zero, as LoRA's": ("adalora.linear.init-default", replaced("_B", lambda c, v, rng: v * 0), "init-zero"),
    "AdaLoRA's A uniform, as LoRA's": (
        "adalora.linear.init-default",
        replaced("_A", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(fan_in(c))),
        "init-wrong-law",
    ),
    "AdaLoRA's False ignored": (
        "adalora.linear.init-false",
        replaced("_A", lambda c, v, rng: rng.normal(0, 0.02, v.shape)),
        "init-wrong-law",
    ),
    "LoHa's w2_b random": ("loha.linear.init-default", replaced("w2_b", lambda c, v, rng: rng.normal(size=v.shape)), "init-not-identity"),
    "LoHa's w1_a as LyCORIS draws it": (
        "loha.linear.init-default",
        replaced("w1_a", lambda c, v, rng: rng.normal(0, 0.1, v.shape)),
        "init-wrong-law",
    ),
    "adaption prompt zero": ("adaption_prompt.init-3", replaced("_prompt", lambda c, v, rng: v * 0), "init-zero"),
    "adaption prompt as a transformer draws it": (
        "adaption_prompt.init-5",
        replaced("_prompt", lambda c, v, rng: v * 0.02),
        "init-wrong-law",
    ),
    "adaption gate open": ("adaption_prompt.init-3", replaced("_gate", lambda c, v, rng: v + 1), "init-gate-open"),
    "adaption gate drawn": ("adaption_prompt.init-5", replaced("_gate", lambda c, v, rng: rng.normal(size=1)), "init-gate-open"),
    "prompt zero": ("prompt_tuning.init-random", replaced("embedding", lambda c, v, rng: v * 0), "init-zero"),
    "prompt as a transformer draws it": (
        "prompt_tuning.init-random",
        replaced("embedding", lambda c, v, rng: v * 0.02),
        "init-wrong-law",
    ),
    "prompt uniform with deviation 1": (
        "multitask_prompt_tuning.init-random",
        replaced("embedding", lambda c, v, rng: rng.uniform(-1, 1, v.shape) * math.sqrt(3)),
        "init-wrong-law",
    ),
    "vocabulary's init ignored": (
        "prompt_tuning.init-vocabulary",
        replaced("embedding", lambda c, v, rng: rng.normal(size=v.shape)),
        "init-no-word",
    ),
    "words averaged": ("prompt_tuning.init-vocabulary", replaced("embedding", lambda c, v, rng: v * 0 + np.mean(v)), "init-no-word"),
    "the first words of the vocabulary": ("prompt_tuning.init-vocabulary", words_at(lambda c, rng: range(3)), "init-words-unlike"),
    "never the last word": ("prompt_tuning.init-two-sides", words_at(lambda c, rng: rng.integers(0, 8, 6)), "init-words-unlike"),
    "rather the first words": (
        "prompt_tuning.init-two-sides",
        words_at(lambda c, rng: np.floor(9 * rng.uniform(size=6) ** 3).astype(int)),
        "init-words-unlike",
    ),
    "no word twice": ("prompt_tuning.init-two-sides", words_at(lambda c, rng: rng.permutation(9)[:6]), "init-words-once"),
    "text filled up with its last word": ("prompt_tuning.init-text-short", words_at(lambda c, rng: (5, 2, 2)), "init-text-not-repeated"),
    "text filled up with zeros": ("prompt_tuning.init-text-short", replaced("embedding", padded_with_zeros), "init-text-not-repeated"),
    "text repeated word by word": (
        "multitask_prompt_tuning.init-text-short",
        words_at(lambda c, rng: (5, 5, 2)),
        "init-text-words-repeated",
    ),
    "text cut in front": ("prompt_tuning.init-text-long", words_at(lambda c, rng: (5, 8, 2)), "init-text-cut-in-front"),
    "text by places": ("prompt_tuning.init-text-long", words_at(lambda c, rng: (0, 1, 2)), "init-text-as-positions"),
    "text reversed": ("prompt_tuning.init-text-long", words_at(lambda c, rng: (5, 1, 7)), "init-text: "),
    "text's init ignored": (
        "prompt_tuning.init-text-short",
        replaced("embedding", lambda c, v, rng: rng.normal(size=v.shape)),
        "init-text: ",
    ),
    "text for U": ("multitask_prompt_tuning.init-text-long", replaced("task_cols", lambda c, v, rng: v / 0.02), "init-wrong-law"),
    "U with deviation 1": ("multitask_prompt_tuning.init-random", replaced("task_cols", lambda c, v, rng: v / 0.02), "init-wrong-law"),
    "V zero, as in LoRA": ("multitask_prompt_tuning.init-random", replaced("task_rows", lambda c, v, rng: v * 0), "init-zero"),
    "U and V so that the prompt is P": (
        "multitask_prompt_tuning.init-vocabulary",
        replaced("task_rows", lambda c, v, rng: v * 0 + 1),
        "init-wrong-law",
    ),
    "source ignored": (
        "multitask_prompt_tuning.init-source-only-source-shared",
        replaced("embedding", lambda c, v, rng: rng.normal(size=v.shape)),
        "init-source-ignored",
    ),
    "source's tasks taken too": (
        "multitask_prompt_tuning.init-source-only-source-shared",
        replaced("task_cols", lambda c, v, rng: c.question["source"]["prefix_task_cols"][1:2]),
        "init-wrong-law",
    ),
    "the source's first task": (
        "multitask_prompt_tuning.init-source-exact-source-task",
        replaced("task_rows", lambda c, v, rng: c.question["source"]["prefix_task_rows"][:1]),
        "init-source-task",
    ),
    "the source's tasks summed": (
        "multitask_prompt_tuning.init-source-average-source-tasks",
        replaced("task_cols", lambda c, v, rng: v * 3),
        "init-source-not-averaged",
    ),
    "the mean of the source's prompts": (
        "multitask_prompt_tuning.init-source-average-source-tasks",
        replaced("embedding", lambda c, v, rng: v / 3),
        "init-source-ignored",
    ),
    "prefix zero unasked": ("prefix_tuning.init-random", replaced("embedding", lambda c, v, rng: v * 0), "init-zero"),
    "prefix random where zero was asked": (
        "prefix_tuning.init-zero",
        replaced("embedding", lambda c, v, rng: rng.normal(size=v.shape)),
        "init-weights-ignored",
    ),
    "projection random where zero was asked": (
        "prefix_tuning.init-projected-zero",
        replaced("transform.2.weight", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(3)),
        "init-last-layer-random",
    ),
    "last bias random where zero was asked": (
        "prefix_tuning.init-projected-zero",
        replaced("transform.2.bias", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(3)),
        "init-last-layer-random",
    ),
    "everything zero where the last layer was asked": (
        "prefix_tuning.init-projected-zero",
        replaced("embedding", lambda c, v, rng: v * 0),
        "init-zero",
    ),
    "first layer of the projection zero": (
        "prefix_tuning.init-projected-zero",
        replaced("transform.0.weight", lambda c, v, rng: v * 0),
        "init-encoder-zero",
    ),
    "bias of a dense layer zero": ("p_tuning.init-mlp", replaced("mlp_head.0.bias", lambda c, v, rng: v * 0), "init-encoder-zero"),
    "dense layer by Xavier": (
        "p_tuning.init-mlp",
        replaced("mlp_head.0.weight", lambda c, v, rng: rng.uniform(-1, 1, v.shape) * math.sqrt(6 / sum(v.shape))),
        "init-wrong-bound",
    ),
    "dense layer normal": (
        "p_tuning.init-mlp",
        replaced("mlp_head.2.weight", lambda c, v, rng: rng.normal(0, 0.02, v.shape)),
        "init-wrong-law",
    ),
    "dense layer by its outputs": (
        "prefix_tuning.init-projected",
        replaced("transform.2.weight", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(v.shape[0])),
        "init-wrong-law",
    ),
    "LSTM by its inputs": (
        "p_tuning.init-lstm",
        replaced("weight_ih_l0", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(v.shape[1])),
        "init-wrong-law",
    ),
    "LSTM's forget bias one": ("p_tuning.init-lstm", replaced("bias_ih_l0", lambda c, v, rng: v * 0 + 1), "init-wrong-bound"),
    "LSTM's biases zero": ("p_tuning.init-lstm", replaced("bias_hh_l1_reverse", lambda c, v, rng: v * 0), "init-encoder-zero"),
    "LSTM's way back a copy in narrow": ("p_tuning.init-lstm", replaced("weight_hh_l1_reverse", lambda c, v, rng: v / 2), "init-wrong-law"),
    "IA3 zeros": ("ia3.linear.init-default", replaced("ia3_l", lambda c, v, rng: v * 0), "ia3-init-not-one"),
    "IA3 nearly one": ("ia3.linear.init-default-feedforward", replaced("ia3_l", lambda c, v, rng: v * 1.25), "ia3-init-not-one"),
}


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


def test_every_drawn_tensor_has_a_law() -> None:
    """Computed starts (pissa, olora, orthogonal) and DoRA's magnitude have identities instead."""
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
        assert set(laws(case)) == (set() if computed else keys), case.id


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
