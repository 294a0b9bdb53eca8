"""Adaption prompt: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from peft_ref.arrays import Array
from peft_ref.attending import Affine, AttentionBlock
from peft_ref.attention import softmax
from peft_ref.check import tape
from peft_ref.check.attending import AttentionProblem, AttentionVariant
from peft_ref.check.attention_family import (
    Output,
    attended,
    by_heads,
    keys_values,
    other_gate,
    other_output,
    other_scores,
    projected,
    rows_of,
    scores_of,
    several_rows,
)
from peft_ref.check.case import Answer, Case
from peft_ref.check.mistake import Mistake, Replay, Suite, only
from peft_ref.check.oracle import answer

GROUPED = AttentionBlock(hidden_size=24, num_attention_heads=6, num_key_value_heads=3, head_dim=4)
ALONE = AttentionBlock(hidden_size=12, num_attention_heads=3, num_key_value_heads=3, head_dim=4)
GPT2 = replace(ALONE, fused=True)
OTHER_SCALE = AttentionBlock(hidden_size=12, num_attention_heads=2, num_key_value_heads=2, head_dim=6)
WIDE = AttentionBlock(hidden_size=10, num_attention_heads=6, num_key_value_heads=2, head_dim=4)
LONG = {"adapter_len": 7, "adapter_layers": 2}

VARIANTS = (
    AttentionVariant(name="plain", clause="ADAPTIONPROMPT-C1", config=LONG, block=ALONE),
    AttentionVariant(name="grouped", clause="ADAPTIONPROMPT-C5", config=LONG, block=GROUPED),
    AttentionVariant(name="bias", clause="ADAPTIONPROMPT-C8", config=LONG, block=ALONE, bias=True),
    AttentionVariant(name="fused", clause="ADAPTIONPROMPT-C9", config=LONG, block=GPT2, bias=True),
    AttentionVariant(name="rounded", clause="ADAPTIONPROMPT-C3", config=LONG, block=OTHER_SCALE, numbers="rounded", batch=3),
    AttentionVariant(name="wide", clause="ADAPTIONPROMPT-C3", config=LONG, block=WIDE),
    # One row gets all the weight there is, whatever the scores.
    AttentionVariant(
        name="one-row", clause="ADAPTIONPROMPT-C1", config={**LONG, "adapter_len": 1}, block=GROUPED, operations=("attention",), bias=True
    ),
)


def _gate_inside(p: AttentionProblem) -> Array:
    k, v = keys_values(p)
    return projected(p, softmax(p.params.g * scores_of(p, k)) @ v)


def _along(axis: int) -> Output:
    """The softmax over another axis of the scores (batch, heads, T, rows)."""

    def output(p: AttentionProblem) -> Array:
        k, v = keys_values(p)
        weights = np.swapaxes(softmax(np.swapaxes(scores_of(p, k), axis, -1)), axis, -1)
        return projected(p, p.params.g * (weights @ v))

    return output


def _with_an_empty_row(p: AttentionProblem) -> Array:
    """One more place with the score 0 and the value 0, as where the prompt is put before keys that are masked."""
    k, v = keys_values(p)
    none = 0.0 * k[:, :1, :]
    return attended(p, np.concatenate([none, k], axis=1), np.concatenate([none, v], axis=1))


def _masked(p: AttentionProblem, scores: Array) -> Array:
    """A causal mask: token t sees the rows up to t."""
    ahead = np.arange(scores.shape[-1]) > np.arange(scores.shape[-2])[:, None]
    return scores * ~ahead + -1e4 * ahead


def _rotated(p: AttentionProblem) -> Array:
    """The prompt's keys turned as those of tokens at the positions 0, 1, ..."""
    k, v = keys_values(p)
    half = p.block.head_dim // 2
    angles = np.arange(k.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin, first, second = np.cos(angles), np.sin(angles), k[..., :half], k[..., half:]
    return attended(p, np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1), v)


def _through(k: str, v: str) -> Output:
    return lambda p: attended(p, by_heads(p, rows_of(p, p.own[k])), by_heads(p, rows_of(p, p.own[v])))


def _not_projected(p: AttentionProblem) -> Array:
    """E itself in place of keys and values."""
    rows = p.params.E[0, ...]
    return attended(p, by_heads(p, rows), by_heads(p, rows))


def _as_wide(p: AttentionProblem) -> bool:
    return p.block.num_key_value_heads * p.block.head_dim == p.block.hidden_size


def _groups_in_turn(p: AttentionProblem) -> Array:
    """Head i looks at group i modulo their number."""
    groups, heads = p.block.num_key_value_heads, p.block.num_attention_heads
    k, v = (part[:: heads // groups][np.arange(heads) % groups] for part in keys_values(p))
    return attended(p, k, v)


def _first_group(p: AttentionProblem) -> Array:
    k, v = (np.broadcast_to(part[:1], part.shape) for part in keys_values(p))
    return attended(p, k, v)


def _grouped(p: AttentionProblem) -> bool:
    return p.block.num_key_value_heads < p.block.num_attention_heads


def _heads_inside(p: AttentionProblem) -> Array:
    """(rows, d, groups) read for (rows, groups, d)."""
    groups, d = p.block.num_key_value_heads, p.block.head_dim

    def turned(rows: Array) -> Array:
        return np.swapaxes(rows.reshape(len(rows), d, groups), 1, 2).reshape(rows.shape)

    return attended(p, *(by_heads(p, turned(rows_of(p, part))) for part in (p.w.k, p.w.v)))


def _without_bias(p: AttentionProblem) -> Array:
    bare = p._replace(w=p.w._replace(k=Affine(p.w.k.W), v=Affine(p.w.v.W)))
    return attended(p, *keys_values(bare))


def _biased(p: AttentionProblem) -> bool:
    return p.w.v.b is not None


def _behind_o(p: AttentionProblem) -> Array:
    """Added behind o_proj instead of before it."""
    return attended(p._replace(w=p.w._replace(o=None)), *keys_values(p))


def _square(p: AttentionProblem) -> bool:
    return p.w.o is not None and p.block.num_attention_heads * p.block.head_dim == p.block.hidden_size


def _through_c_proj(p: AttentionProblem) -> Array:
    return attended(p._replace(w=p.w._replace(o=p.own["c_proj"])), *keys_values(p))


def _o_bias_once(p: AttentionProblem) -> Array:
    assert p.w.o is not None
    return attended(p._replace(w=p.w._replace(o=Affine(p.w.o.W))), *keys_values(p))


def _keys_held(p: AttentionProblem) -> Array:
    """A prompt that learns through its values alone."""
    k, v = keys_values(p)
    return attended(p, tape.constant(k), v)


def _backward(change: Callable[[Case, Answer], Answer]) -> Replay:
    return only(attention_backward=lambda case: change(case, answer(case)))


def _prompt_averaged(case: Case, right: Answer) -> Answer:
    return {**right, "0.adaption_prompt": right["0.adaption_prompt"] / len(case.question["q"])}


def _gate_closed(case: Case, right: Answer) -> Answer:
    """The gate's factor left out of what flows back through it."""
    g = case.adapters[0].tensors["adaption_gate"]
    return {name: value if name == "0.adaption_gate" else value / g for name, value in right.items()}


def _q_alone(case: Case, right: Answer) -> Answer:
    return {**right, "q": np.zeros_like(right["q"])}


def _keys_only_in_gradient(case: Case, right: Answer) -> Answer | None:
    held = other_output(_keys_held)(case)
    return None if held is None else {**right, "0.adaption_prompt": held["0.adaption_prompt"]}


SUITE = Suite(
    variants=(),
    attention=VARIANTS,
    mistakes=(
        Mistake(
            name="gate-ignored",
            clause="ADAPTIONPROMPT-C2",
            sentence="the gate is not read: everything is added",
            replay=other_gate(lambda g: 0.0 * g + 1.0),
        ),
        Mistake(
            name="gate-tanh",
            clause="ADAPTIONPROMPT-C2",
            sentence="the gate is tanh(g), as in the paper's code, instead of g",
            replay=other_gate(np.tanh),
            links=("https://github.com/OpenGVLab/LLaMA-Adapter/blob/main/alpaca_finetuning_v1/llama/model.py",),
        ),
        Mistake(
            name="gate-sigmoid",
            clause="ADAPTIONPROMPT-C2",
            sentence="the gate is sigmoid(g) instead of g, so that a fresh adapter is half open",
            replay=other_gate(lambda g: 1.0 / (1.0 + np.exp(-g))),
        ),
        Mistake(
            name="gate-on-scores",
            clause="ADAPTIONPROMPT-C2",
            sentence="the gate multiplies the scores inside the softmax instead of what comes out of it",
            replay=other_output(_gate_inside),
        ),
        Mistake(
            name="scores-unscaled",
            clause="ADAPTIONPROMPT-C3",
            sentence="the scores are not divided by sqrt(head_dim)",
            replay=other_scores(lambda p, s: s * math.sqrt(p.block.head_dim), several_rows),
        ),
        Mistake(
            name="scores-scaled-by-width",
            clause="ADAPTIONPROMPT-C3",
            sentence="the scores are divided by sqrt(hidden_size) instead of sqrt(head_dim)",
            replay=other_scores(lambda p, s: s * math.sqrt(p.block.head_dim / p.block.hidden_size), several_rows),
        ),
        Mistake(
            name="scores-scaled-twice",
            clause="ADAPTIONPROMPT-C3",
            sentence="the scores are divided by head_dim instead of its root",
            replay=other_scores(lambda p, s: s / math.sqrt(p.block.head_dim), several_rows),
        ),
        Mistake(
            name="keys-rotated",
            clause="ADAPTIONPROMPT-C4",
            sentence="the prompt's keys are rotated as those of tokens at the positions 0, 1, ...; they have no position",
            replay=other_output(_rotated, several_rows),
        ),
        Mistake(
            name="softmax-over-tokens",
            clause="ADAPTIONPROMPT-C1",
            sentence="the softmax runs over the tokens instead of the rows of the prompt",
            replay=other_output(_along(2)),
        ),
        Mistake(
            name="softmax-over-heads",
            clause="ADAPTIONPROMPT-C1",
            sentence="the softmax runs over the heads instead of the rows of the prompt",
            replay=other_output(_along(1)),
        ),
        Mistake(
            name="softmax-with-an-empty-place",
            clause="ADAPTIONPROMPT-C6",
            sentence="the prompt shares its softmax with a place that has the score 0, so that its weights do not add up to 1",
            replay=other_output(_with_an_empty_row),
        ),
        Mistake(
            name="prompt-masked",
            clause="ADAPTIONPROMPT-C6",
            sentence="a causal mask lies on the prompt: token t sees the rows up to t; every token sees all of them",
            replay=other_scores(_masked, several_rows),
        ),
        Mistake(
            name="keys-through-v",
            clause="ADAPTIONPROMPT-C4",
            sentence="the prompt's keys are made by the block's projection of values",
            replay=other_output(_through("v_proj", "v_proj"), several_rows),
        ),
        Mistake(
            name="values-through-k",
            clause="ADAPTIONPROMPT-C4",
            sentence="the prompt's values are made by the block's projection of keys",
            replay=other_output(_through("k_proj", "k_proj")),
        ),
        Mistake(
            name="keys-and-values-swapped",
            clause="ADAPTIONPROMPT-C4",
            sentence="the prompt's keys are made by the projection of values, and its values by that of keys",
            replay=other_output(_through("v_proj", "k_proj")),
        ),
        Mistake(
            name="prompt-not-projected",
            clause="ADAPTIONPROMPT-C4",
            sentence="the prompt itself is taken for its keys and values, without the block's projections",
            replay=other_output(_not_projected, _as_wide),
        ),
        Mistake(
            name="first-slices-of-c-attn",
            clause="ADAPTIONPROMPT-C9",
            sentence="the prompt's keys and values are the first two thirds of what c_attn makes, instead of the last two",
            replay=other_output(_through("q_proj", "k_proj"), lambda p: p.block.fused),
        ),
        Mistake(
            name="groups-in-turn",
            clause="ADAPTIONPROMPT-C5",
            sentence="head i looks at the prompt's group i modulo their number instead of sharing one with its neighbours",
            replay=other_output(_groups_in_turn, _grouped),
        ),
        Mistake(
            name="first-group-for-all",
            clause="ADAPTIONPROMPT-C5",
            sentence="all heads look at the prompt's first group of keys and values",
            replay=other_output(_first_group),
        ),
        Mistake(
            name="heads-interleaved",
            clause="ADAPTIONPROMPT-C5",
            sentence="the numbers of a row are dealt to the heads in turn instead of head by head",
            replay=other_output(_heads_inside),
        ),
        Mistake(
            name="projection-bias-missing",
            clause="ADAPTIONPROMPT-C8",
            sentence="the prompt's keys and values lack the biases of the block's projections",
            replay=other_output(_without_bias, _biased),
        ),
        Mistake(
            name="added-behind-o-proj",
            clause="ADAPTIONPROMPT-C7",
            sentence="what the prompt gives is added behind o_proj, without going through it",
            replay=other_output(_behind_o, _square),
        ),
        Mistake(
            name="through-c-proj",
            clause="ADAPTIONPROMPT-C9",
            sentence="what the prompt gives goes through GPT-2's c_proj, behind which HF adds it",
            replay=other_output(_through_c_proj, lambda p: p.block.fused),
        ),
        Mistake(
            name="o-proj-bias-once",
            clause="ADAPTIONPROMPT-C8",
            sentence="o_proj is applied once to the sum, so that its bias is not added a second time, as HF does",
            replay=other_output(_o_bias_once, lambda p: p.w.o is not None and p.w.o.b is not None),
        ),
        Mistake(
            name="gradient-through-values-alone",
            clause="ADAPTIONPROMPT-C10",
            sentence="no gradient reaches the prompt through its keys",
            replay=only(attention_backward=lambda case: _keys_only_in_gradient(case, answer(case))),
        ),
        Mistake(
            name="gradient-averaged",
            clause="ADAPTIONPROMPT-C10",
            sentence="the prompt's gradient is the mean over the batch instead of the sum",
            replay=_backward(_prompt_averaged),
        ),
        Mistake(
            name="gradient-without-gate",
            clause="ADAPTIONPROMPT-C10",
            sentence="what flows back through the gate is not multiplied by it",
            replay=_backward(_gate_closed),
        ),
        Mistake(
            name="queries-detached",
            clause="ADAPTIONPROMPT-C10",
            sentence="no gradient flows back to the queries, and so none to the blocks below",
            replay=_backward(_q_alone),
        ),
    ),
)
