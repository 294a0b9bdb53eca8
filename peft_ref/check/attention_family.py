"""What ports of attention get wrong, from its pieces: keys, values, scores, gate and output, each of which may be another one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from peft_ref.arrays import Array
from peft_ref.attending import Affine
from peft_ref.attention import join_heads, softmax
from peft_ref.check import tape
from peft_ref.check.attending import AttentionProblem, pose_attention
from peft_ref.check.case import Answer, Case
from peft_ref.check.mistake import Replay
from peft_ref.check.oracle import float64

Output = Callable[[AttentionProblem], Array]


def rows_of(p: AttentionProblem, part: Affine) -> Array:
    """The prompt through a projection of the block: (rows, out)."""
    rows = p.params.E[0, ...] @ part.W.T
    return rows if part.b is None else rows + part.b


def by_heads(p: AttentionProblem, rows: Array) -> Array:
    """(rows, groups d) as (heads, rows, d): neighbours share."""
    groups, heads = p.block.num_key_value_heads, p.block.num_attention_heads
    split = np.transpose(rows.reshape(len(rows), groups, p.block.head_dim), (1, 0, 2))
    return np.repeat(split, heads // groups, axis=0)


def scores_of(p: AttentionProblem, k: Array) -> Array:
    return p.q @ np.swapaxes(k, -1, -2) * p.block.head_dim**-0.5


def projected(p: AttentionProblem, heads: Array) -> Array:
    """(batch, heads, T, d) as what is added to the block's output."""
    y = join_heads(heads)
    if p.w.o is None:
        return y
    return y @ p.w.o.W.T if p.w.o.b is None else y @ p.w.o.W.T + p.w.o.b


def attended(p: AttentionProblem, k: Array, v: Array, gate: Array | None = None) -> Array:
    """As it should be, from keys and values (heads, rows, d)."""
    return projected(p, (p.params.g if gate is None else gate) * (softmax(scores_of(p, k)) @ v))


def keys_values(p: AttentionProblem) -> tuple[Array, Array]:
    return by_heads(p, rows_of(p, p.w.k)), by_heads(p, rows_of(p, p.w.v))


def other_output(output: Output, shows: Callable[[AttentionProblem], bool] = lambda p: True) -> Replay:
    """A wrong output; its gradient is autograd's."""

    def replay(case: Case) -> Answer | None:
        p = pose_attention(case, float64)
        if not shows(p):
            return None
        if case.operation == "attention":
            return {"y": output(p)}
        p = pose_attention(case, tape.tape_array, float64)
        assert case.dy is not None
        tape.backward(output(p), case.dy)
        return {"q": tape.gradients(p.q), **{f"0.{key}": tape.gradients(v) for key, v in p.method.pack(p.params).items()}}

    return replay


def other_gate(gate: Callable[[Array], Array]) -> Replay:
    return other_output(lambda p: attended(p, *keys_values(p), gate(p.params.g)))


def other_scores(change: Callable[[AttentionProblem, Array], Array], shows: Callable[[AttentionProblem], bool] = lambda p: True) -> Replay:
    """Wrong scores, given the right ones."""

    def output(p: AttentionProblem) -> Array:
        k, v = keys_values(p)
        return projected(p, p.params.g * (softmax(change(p, scores_of(p, k))) @ v))

    return other_output(output, shows)


def several_rows(p: AttentionProblem) -> bool:
    return bool(p.params.E.shape[1] > 1)
