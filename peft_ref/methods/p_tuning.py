"""PTuning: prompt tuning whose embeddings come out of a small network while they are trained.

    MLP     prompt = (relu(relu(E W0^T + b0) W2^T + b2)) W4^T + b4
    LSTM    prompt = relu(L W0^T + b0) W2^T + b2,    L = the two directions of an LSTM over the rows of E, side by side

    E (rows, token_dim)    MLP: W0 (hidden, token_dim)  W2 (hidden, hidden)  W4 (token_dim, hidden)
                           LSTM: W0 (2 hidden, 2 hidden)  W2 (token_dim, 2 hidden);  its own tensors and gradient in `lstm.py`

For a gradient G of a dense layer's output, dense.py; through relu passes what came in where its output is positive.

Paper   Liu et al. 2021, arXiv:2103.10385
HF      peft.PromptEncoderConfig. encoder_num_layers counts the LSTM's layers; an MLP always has these three. Dropout lies between the
        LSTM's layers. What is saved is the prompt, so the network is lost and a loaded adapter cannot be trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from peft_ref.activations import relu, relu_vjp
from peft_ref.arrays import Array, namespace, to
from peft_ref.methods.dense import dense, dense_vjp, initial_dense
from peft_ref.methods.lstm import initial_lstm, lstm, lstm_shapes, lstm_vjp
from peft_ref.prompts import EMBEDDING, NO_SOURCES, Context, Sources, TablePrompt, Tensors
from peft_ref.ranges import one_of, positive, share

ENCODERS = ("MLP", "LSTM")
HEAD = "mlp_head"


@final
@dataclass(frozen=True, kw_only=True)
class PTuning(TablePrompt):
    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    peft_type: ClassVar[str] = "P_TUNING"
    tuner_prefix: ClassVar[str] = "p_tuning_"
    as_wide: ClassVar[tuple[str, ...]] = ("encoder_hidden_size",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inference_mode:  # a saved prompt has no encoder
            one_of(self, "encoder_reparameterization_type", *ENCODERS)
        positive(self, "encoder_hidden_size")
        if self.is_lstm:
            positive(self, "encoder_num_layers")
        share(self, "encoder_dropout")  # an LSTM may drop everything

    @property
    def is_lstm(self) -> bool:
        return self.encoder_reparameterization_type == "LSTM"

    @property
    def dense_layers(self) -> tuple[str, ...]:
        return tuple(f"{HEAD}.{n}" for n in ((0, 2) if self.is_lstm else (0, 2, 4)))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        rows, dim = self.table_shape
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (rows, dim)}
        if self.inference_mode:
            return shapes
        hidden = self.size("encoder_hidden_size")
        sizes = (2 * hidden, 2 * hidden, dim) if self.is_lstm else (dim, hidden, hidden, dim)
        for name, n_in, out in zip(self.dense_layers, sizes[:-1], sizes[1:], strict=True):
            shapes |= {f"{name}.weight": (out, n_in), f"{name}.bias": (out,)}
        return shapes | (lstm_shapes(dim, hidden, self.encoder_num_layers) if self.is_lstm else {})

    def init(self, like: Array, rng: np.random.Generator, sources: Sources = NO_SOURCES) -> Tensors:
        shapes = self.shapes()
        start: dict[str, Array] = {EMBEDDING: to(rng.normal(size=shapes[EMBEDDING]), like)}
        if self.inference_mode:
            return start
        if self.is_lstm:
            start |= initial_lstm(shapes, self.size("encoder_hidden_size"), like, rng)
        for name in self.dense_layers:
            start |= initial_dense(name, shapes, like, rng)
        return start

    def table(self, p: Tensors, ctx: Context) -> Array:
        if self.inference_mode:
            return p[EMBEDDING]
        return dense(self.dense_layers[-1], p, self._entering(p, ctx)[-1])

    def table_vjp(self, p: Tensors, ctx: Context, d: Array) -> Tensors:
        if self.inference_mode:
            return {EMBEDDING: d}
        grads: dict[str, Array] = {}
        entering = self._entering(p, ctx)
        for k in reversed(range(len(entering))):
            d, own = dense_vjp(self.dense_layers[k], p, entering[k], d)
            d = relu_vjp(entering[k], d) if k else d
            grads |= own
        if self.is_lstm:
            d, own = lstm_vjp(p, p[EMBEDDING], self.encoder_num_layers, self._masks(ctx, p[EMBEDDING]), d)
            grads |= own
        return {EMBEDDING: d, **grads}

    def _entering(self, p: Tensors, ctx: Context) -> list[Array]:
        """What enters each dense layer."""
        x = lstm(p, p[EMBEDDING], self.encoder_num_layers, self._masks(ctx, p[EMBEDDING])) if self.is_lstm else p[EMBEDDING]
        entering = [x]
        for name in self.dense_layers[:-1]:
            x = relu(dense(name, p, x))
            entering.append(x)
        return entering

    def _masks(self, ctx: Context, like: Array) -> tuple[Array, ...]:
        """The factors of what passes between the LSTM's layers."""
        return tuple(namespace(mask).astype(mask, like.dtype) / (1 - self.encoder_dropout) for mask in ctx.dropout)
