"""What the methods of prompts refuse, and that the error says what is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from peft_ref.errors import ConfigError, KeyMismatchError, PeftRefError, ShapeError
from peft_ref.methods import CPT, Cartridge, MultitaskPromptTuning, PromptTuning
from peft_ref.methods.cartridge import rows_of_cache
from peft_ref.prompts import Context, Sources
from peft_ref.splice import TASKS, Inputs, splice, splice_vjp
from tests.laws.prompt_strategies import IN_CACHE, MANY, PROMPTS, Case, awkward

EVERY = pytest.mark.parametrize("name", PROMPTS)


@EVERY
@pytest.mark.parametrize("size", ["num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_layers"])
def test_a_size_that_is_missing_is_asked_for_by_name(name: str, size: str) -> None:
    (case, *_) = awkward(name)
    unsized = replace(case.method, **{size: None})
    cached, counted = case.method.place == "cache", isinstance(case.method, CPT) and size.startswith("num_")
    if counted or size == ("num_transformer_submodules" if cached else "num_layers"):
        assert unsized.shapes() == case.method.shapes()  # it does not depend on it
        return
    with pytest.raises(ConfigError, match=rf"{size} is not given"):
        unsized.shapes()


@EVERY
@pytest.mark.parametrize("size", ["num_virtual_tokens", "token_dim", "num_attention_heads"])
def test_a_size_is_positive(name: str, size: str) -> None:
    none = {"cpt_token_ids": []} if name == "cpt" and size == "num_virtual_tokens" else {size: 0}
    with pytest.raises(ConfigError, match=f"{size}=0|num_frozen_tokens=1 with {size}=0"):
        replace(awkward(name)[0].method, **none)


@EVERY
def test_tensors_that_are_missing_unknown_or_of_another_shape_are_named(name: str) -> None:
    for case in awkward(name):
        p = case.tensors()
        for key, value in p.items():
            with pytest.raises(KeyMismatchError, match=rf"{key} missing"):
                case.method.check({k: v for k, v in p.items() if k != key})
            with pytest.raises(ShapeError, match=rf"{key} is \({value.shape[0] + 1},"):
                case.method.check({**p, key: np.concatenate([value, value[:1]])})
        with pytest.raises(KeyMismatchError, match=r"unexpected stray"):
            case.method.check({**p, "stray": np.zeros(1)})
        with pytest.raises(KeyMismatchError, match=r"missing"):
            case.method.loaded({})


@EVERY
@pytest.mark.parametrize("task", ["", "causal_lm", "IMAGE_CLASSIFICATION"])
def test_a_task_without_a_rule_is_refused(name: str, task: str) -> None:
    (case, *_) = awkward(name)
    for call in (splice, lambda *args: splice_vjp(*args, Inputs(case.inputs("SEQ_CLS").embeddings))):
        with pytest.raises(ConfigError, match=", ".join(TASKS)):
            call(case.method, case.numbers(8, case.prompt_shape), case.inputs("SEQ_CLS"), task)  # type: ignore[operator]


@EVERY
def test_a_prompt_of_another_shape_is_refused(name: str) -> None:
    (case, *_) = awkward(name)
    batch, rows, columns = case.prompt_shape
    for shape in ((batch + 1, rows, columns), (batch, rows + 1, columns), (batch, rows, columns + 1)):
        with pytest.raises(ShapeError, match=rf"the prompt is \({shape[0]}, {shape[1]}, {shape[2]}\)"):
            splice(case.method, np.zeros(shape), case.inputs("CAUSAL_LM"), "CAUSAL_LM")


@pytest.mark.parametrize("name", [name for name in PROMPTS if name not in IN_CACHE])
def test_embeddings_of_another_width_are_refused(name: str) -> None:
    (case, *_) = awkward(name)
    wide = Inputs(np.zeros((case.batch, 2, case.method.size("token_dim") + 1)))
    with pytest.raises(ShapeError, match="hidden size"):
        splice(case.method, np.zeros(case.prompt_shape), wide, "CAUSAL_LM")


@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        (None, ConfigError, "task_ids are missing"),
        ([0], ShapeError, r"task_ids are \(1,\), expected one for every example, \(2,\)"),
        ([0, 1, 2], ShapeError, r"\(3,\)"),
        ([[0, 1]], ShapeError, r"\(1, 2\)"),
        ([0, 3], ConfigError, "tasks 0 to 2"),
        ([-1, 0], ConfigError, "tasks 0 to 2"),
    ],
)
def test_task_ids_that_name_no_task_of_each_example_are_refused(ids: Any, error: type[PeftRefError], text: str) -> None:
    p = Case(MANY, 2, 0).tensors()
    ctx = Context(2, None if ids is None else np.asarray(ids))
    for call in (lambda: MANY.prompt(p, ctx), lambda: MANY.prompt_vjp(p, ctx, np.zeros((2, 2, 3)))):
        with pytest.raises(error, match=text):
            call()


SIZES: dict[str, Any] = {"num_virtual_tokens": 4, "token_dim": 3, "num_transformer_submodules": 1}
WORDS = np.arange(15.0).reshape(5, 3)


@pytest.mark.parametrize("cls", [PromptTuning, MultitaskPromptTuning])
@pytest.mark.parametrize(
    ("start", "sources", "text"),
    [
        ({"prompt_tuning_init": "SAMPLE_VOCAB"}, Sources(), r"Sources\(words="),
        ({"prompt_tuning_init": "TEXT"}, Sources(WORDS), "tokenize="),
        ({"prompt_tuning_init": "TEXT"}, Sources(WORDS, lambda text: []), "has no tokens"),
    ],
)
def test_a_start_says_what_it_is_made_of(cls: Any, start: dict[str, Any], sources: Sources, text: str) -> None:
    told = {"prompt_tuning_init_text": "words", "tokenizer_name_or_path": "any"} if start["prompt_tuning_init"] == "TEXT" else {}
    with pytest.raises(ConfigError, match=text):
        cls(**SIZES, **start, **told).init(np.zeros(()), np.random.default_rng(0), sources)


@pytest.mark.parametrize("cls", [PromptTuning, MultitaskPromptTuning])
@pytest.mark.parametrize(
    "start",
    [
        {"prompt_tuning_init": "random"},
        {"prompt_tuning_init": "TEXT"},
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "words"},
        {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "any"},
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "words", "tokenizer_name_or_path": ""},
        {"tokenizer_kwargs": {"use_fast": True}},
    ],
)
def test_a_start_that_cannot_be_is_refused_when_the_method_is_built(cls: Any, start: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"prompt_tuning_init='"):
        cls(**SIZES, **start)


@pytest.mark.parametrize("cls", [PromptTuning, MultitaskPromptTuning])
def test_a_start_of_words_moves_no_word_and_a_saved_adapter_needs_none(cls: Any) -> None:
    method = cls(**SIZES, prompt_tuning_init="SAMPLE_VOCAB")
    rows = method.init(np.zeros(()), np.random.default_rng(0), Sources(WORDS))["embedding.weight"]
    assert not np.shares_memory(rows, WORDS)
    assert all((row == WORDS).all(axis=1).any() for row in rows)
    assert replace(method, inference_mode=True).init(np.zeros(()), np.random.default_rng(0)).keys() == method.shapes().keys()


RESTING = Cartridge(num_virtual_tokens=2, token_dim=4, num_layers=2)
TYPED = CPT(cpt_token_ids=[1, 4], cpt_tokens_type_mask=[1, 4], token_dim=3)


@pytest.mark.parametrize(
    ("made", "error", "text"),
    [
        (lambda: CPT(cpt_token_ids=[1, 2], cpt_mask=[1]), ConfigError, "cpt_mask has 1 entries for 2 tokens"),
        (lambda: CPT(cpt_token_ids=[1], cpt_tokens_type_mask=[1, 2]), ConfigError, "cpt_tokens_type_mask has 2 entries for 1 tokens"),
        (lambda: CPT(cpt_token_ids=[-1]), ConfigError, "of tokens none below 0"),
        (lambda: CPT(opt_weighted_loss_type="linear"), ConfigError, "There are 'none', 'decay'"),
        (lambda: TYPED.init(np.zeros(()), np.random.default_rng(0)), ConfigError, r"Sources\(words="),
        (lambda: TYPED.init(np.zeros(()), np.random.default_rng(0), Sources(WORDS[:4])), ConfigError, "the token 4, and the model has 4"),
        (lambda: TYPED.counted(np.ones((2, 3), int), np.ones((2, 4), int), np.ones(1)), ShapeError, r"input_type_mask is \(2, 4\)"),
        (
            lambda: splice(TYPED, np.zeros((1, 2, 3)), Inputs(np.zeros((1, 2, 3))), "SEQ_CLS"),
            ConfigError,
            "task_type='SEQ_CLS': it is for CAUSAL_LM alone",
        ),
        (
            lambda: splice(
                PromptTuning(**{**SIZES, "num_virtual_tokens": 2}),
                np.zeros((1, 2, 3)),
                Inputs(np.zeros((1, 2, 3)), input_type_mask=np.ones((1, 2), int)),
                "CAUSAL_LM",
            ),
            ConfigError,
            "PromptTuning: input_type_mask is given",
        ),
        (lambda: Cartridge(num_frozen_tokens=-1), ConfigError, "num_frozen_tokens=-1: 0 or more"),
        (lambda: Cartridge(num_virtual_tokens=2, num_frozen_tokens=3), ConfigError, "no more can be frozen"),
        (lambda: RESTING.split(np.zeros((3, 16))), ShapeError, r"the table is \(3, 16\), expected \(2, 16\)"),
        (
            lambda: rows_of_cache(np.zeros((2, 2, 1, 2, 3, 4)), 5),
            ShapeError,
            "1 sequences of 3 tokens, expected one sequence of at least 5",
        ),
    ],
)
def test_cpt_and_cartridge_say_what_does_not_fit(made: Any, error: type[PeftRefError], text: str) -> None:
    with pytest.raises(error, match=text):
        made()
