"""Dropout masks drawn by a NumPy generator, for a batch of a model whose modules all see (batch, T, in).

HF      draws anew at every forward: lora_dropout, or what a method calls it, on what enters an adapter; encoder_dropout between the
        layers of P-tuning's LSTM
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from peft_ref.arrays import Array, to
from peft_ref.methods.p_tuning import PTuning
from peft_ref.prompts import Context
from peft_ref.stack import Dropout
from peft_ref.train.learner import Batch, Learner, context_of


def with_dropout(learner: Learner, batch: Batch, rng: np.random.Generator, like: Array) -> Batch:
    """`batch` with fresh masks in `like`'s library, where the methods ask for dropout."""
    ids = batch.inputs.input_ids
    masks: dict[str, Dropout] = {}
    for name, method in learner.methods.items():
        p, layer = 0.0 if method.dropout is None else float(getattr(method, method.dropout)), learner.net.layers[name]
        if p > 0 and layer.kind != "embedding" and ids is not None:
            masks[name] = Dropout(_drawn(rng, (*ids.shape, layer.fan_in), p, like), p)
    return replace(batch, dropout=masks, context=_of_encoder(learner, batch, rng, like))


def _of_encoder(learner: Learner, batch: Batch, rng: np.random.Generator, like: Array) -> Context | None:
    method = learner.prompt
    if not isinstance(method, PTuning) or not method.is_lstm or not method.encoder_dropout or method.inference_mode:
        return batch.context
    shape = (method.table_shape[0], 2 * method.size("encoder_hidden_size"))
    drawn = tuple(_drawn(rng, shape, method.encoder_dropout, like) for _ in range(method.encoder_num_layers - 1))
    return context_of(batch)._replace(dropout=drawn)


def _drawn(rng: np.random.Generator, shape: tuple[int, ...], p: float, like: Array) -> Any:
    return to(rng.random(shape) >= p, like)
