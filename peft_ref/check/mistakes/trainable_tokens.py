"""Trainable tokens: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check import shared_mistakes as shared
from peft_ref.check.asked import Config, Draw, Files, Fresh, Start
from peft_ref.check.case import Answer, Case
from peft_ref.check.distributions import Law, normal
from peft_ref.check.mistake import Formula, Mistake, Replay, Suite, one_by_one, only, stored
from peft_ref.check.oracle import answer, pose
from peft_ref.check.tolerance import PRECISION
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Embedding, Layer
from peft_ref.stack import Adapter

FOUR = {"token_indices": [5, 0, 3, 1]}
TWO = {"token_indices": [2, 6]}

Rows = Callable[[Array, Array, tuple[int, ...]], Array]  # the stored rows after, given those before, D and the tokens


def with_rows(change: Rows) -> Formula:
    def step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        method: Any = a.method
        table = layer.kind == "embedding"
        after = change(W.T if table else W, a.params.D, method.token_indices)
        return after.T if table else after, b

    return Formula(weight=one_by_one(step))


def put(rows: Array, D: Array, tokens: tuple[int, ...]) -> Array:
    return np.stack([D[tokens.index(t)] if t in tokens else rows[t] for t in range(rows.shape[0])])


def _where_x_is(case: Case) -> Answer | None:
    """Every occurrence's gradient, but a token's counted once."""
    p = pose(case)
    if p.layer.kind != "embedding" or p.x is None or p.dy is None:
        return None
    x, dy = p.x.reshape(-1), p.dy.reshape(-1, p.dy.shape[-1])
    right = answer(case)
    for i, a in enumerate(p.adapters):
        method: Any = a.method
        rows = [dy[np.argmax(x == t)] if np.any(x == t) else 0 * dy[0] for t in method.token_indices]
        right = {**right, f"{i}.trainable_tokens_delta": np.stack(rows)}
    return right


def _unmerge_keeps(case: Case) -> Answer:
    p = pose(case)
    return stored(p.layer, p.merged_W, p.merged_b)


def _unmerge_subtracts(case: Case) -> Answer:
    p = pose(case)
    table, merged = p.layer.kind == "embedding", np.asarray(p.merged_W)
    rows = merged.T if table else merged
    for a in p.adapters:
        method: Any = a.method
        rows = np.stack(
            [rows[t] - a.params.D[method.token_indices.index(t)] if t in method.token_indices else rows[t] for t in range(len(rows))]
        )
    return stored(p.layer, rows.T if table else rows, p.merged_b)


def _unmerge_all(case: Case) -> Answer:
    p = pose(case)
    return stored(p.layer, p.W, p.merged_b)


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    return {} if config["init_weights"] else {"trainable_tokens_delta": normal(1.0)}


def identity(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    config = case.adapters[0].config
    if not config["init_weights"]:
        return ""
    assert case.weight is not None
    want = case.weight[np.asarray(config["token_indices"])]
    if np.any(np.abs(draw["trainable_tokens_delta"] - want) > 2.0 ** -PRECISION[dtype] * np.abs(want)):
        return "init-not-identity: the rows start as they are in the table, in the order of token_indices"
    return ""


def _formula(name: str, clause: str, sentence: str, change: Rows) -> Mistake:
    return Mistake(name=name, clause=clause, sentence=sentence, replay=with_rows(change))


def _unmerging(name: str, sentence: str, wrong: Replay) -> Mistake:
    return Mistake(name=name, clause="TRAINABLETOKENS-C8", sentence=sentence, replay=only(unmerge=wrong))


SUITE = Suite(
    variants=(
        Variant(name="plain", clause="TRAINABLETOKENS-C1", configs=(FOUR,), layers=("embedding", "linear"), bias=False),
        Variant(name="repeated", clause="TRAINABLETOKENS-C9", configs=(FOUR,), layers=("embedding",), operations=RUN, rows=(4, 9)),
        Variant(name="biased", clause="TRAINABLETOKENS-C5", configs=(FOUR,), operations=("merge", "unmerge")),
        Variant(name="two-adapters", clause="TRAINABLETOKENS-C6", configs=(FOUR, TWO), layers=("embedding", "linear"), bias=False),
    ),
    fresh=Fresh(
        clause="TRAINABLETOKENS-C11",
        starts={
            "default": Start(FOUR, ("embedding", "linear"), draws=1),
            "random": Start({**FOUR, "init_weights": False}, ("embedding",)),
        },
        laws=laws,
        identity=identity,
    ),
    files=Files(
        configs_clause="TRAINABLETOKENS-C12",
        keys_clause="TRAINABLETOKENS-C14",
        configs={"plain": FOUR},
        told={"token_indices": "token_indices"},
        saved_on={"model.embed_tokens": Embedding(num_embeddings=9, embedding_dim=7)},
    ),
    mistakes=(
        _formula(
            "rows-added",
            "TRAINABLETOKENS-C2",
            "the trained rows are added to the table's instead of taking their place",
            lambda rows, D, tokens: rows + put(0 * rows, D, tokens),
        ),
        _formula(
            "rows-averaged",
            "TRAINABLETOKENS-C2",
            "a token's row is the mean of the trained and the table's",
            lambda rows, D, tokens: (rows + put(rows, D, tokens)) / 2,
        ),
        _formula(
            "tokens-sorted",
            "TRAINABLETOKENS-C3",
            "the trained rows are taken in the order of the tokens, not of token_indices",
            lambda rows, D, tokens: put(rows, D, tuple(sorted(tokens))),
        ),
        _formula(
            "first-rows",
            "TRAINABLETOKENS-C3",
            "the trained rows take the place of the first tokens, whatever token_indices says",
            lambda rows, D, tokens: put(rows, D, tuple(range(len(tokens)))),
        ),
        _formula(
            "last-rows",
            "TRAINABLETOKENS-C3",
            "the trained rows take the place of the last tokens, as if they had been appended",
            lambda rows, D, tokens: put(rows, D, tuple(range(rows.shape[0] - len(tokens), rows.shape[0]))),
        ),
        _formula(
            "others-zero",
            "TRAINABLETOKENS-C2",
            "the rows of other tokens are zero",
            lambda rows, D, tokens: put(0 * rows, D, tokens),
        ),
        _formula(
            "off-by-one",
            "TRAINABLETOKENS-C3",
            "every token is one too high",
            lambda rows, D, tokens: put(rows, D, tuple(t + 1 for t in tokens)),
        ),
        Mistake(
            name="grad-first-occurrence",
            clause="TRAINABLETOKENS-C9",
            sentence="a token that occurs several times gets the gradient of its first occurrence alone",
            replay=only(backward=_where_x_is),
        ),
        _unmerging("unmerge-nothing", "unmerge does nothing: the trained rows stay", _unmerge_keeps),
        _unmerging("unmerge-subtracts", "unmerge subtracts the trained rows, as if they had been added", _unmerge_subtracts),
        _unmerging("unmerge-everything", "unmerge puts the whole frozen table back, whatever it is given", _unmerge_all),
        shared.only_first_adapter("TRAINABLETOKENS-C6"),
    ),
)
