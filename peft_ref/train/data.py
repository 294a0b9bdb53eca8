"""What a language model is trained on: one long row of tokens, cut into windows where a generator says."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from peft_ref.arrays import Array, device, namespace
from peft_ref.errors import ConfigError, FileFormatError
from peft_ref.nn import Inputs
from peft_ref.prompts import Context
from peft_ref.train.learner import Batch

Tokens: TypeAlias = np.ndarray[Any, Any]


def read_tokens(path: str | os.PathLike[str], *, ids: bool = False) -> Tokens:
    """The bytes of a file, each a token; or with `ids` the token ids that it spells, apart by spaces, commas or line ends."""
    data = Path(path).read_bytes()
    if not ids:
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64)
    words = [word for word in re.split(rb"[\s,]+", data) if word]
    if wrong := next((word for word in words if not re.fullmatch(rb"[0-9]{1,18}", word)), None):
        raise FileFormatError(f"{path}: {wrong[:40]!r} is no token id.\n  Without --ids the file's bytes are the tokens.")
    return np.asarray([int(word) for word in words], dtype=np.int64)


def check_tokens(tokens: Tokens, length: int, vocabulary: int) -> None:
    if length < 2 or len(tokens) < length:
        raise ConfigError(f"{len(tokens)} tokens and windows of {length}: a window needs at least 2, and the data one window.")
    if (largest := int(tokens.max())) >= vocabulary:
        raise ConfigError(
            f"the data has the token {largest}, and the model's vocabulary {vocabulary} tokens.\n  It is another tokenizer's."
        )


def windows(tokens: Tokens, length: int, count: int, rng: np.random.Generator, like: Array) -> Batch:
    """`count` windows from anywhere, as a batch in `like`'s library; every token but the first is to be predicted. All are of task 0."""
    starts = rng.integers(0, len(tokens) - length + 1, count)
    drawn = np.stack([tokens[start : start + length] for start in starts])
    xp = namespace(like)
    held, tasks = (a if xp is np else xp.asarray(a, device=device(like)) for a in (drawn, np.zeros(count, dtype=np.int64)))
    return Batch(inputs=Inputs(input_ids=held, labels=held), context=Context(batch=count, task_ids=tasks))
