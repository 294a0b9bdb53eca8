"""CPT: put the examples of a task before the input as words, and move each word a little, by no more than a radius of its kind.

    prompt = E + P(D)        P(D)_t = D_t min(1, e_t / |D_t|)

    E (tokens, dim), the embeddings of the words `cpt_token_ids`, constant        D (tokens, dim), trained, zero at first

A token's type m says what it is; m mod 4 is 1 for a template before an input, 2 for an input, 3 for a template before an answer, 0 for an
answer, m // 4 the example it is of. With f = opt_projection_format_epsilon and i = opt_projection_epsilon

    e_t = f sqrt(dim / 2048)   for m_t mod 4 = 1, 3        i sqrt(dim / 2048)   for 2        1e-10   for answers, and wherever m_t <= 0

For a gradient G of the prompt:   dE = 0    dD_t = G_t, and 0 for m_t mod 4 = 0.   Before every use D is replaced by P(D), so this is the
gradient at the point P(D), where D itself is what is added; P is not differentiated through.

The loss is the next-token loss of the answers alone, the prompt's and the input's: `counted`.

Paper   Blau et al. 2024, arXiv:2410.17222
HF      peft.CPTConfig. PEFT writes P(D) into the parameter whenever the prompt is made, in evaluation and for saving too: here `projected`
        returns it. cpt_mask is never read but for its length. Sizes come from the model and num_virtual_tokens from cpt_token_ids,
        whatever a configuration says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import ClassVar, final

import numpy as np

from peft_ref.arrays import Array, column, namespace, row_norm, to, zeros_like
from peft_ref.errors import ConfigError, ShapeError
from peft_ref.prompts import EMBEDDING, IGNORED, NO_SOURCES, Context, Counted, Sources, Tensors, TypedPrompt
from peft_ref.ranges import one_of

DELTA = "delta_embedding.weight"
LOSSES = ("none", "decay")
STILL = 1e-10  # the radius of what is not to move
REFERENCE_DIM = 2048
KINDS, ANSWER = 4, 0


@final
@dataclass(frozen=True, kw_only=True)
class CPT(TypedPrompt):
    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: str = "none"
    opt_loss_decay_factor: float = 1.0
    opt_projection_epsilon: float = 0.1
    opt_projection_format_epsilon: float = 0.1
    tokenizer_name_or_path: str | None = None

    peft_type: ClassVar[str] = "CPT"
    tuner_prefix: ClassVar[str] = "cpt_"
    only_task: ClassVar[str | None] = "CAUSAL_LM"
    own_sizes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        derived = {"cpt_token_ids": ids, "num_virtual_tokens": len(ids), "num_transformer_submodules": 1}
        derived |= {name: [1] * len(ids) for name in ("cpt_mask", "cpt_tokens_type_mask") if getattr(self, name) is None}
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        super().__post_init__()
        for name in ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"):
            values = getattr(self, name)
            if len(values) != len(ids):
                raise ConfigError(f"{name} has {len(values)} entries for {len(ids)} tokens (HF PEFT refuses it too).")
            if not all(isinstance(v, int) and not isinstance(v, bool) and (v >= 0 or name != "cpt_token_ids") for v in values):
                raise ConfigError(f"{name}={values!r:.60}: whole numbers are needed, and of tokens none below 0.")
        one_of(self, "opt_weighted_loss_type", *LOSSES)

    @property
    def types(self) -> list[int]:
        return self.cpt_tokens_type_mask or []

    @property
    def held(self) -> frozenset[str]:
        return frozenset({EMBEDDING})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        trained = {} if self.inference_mode else {DELTA: self.table_shape}
        return {EMBEDDING: self.table_shape, **trained}

    def init(self, like: Array, rng: np.random.Generator, sources: Sources = NO_SOURCES) -> Tensors:
        if self.inference_mode:
            return {EMBEDDING: to(rng.normal(size=self.table_shape), like)}
        ids, words = self.cpt_token_ids or [], sources.words
        if words is None:
            raise ConfigError("CPT starts from the model's word embeddings.\n  Pass Sources(words=...).")
        if max(ids) >= words.shape[0]:
            raise ConfigError(f"cpt_token_ids has the token {max(ids)}, and the model has {words.shape[0]} words.")
        xp = namespace(words)
        rows = xp.concat([words[i : i + 1, :] for i in ids])
        return {EMBEDDING: xp.astype(rows, like.dtype), DELTA: zeros_like(self.table_shape, like)}

    # ---- the prompt

    def radii(self) -> list[float]:
        """e, one for every token."""
        scale = math.sqrt(self.size("token_dim") / REFERENCE_DIM)
        of_kind = {2: self.opt_projection_epsilon * scale, **dict.fromkeys((1, 3), self.opt_projection_format_epsilon * scale)}
        return [of_kind.get(m % KINDS, STILL) if m > 0 else STILL for m in self.types]

    def projected(self, p: Tensors) -> Tensors:
        """The tensors with P(D) for D: what PEFT leaves in its parameters once it has made a prompt of them."""
        if self.inference_mode:
            return p
        D = p[DELTA]
        xp, e, norm = namespace(D), to(np.asarray(self.radii()), D), row_norm(D)
        outside = (norm > e) & (norm > 0)
        one = zeros_like(tuple(norm.shape), D) + 1
        return {**p, DELTA: D * column(xp.where(outside, e / xp.where(outside, norm, one), one))}

    def table(self, p: Tensors, ctx: Context) -> Array:
        return p[EMBEDDING] if self.inference_mode else p[EMBEDDING] + self.projected(p)[DELTA]

    def table_vjp(self, p: Tensors, ctx: Context, d: Array) -> Tensors:
        if self.inference_mode:
            return {EMBEDDING: d}
        return {EMBEDDING: zeros_like(self.table_shape, d), DELTA: d * column(self._moves(d))}

    def differentiated(self, p: Tensors, ctx: Context) -> Callable[[Tensors], Array]:
        """E and P(D) of `p`, and from there on what is added, of the tokens that move."""
        if self.inference_mode:
            return lambda q: self.prompt(q, ctx)
        start = self.prompt(p, ctx)
        return lambda q: start + (q[DELTA] - p[DELTA]) * column(self._moves(q[DELTA]))

    def _moves(self, like: Array) -> Array:
        """1 for a token whose D has a gradient, 0 for an answer."""
        return to(np.asarray([float(m % KINDS != ANSWER) for m in self.types]), like)

    # ---- the loss

    def counted(self, labels: Array, types: Array | None, like: Array) -> Counted:
        """The labels of answers, and their weights: decay^k over the number of labels in the batch.

        Types of the input (batch, tokens) go on from the prompt's: above 0 they are raised by the prompt's largest; without any, all are
        4. An example's last answer, the one of the largest type, has k = 0, the one before it 1, and so on. A token's label is judged one
        place before it, so the first token has none. Where no label counts the mean is 0/0: the weights are NaN.
        """
        if types is not None and tuple(types.shape) != tuple(labels.shape):
            raise ShapeError(f"CPT: input_type_mask is {tuple(types.shape)}, expected a type for every label, {tuple(labels.shape)}.")
        xp, batch = namespace(labels), labels.shape[0]
        own, words = (
            xp.broadcast_to(xp.expand_dims(to(np.asarray(values), labels), axis=0), (batch, len(values)))
            for values in (self.types, self.cpt_token_ids or [])
        )
        given = zeros_like(tuple(labels.shape), labels) + KINDS if types is None else xp.astype(types, labels.dtype)
        m = xp.concat([own, xp.where(given > 0, given + max(self.types), given)], axis=1)
        answers, ignored = (m > 0) & (m % KINDS == ANSWER), zeros_like(tuple(m.shape), labels) + IGNORED
        labels = xp.where(answers, xp.concat([words, labels], axis=1), ignored)
        first = zeros_like((batch, 1), like)
        weights = self._weights(m[:, 1:], answers[:, 1:], labels[:, 1:] != IGNORED, like)
        return Counted(labels, xp.concat([first, weights], axis=1))

    def _weights(self, m: Array, answers: Array, judged: Array, like: Array) -> Array:
        xp, (batch, length) = namespace(like), m.shape
        counts = xp.astype(judged, like.dtype)
        n = xp.sum(counts)
        shares = counts / xp.where(n > 0, n, n + math.nan)
        if self.opt_weighted_loss_type == "decay":
            # Of every type the first token stands for all; k is how many of them are of a larger type.
            before = to(np.tri(length, k=-1), m) > 0
            known = xp.any((xp.expand_dims(m, axis=2) == xp.expand_dims(m, axis=1)) & before, axis=2)
            later = (xp.expand_dims(m, axis=1) > xp.expand_dims(m, axis=2)) & xp.expand_dims(answers & ~known, axis=1)
            k = xp.sum(xp.astype(later, m.dtype), axis=2)
            decay = [float(self.opt_loss_decay_factor)] * length
            powers = to(np.asarray([*accumulate(decay, mul, initial=1.0)]), like)  # a product may be infinite, a power of Python's not
            shares = shares * xp.reshape(xp.take(powers, xp.reshape(k, (batch * length,))), (batch, length))
        return shares
