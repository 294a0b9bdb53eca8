"""What a multitask prompt starts from, a text or another adapter's file: what is asked of it, and what an error says of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_ref.errors import ConfigError, KeyMismatchError, ShapeError
from peft_ref.methods import MultitaskPromptTuning, PromptTuning
from peft_ref.methods.multitask_prompt_tuning import FROM_SOURCE
from peft_ref.prompts import EMBEDDING, SAVED, Sources

SIZES: dict[str, Any] = {"num_virtual_tokens": 4, "token_dim": 3, "num_transformer_submodules": 1}
RNG = np.random.default_rng
U, V = "prefix_task_cols", "prefix_task_rows"
FILE = {SAVED: RNG(0).normal(size=(4, 3)), U: RNG(1).normal(size=(5, 4, 2)), V: RNG(2).normal(size=(5, 2, 3))}


def started(init: str, tensors: Any, like: Any = None, **more: Any) -> Any:
    method = MultitaskPromptTuning(**SIZES, num_ranks=2, prompt_tuning_init=init, **more)
    return method.init(np.zeros(()) if like is None else like, RNG(3), Sources(tensors=tensors))


@pytest.mark.parametrize("cls", [PromptTuning, MultitaskPromptTuning])
def test_the_tokenizer_gets_the_text_of_the_configuration(cls: Any) -> None:
    heard: list[str] = []
    words = RNG(0).normal(size=(6, 3))
    method = cls(**SIZES, prompt_tuning_init="TEXT", prompt_tuning_init_text="good words", tokenizer_name_or_path="any")
    rows = method.init(np.zeros(()), RNG(0), Sources(words, lambda text: heard.append(text) or [5, 2]))[EMBEDDING]
    assert heard == ["good words"]
    assert np.array_equal(rows, words[[5, 2, 5, 2]])


@pytest.mark.parametrize("init", FROM_SOURCE)
def test_a_source_without_what_is_needed_is_named_by_what_it_has(init: str) -> None:
    need = [SAVED] if init == "ONLY_SOURCE_SHARED" else [SAVED, U, V]
    for tensors, came in ((None, "nothing"), ({V: FILE[V], U: FILE[U]}, rf"{U}, {V}"), ({U: FILE[U], "b": 1, "a": 2}, rf"a, b, {U}")):
        with pytest.raises(KeyMismatchError, match=rf"another adapter's file, which has {came}\.\n.* with {', '.join(need)}\.$"):
            started(init, tensors)


@pytest.mark.parametrize("init", FROM_SOURCE)
def test_a_source_of_other_sizes_is_refused_by_the_start_that_wanted_it(init: str) -> None:
    with pytest.raises(ShapeError, match=rf"at 'prompt_tuning_init={init}'"):
        started(init, {**FILE, SAVED: FILE[SAVED][1:]})


@pytest.mark.parametrize("init", FROM_SOURCE)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_taken_comes_in_the_dtype_that_is_asked_for(init: str, dtype: str) -> None:
    assert {str(value.dtype) for value in started(init, FILE, np.zeros((), dtype=dtype)).values()} == {dtype}


@pytest.mark.parametrize("task", range(-5, 5))
def test_a_task_is_counted_from_either_end_and_there_is_none_beyond(task: int) -> None:
    p = started("EXACT_SOURCE_TASK", FILE, prompt_tuning_init_task=task)
    assert all(np.array_equal(p[name], FILE[name][[task]]) for name in (U, V))
    for beyond in (-6, 5, None):
        with pytest.raises(ConfigError, match=rf"prompt_tuning_init_task={beyond}: the source adapter has tasks 0 to 4"):
            started("EXACT_SOURCE_TASK", FILE, prompt_tuning_init_task=beyond)
