"""How a fresh prompt must look, and the cases that ask for one. The question brings what a start is made of:

    words       the model's word embeddings (vocabulary, token_dim)
    token_ids   what the model's tokenizer makes of `prompt_tuning_init_text`
    source      another adapter's file, by its keys, in place of `prompt_tuning_init_state_dict_path`

The laws are written down apart from the code that draws, from what HF PEFT 0.21.2 does. Words that are drawn are held to chance alone:
how often each comes, and that one may come twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from peft_ref.arrays import Array
from peft_ref.backend import round_to
from peft_ref.check.case import Case, CaseAdapter, NDArray, build_prompt, config_of
from peft_ref.check.distributions import UNLIKELY, Law, constant, normal, uniform
from peft_ref.check.tolerance import PRECISION
from peft_ref.check.variants import dyadic, generator
from peft_ref.methods.cpt import DELTA
from peft_ref.methods.multitask_prompt_tuning import COLUMNS, FROM_SOURCE, ROWS
from peft_ref.prompts import EMBEDDING, SAVED, Sources

DRAWS = 48


def sources_of(question: Mapping[str, Any], lift: Callable[[NDArray], Array]) -> Sources:
    """What the question brings to start from."""
    ids, source = question.get("token_ids"), question.get("source")
    return Sources(
        words=lift(question["words"]) if "words" in question else None,
        tokenize=None if ids is None else lambda text: [int(i) for i in ids],
        tensors=None if source is None else {name: lift(value) for name, value in source.items()},
    )


def prompt_laws(case: Case) -> dict[str, Law]:
    """The law of every tensor of a fresh prompt."""
    config, question = case.adapters[0].config, case.question
    shapes = build_prompt(case.method, config).shapes()
    if case.method == "prompt_tuning":
        return {EMBEDDING: _first_rows(config, question, shapes)}
    if case.method == "multitask_prompt_tuning":
        return _of_tasks(config, question, shapes)
    if case.method == "cartridge":
        return dict.fromkeys(shapes, normal(1.0))
    if case.method == "cpt":
        return {EMBEDDING: named_words(question["words"], config["cpt_token_ids"]), DELTA: constant(0.0, "init-words-moved")}
    zero = config.get("init_weights") == "zero"
    if EMBEDDING in shapes and len(shapes) == 1:
        return {EMBEDDING: constant(0.0, "init-weights-ignored") if zero else normal(1.0)}
    found = {EMBEDDING: normal(1.0)}
    for key in shapes.keys() - {EMBEDDING}:
        module = key.rpartition(".")[0]
        if zero and module == "transform.2":
            found[key] = constant(0.0, "init-last-layer-random")
        elif module == "lstm_head":
            found[key] = uniform(1 / math.sqrt(config["encoder_hidden_size"]), IDLE)
        else:
            found[key] = uniform(1 / math.sqrt(shapes[f"{module}.weight"][1]), IDLE)
    return {key: found[key] for key in shapes}


IDLE = "init-encoder-zero: it is zero in every draw, so every virtual token starts alike"


def _first_rows(config: Mapping[str, Any], question: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Law:
    """What the table of prompt tuning starts from."""
    rows, init = shapes[EMBEDDING][0], config["prompt_tuning_init"]
    if init == "SAMPLE_VOCAB":
        return sampled(question["words"])
    return words_of(question["words"], question["token_ids"], rows) if init == "TEXT" else normal(1.0)


def _of_tasks(config: Mapping[str, Any], question: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Law]:
    init = config["prompt_tuning_init"]
    drawn = {COLUMNS: normal(0.02), ROWS: normal(0.02)}
    if init not in FROM_SOURCE:
        return {EMBEDDING: _first_rows(config, question, shapes), **drawn}
    source = question["source"]
    shared = given(source[SAVED], "init-source-ignored: it must be the source's prompt_embeddings")
    if init == "ONLY_SOURCE_SHARED":
        return {EMBEDDING: shared, **drawn}
    if init == "EXACT_SOURCE_TASK":
        task = config["prompt_tuning_init_task"]
        name = f"init-source-task: it must be task {task} of the source's"
        return {EMBEDDING: shared, **{key: given(source[key][task : task + 1], name) for key in (COLUMNS, ROWS)}}
    name = "init-source-not-averaged: it must be the mean of the source's tasks"
    return {EMBEDDING: shared, **{key: given(np.mean(source[key], axis=0, keepdims=True), name) for key in (COLUMNS, ROWS)}}


def given(want: NDArray, name: str) -> Law:
    """These numbers in every draw, up to what a mean of a few may round."""

    def problem(draws: NDArray, dtype: str) -> str:
        drift = 8 * 2.0 ** -PRECISION[dtype] * np.max(np.abs(want))
        return "" if np.all(np.abs(draws - want) <= drift) else f"{name}, and is not"

    return Law("given by the source", problem)


def words_of(words: NDArray, ids: NDArray, rows: int) -> Law:
    """The words of a text, from its beginning, again and again until there are enough."""
    want = [int(ids[i % len(ids)]) for i in range(rows)]
    wrong = {
        "init-text-not-repeated: a text that is too short is repeated from its beginning, not filled up with its last word": [
            int(ids[min(i, len(ids) - 1)]) for i in range(rows)
        ],
        "init-text-words-repeated: a text that is too short is repeated as a whole, not word by word": [
            int(ids[i * len(ids) // rows]) for i in range(rows)
        ],
        "init-text-cut-in-front: of a text that is too long the first words are taken, not the last": [int(i) for i in ids[-rows:]],
        "init-text-as-positions: the words are taken by their place in the text, not by their token ids": [
            i % len(ids) for i in range(rows)
        ],
    }

    def problem(draws: NDArray, dtype: str) -> str:
        table = round_to(words, dtype)
        if np.all(draws == table[want]):
            return ""
        for name, taken in wrong.items():
            if len(taken) == rows and np.all(draws == table[taken]):
                return name
        if np.all(draws[:, : len(ids)] == table[want[: len(ids)]]):
            return "init-text-not-repeated: a text that is too short is repeated until there are enough rows"
        return "init-text: the rows are not the word embeddings of the text's tokens"

    return Law("the words of the text, cut or repeated", problem)


def named_words(words: NDArray, ids: list[int]) -> Law:
    """The words of a configuration's token ids."""

    def problem(draws: NDArray, dtype: str) -> str:
        table = round_to(words, dtype)
        if np.all(draws == table[ids]):
            return ""
        if np.all(draws == table[: len(ids)]):
            return "init-token-ids: the rows are the first words, not those of cpt_token_ids"
        return "init-token-ids: the rows are not the word embeddings of cpt_token_ids"

    return Law("the words of cpt_token_ids", problem)


def sampled(words: NDArray) -> Law:
    """Rows of `words`, each drawn from all of them."""

    def problem(draws: NDArray, dtype: str) -> str:
        table = round_to(words, dtype)
        hits = np.all(draws[:, :, None, :] == table, axis=-1)  # (draws, rows, vocabulary)
        if not np.all(np.any(hits, axis=-1)):
            return "init-no-word: a row is none of the word embeddings"
        drawn = np.argmax(hits, axis=-1)
        n, vocabulary, seen = drawn.size, len(words), len(np.unique(drawn))
        if math.comb(vocabulary, seen) * (seen / vocabulary) ** n < UNLIKELY:
            return f"init-words-unlike: {n} times a word was drawn, and only {seen} of {vocabulary} ever come"
        for word, count in enumerate(np.bincount(drawn.reshape(-1), minlength=vocabulary)):
            if _tail(int(count), n, 1 / vocabulary) < UNLIKELY / vocabulary:
                return f"init-words-unlike: word {word} came {count} times in {n}, expected about {n / vocabulary:.0f} of each"
        distinct = math.prod(1 - i / vocabulary for i in range(drawn.shape[1]))
        if distinct ** len(drawn) < UNLIKELY and all(len(set(row)) == len(row) for row in drawn.tolist()):
            return "init-words-once: no word comes twice in a draw: each row is drawn from all words, not from those that are left"
        return ""

    return Law("rows of words, all equally likely", problem)


def _tail(count: int, n: int, p: float) -> float:
    """How likely a binomial number is as far out as this, on its side."""
    side = range(count + 1) if count <= n * p else range(count, n + 1)
    return sum(math.exp(_log_binomial(n, k) + k * math.log(p) + (n - k) * math.log1p(-p)) for k in side)


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


# ---- what is asked

SIZES = {"num_virtual_tokens": 3, "token_dim": 4, "num_transformer_submodules": 1, "num_attention_heads": 2, "num_layers": 2}
TWO_SIDES = {**SIZES, "num_transformer_submodules": 2}
TEXT = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "say so", "tokenizer_name_or_path": "a-tokenizer"}
VOCABULARY = 9
SHORT, LONG = (5, 2), (7, 1, 5, 8, 2)
TASKS = 3
# label, configuration, what the question brings, the clause
Asked = tuple[str, Mapping[str, Any], tuple[str, ...], str]
_WORDS: tuple[Asked, ...] = (
    ("random", {}, (), "PROMPTTUNING-C13"),
    ("vocabulary", {"prompt_tuning_init": "SAMPLE_VOCAB"}, ("words",), "PROMPTTUNING-C14"),
    ("text-short", TEXT, ("words", "short"), "PROMPTTUNING-C15"),
    ("text-long", TEXT, ("words", "long"), "PROMPTTUNING-C15"),
)
ASKED: dict[str, tuple[Asked, ...]] = {
    "prompt_tuning": (*_WORDS, ("two-sides", {**TWO_SIDES, "prompt_tuning_init": "SAMPLE_VOCAB"}, ("words",), "PROMPTTUNING-C14")),
    "multitask_prompt_tuning": (
        *((label, {"num_tasks": 2, "num_ranks": 2, **config}, brings, "MULTITASKPROMPTTUNING-C11") for label, config, brings, _ in _WORDS),
        *(
            (
                f"source-{init.lower().replace('_', '-')}",
                {"num_ranks": 2, "prompt_tuning_init": init, "prompt_tuning_init_task": 1},
                ("source",),
                "MULTITASKPROMPTTUNING-C12",
            )
            for init in FROM_SOURCE
        ),
    ),
    "cartridge": (
        ("random", {}, (), "CARTRIDGE-C9"),
        ("nothing-frozen", {"num_frozen_tokens": 0}, (), "CARTRIDGE-C9"),
        ("two-sides", TWO_SIDES, (), "CARTRIDGE-C9"),
    ),
    "cpt": (("words", {"cpt_token_ids": [7, 2, 7], "cpt_tokens_type_mask": [1, 2, 4]}, ("words",), "CPT-C19"),),
    "prefix_tuning": (
        ("random", {}, (), "PREFIXTUNING-C16"),
        ("zero", {"init_weights": "zero"}, (), "PREFIXTUNING-C17"),
        ("projected", {"prefix_projection": True, "encoder_hidden_size": 3}, (), "PREFIXTUNING-C16"),
        ("projected-zero", {"prefix_projection": True, "encoder_hidden_size": 3, "init_weights": "zero"}, (), "PREFIXTUNING-C17"),
        ("two-sides", TWO_SIDES, (), "PREFIXTUNING-C16"),
    ),
    "p_tuning": (
        ("mlp", {"encoder_hidden_size": 3}, (), "PTUNING-C18"),
        ("lstm", {"encoder_hidden_size": 2, "encoder_reparameterization_type": "LSTM"}, (), "PTUNING-C18"),
    ),
}


def prompt_init_cases(name: str) -> Iterator[Case]:
    """The cases that ask a method of prompts for fresh ones."""
    for label, config, brings, clause in ASKED[name]:
        where = f"{name}.init-{label}"
        method = build_prompt(name, {**SIZES, **config})
        yield Case(
            id=f"{where}.init",
            method=name,
            operation="init",
            clause=clause,
            adapters=(CaseAdapter(config=config_of(method), tensors={}),),
            question={"draws": DRAWS, **_brought(generator(where), brings)},
        )


def _brought(rng: np.random.Generator, names: tuple[str, ...]) -> dict[str, Any]:
    rows, width = SIZES["num_virtual_tokens"], SIZES["token_dim"]
    question: dict[str, Any] = {}
    for name in names:
        if name == "words":
            question[name] = dyadic(rng, (VOCABULARY, width))
        elif name == "source":
            shapes = {SAVED: (rows, width), COLUMNS: (TASKS, rows, 2), ROWS: (TASKS, 2, width)}
            question[name] = {key: dyadic(rng, shape) for key, shape in shapes.items()}
        else:
            question["token_ids"] = np.asarray(SHORT if name == "short" else LONG)
    return question
