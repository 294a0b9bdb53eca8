"""PromptTuning: learn the embeddings of virtual tokens that come before the input's own.

    prompt = E        x' = [E; x]

    E (rows, token_dim)    x (tokens, token_dim), the embeddings of the input

For a gradient G of the prompt (batch, rows, token_dim):   dE = sum of G over the batch.

Paper   Lester et al. 2021, arXiv:2104.08691
HF      peft.PromptTuningConfig. prompt_tuning_init: RANDOM is standard normal; SAMPLE_VOCAB takes rows of the word embeddings, any as
        likely as any other; TEXT takes those of a text's tokens, cut or repeated to the length that is needed. A saved adapter starts
        from its file whatever the init says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np

from peft_ref.arrays import Array, namespace, to
from peft_ref.errors import ConfigError
from peft_ref.prompts import EMBEDDING, NO_SOURCES, Context, Sources, TablePrompt, Tensors
from peft_ref.ranges import one_of

INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


@final
@dataclass(frozen=True, kw_only=True)
class PromptTuning(TablePrompt):
    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, object] | None = None

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    tuner_prefix: ClassVar[str] = "prompt_tuning_"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inference_mode:  # a newer PEFT's start does not matter once it is saved
            one_of(self, "prompt_tuning_init", *INITS)
        check_text(self.prompt_tuning_init, self.prompt_tuning_init_text, self.tokenizer_name_or_path, self.tokenizer_kwargs)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {EMBEDDING: self.table_shape}

    def init(self, like: Array, rng: np.random.Generator, sources: Sources = NO_SOURCES) -> Tensors:
        init = "RANDOM" if self.inference_mode else self.prompt_tuning_init
        return {EMBEDDING: initial_rows(init, self.prompt_tuning_init_text, self.table_shape, like, rng, sources)}

    def table(self, p: Tensors, ctx: Context) -> Array:
        return p[EMBEDDING]

    def table_vjp(self, p: Tensors, ctx: Context, d: Array) -> Tensors:
        return {EMBEDDING: d}


def check_text(init: str, text: str | None, tokenizer: str | None, kwargs: dict[str, object] | None) -> None:
    """Raise `ConfigError` where the text of a start, or what tokenizes it, is missing or out of place."""
    if init == "TEXT" and (not tokenizer or text is None):
        raise ConfigError(
            f"prompt_tuning_init='TEXT' with tokenizer_name_or_path={tokenizer!r} and prompt_tuning_init_text={text!r}:"
            " both are needed (HF PEFT refuses it too)."
        )
    if kwargs and init != "TEXT":
        raise ConfigError(f"tokenizer_kwargs with prompt_tuning_init={init!r}: only 'TEXT' has a tokenizer (HF PEFT refuses it too).")


def initial_rows(init: str, text: str | None, shape: tuple[int, int], like: Array, rng: np.random.Generator, sources: Sources) -> Array:
    """The first rows of a prompt, in `like`'s library and dtype."""
    if init == "RANDOM":
        return to(rng.normal(size=shape), like)
    if sources.words is None:
        raise ConfigError(f"prompt_tuning_init={init!r} needs the model's word embeddings.\n  Pass Sources(words=...).")
    words = sources.words
    ids = np.resize(_tokens(text, sources), shape[0]) if init == "TEXT" else rng.integers(0, words.shape[0], shape[0])
    xp = namespace(words)
    picked = xp.concat([words[int(i) : int(i) + 1, :] for i in ids])
    return xp.astype(picked, like.dtype)


def _tokens(text: str | None, sources: Sources) -> np.ndarray[Any, np.dtype[np.int64]]:
    if sources.tokenize is None:
        raise ConfigError("prompt_tuning_init='TEXT' needs a tokenizer.\n  Pass Sources(words=..., tokenize=lambda text: ids).")
    assert text is not None  # refused when the method was made
    ids = np.asarray(list(sources.tokenize(text)))
    if not ids.size:
        raise ConfigError(f"prompt_tuning_init_text={text!r} has no tokens.\n  Give another text.")
    return ids
