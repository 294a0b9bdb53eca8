"""A prompt that starts from a text: the text is what the tokenizer is asked, and its rows come again until the prompt is full."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_ref.methods import MultitaskPromptTuning, PromptTuning
from peft_ref.prompts import Sources

WORDS = np.arange(90.0).reshape(30, 3)


@pytest.mark.parametrize("cls", [PromptTuning, MultitaskPromptTuning])
@pytest.mark.parametrize(("text", "rows"), [("dab", [4, 1, 2, 4, 1]), ("hgfedcba", [8, 7, 6, 5, 4]), (" ", [0] * 5)])
@pytest.mark.parametrize("kwargs", [None, {}, {"use_fast": False}])
def test_a_text_starts_with_the_rows_of_its_tokens_cut_or_repeated(cls: Any, text: str, rows: list[int], kwargs: Any) -> None:
    method = cls(
        num_virtual_tokens=5,
        token_dim=3,
        num_transformer_submodules=1,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=text,
        tokenizer_name_or_path="any",
        tokenizer_kwargs=kwargs,
    )
    sources = Sources(WORDS, lambda said: [" abcdefgh".index(letter) for letter in said])
    got = method.init(np.zeros(()), np.random.default_rng(0), sources)["embedding.weight"]
    np.testing.assert_array_equal(got, WORDS[rows])
    assert method.init(np.zeros((), np.float32), np.random.default_rng(0), sources)["embedding.weight"].dtype == np.float32
