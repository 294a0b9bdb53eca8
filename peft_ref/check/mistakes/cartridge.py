"""Cartridge: what is asked, and what ports get wrong. How a row is cut and what goes with it is prefix tuning's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check.cache_family import cache_splice_mistakes, row_mistakes
from peft_ref.check.case import Answer, Case
from peft_ref.check.mistake import Mistake, Replay, Suite, only
from peft_ref.check.oracle import answer, float64
from peft_ref.check.prompt_family import batch_mistakes, other_prompt, splice_variants
from peft_ref.check.prompting import PromptProblem, PromptVariant, pose_prompt
from peft_ref.methods.cartridge import FROZEN, TRAINED
from peft_ref.splice import key_values_vjp

PLAIN = {
    "num_virtual_tokens": 5,
    "token_dim": 10,
    "num_transformer_submodules": 1,
    "num_attention_heads": 5,
    "num_layers": 4,
    "num_frozen_tokens": 2,
}
TWO_SIDES = {**PLAIN, "num_transformer_submodules": 2}

VARIANTS = (
    PromptVariant(name="plain", clause="CARTRIDGE-C1", config=PLAIN),
    PromptVariant(name="rounded", clause="CARTRIDGE-C1", config={**PLAIN, "num_virtual_tokens": 7}, numbers="rounded", batch=4),
    PromptVariant(name="nothing-frozen", clause="CARTRIDGE-C2", config={**PLAIN, "num_virtual_tokens": 3, "num_frozen_tokens": 0}),
    PromptVariant(name="inference", clause="CARTRIDGE-C7", config={**PLAIN, "inference_mode": True}),
    PromptVariant(name="two-sides", clause="PREFIXTUNING-C9", config=TWO_SIDES, operations=("prompt", "prompt_backward")),
    PromptVariant(
        name="two-sides-odd", clause="PREFIXTUNING-C10", config={**TWO_SIDES, "num_layers": 3}, operations=("prompt", "prompt_backward")
    ),
    # One frozen token, one trained, one head, one example: what mixes them up does not show.
    PromptVariant(
        name="one-of-each",
        clause="CARTRIDGE-C3",
        config={**PLAIN, "num_virtual_tokens": 2, "num_attention_heads": 1, "num_layers": 3, "num_frozen_tokens": 1},
        operations=("prompt", "prompt_backward"),
        batch=1,
    ),
    *splice_variants(PLAIN, "CARTRIDGE-C8"),
)


def _freezes(p: PromptProblem) -> bool:
    return FROZEN in p.tensors


def _held(replay: Replay) -> Replay:
    """The frozen rows get no gradient, whatever else is wrong."""

    def still(case: Case) -> Answer | None:
        out, name = replay(case), f"0.{FROZEN}"
        return out if out is None or name not in out else {**out, name: np.zeros_like(out[name])}

    return still


def _table(table: Callable[[Array, Array], Array]) -> Replay:
    """Another table of the frozen and the trained rows; its gradient is autograd's."""

    def prompt(p: PromptProblem) -> Array:
        wrong = table(p.tensors[FROZEN], p.tensors[TRAINED])
        return np.stack([wrong] * p.ctx.batch)

    return _held(other_prompt(prompt, _freezes))


def _gradients(wrong: Callable[[Array, int], Answer]) -> Replay:
    """Another gradient, given that of the table and how many rows are frozen."""

    def backward(case: Case) -> Answer | None:
        p, right = pose_prompt(case, float64), answer(case)
        if not _freezes(p):
            return None
        G = np.sum(key_values_vjp(p.method, p.method.prompt(p.tensors, p.ctx), p.dy), axis=0)
        other = {f"0.{name}": value for name, value in wrong(G, len(p.tensors[FROZEN])).items()}
        return {**right, **other} if any(not np.array_equal(right[name], value) for name, value in other.items()) else None

    return only(prompt_backward=backward)


def _first_row_alone_held(G: Array, frozen: int) -> Answer:
    return {FROZEN: np.concatenate([np.zeros_like(G[:1]), G[1:frozen]])}


SUITE = Suite(
    variants=(),
    prompts=VARIANTS,
    mistakes=(
        Mistake(
            name="frozen-rows-behind",
            clause="CARTRIDGE-C1",
            sentence="the frozen rows come behind the trained ones instead of before them",
            replay=_table(lambda F, T: np.concatenate([T, F])),
        ),
        Mistake(
            name="frozen-rows-zero",
            clause="CARTRIDGE-C1",
            sentence="the frozen rows are zero: they were not loaded",
            replay=_table(lambda F, T: np.concatenate([0 * F, T])),
        ),
        Mistake(
            name="frozen-rows-alike",
            clause="CARTRIDGE-C2",
            sentence="every frozen row is the first: as if only one token were frozen",
            replay=_table(lambda F, T: np.concatenate([F[[0] * len(F)], T])),
        ),
        Mistake(
            name="trained-rows-added",
            clause="CARTRIDGE-C2",
            sentence="the trained rows start from the last frozen one: it is added to each of them",
            replay=_table(lambda F, T: np.concatenate([F, T + F[-1:]])),
        ),
        Mistake(
            name="frozen-rows-trained",
            clause="CARTRIDGE-C4",
            sentence="the frozen rows have a gradient like the others",
            replay=_gradients(lambda G, n: {FROZEN: G[:n]}),
        ),
        Mistake(
            name="first-row-alone-held",
            clause="CARTRIDGE-C4",
            sentence="of the frozen rows only the first is held, whatever num_frozen_tokens says",
            replay=_gradients(_first_row_alone_held),
        ),
        Mistake(
            name="gradient-of-the-first-rows",
            clause="CARTRIDGE-C4",
            sentence="the trained rows get the gradient of the table's first rows instead of its last",
            replay=_gradients(lambda G, n: {TRAINED: G[: len(G) - n]}),
        ),
        Mistake(
            name="nothing-trained",
            clause="CARTRIDGE-C4",
            sentence="every row is held, the trained ones too",
            replay=_gradients(lambda G, n: {TRAINED: 0 * G[n:]}),
        ),
        *batch_mistakes("CARTRIDGE-C5"),
        *(replace(m, replay=_held(m.replay)) for m in (*row_mistakes(), *cache_splice_mistakes())),
    ),
)
