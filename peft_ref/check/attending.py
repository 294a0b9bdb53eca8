"""Operations about attention: what is asked, and the right answers.

    attention            q, the block's projections, tensors   -> y, what is added to the block's output
    attention_backward   the same and dy                       -> the gradient of sum(y * dy) for q and for every tensor

The queries are given as the block has them after rotary positions, so that no question is about those.
`AttentionVariant` says what is asked. Sizes all differ, and none is 1 but where a variant asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from peft_ref.arrays import Array, namespace
from peft_ref.attending import Affine, AttentionBlock, AttentionMethod, Projections
from peft_ref.check.case import ATTENTION_OPERATIONS, Case, CaseAdapter, NDArray, build_attention, config_of
from peft_ref.check.variants import NUMBERS, generator

SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
FUSED = "c_attn"
# Scores of some size leave no weight but one in the softmax: the prompt and the biases are smaller than the rest, by these powers of two.
SMALLER = {"small": 16, "dyadic": 8, "rounded": 64}


@dataclass(frozen=True, kw_only=True)
class AttentionVariant:
    """One configuration of a method and one block, and how it is asked."""

    name: str
    clause: str
    config: Mapping[str, Any]
    block: AttentionBlock
    operations: tuple[str, ...] = ATTENTION_OPERATIONS
    numbers: str = "dyadic"
    bias: bool = False
    batch: int = 2
    tokens: int = 5


class AttentionProblem(NamedTuple):
    """A case with its arrays lifted and its method built."""

    method: AttentionMethod[Any]
    block: AttentionBlock
    params: Any
    w: Projections
    own: Mapping[str, Affine]  # the projections by HF's names, as matrices (out, in), with one that a fused block does not use
    q: Array
    dy: Array | None


def pose_attention(case: Case, lift: Any, hold: Any = None) -> AttentionProblem:
    """`hold` lifts the block's own numbers, where they are not lifted like the others."""
    adapter, asked = case.adapters[0], case.question["attention"]
    method, own = build_attention(case.method, adapter.config), _projections(asked, hold or lift)
    block = block_of(asked)
    return AttentionProblem(
        method,
        block,
        method.unpack(block.hidden_size, {name: lift(value) for name, value in adapter.tensors.items()}),
        Projections(own["k_proj"], own["v_proj"], None if block.fused else own["o_proj"]),
        own,
        lift(case.question["q"]),
        None if case.dy is None else lift(case.dy),
    )


def block_of(asked: Mapping[str, Any]) -> AttentionBlock:
    """The block that a question describes."""
    return AttentionBlock(**{name: asked[name] for name in SIZES}, fused=FUSED in asked.get("projections", ()))


def _projections(asked: Mapping[str, Any], hold: Any) -> dict[str, Affine]:
    """As matrices (out, in) by HF's names; GPT-2's c_attn, which stores (in, out), in its three parts."""
    own = {
        name: Affine(hold(part["weight"]), None if part["bias"] is None else hold(part["bias"]))
        for name, part in asked["projections"].items()
    }
    if FUSED not in own:
        return own
    turned = {name: Affine(namespace(part.W).matrix_transpose(part.W), part.b) for name, part in own.items()}
    (W, b), n = turned.pop(FUSED), asked["hidden_size"]
    parts = {
        f"{letter}_proj": Affine(W[i * n : (i + 1) * n, :], None if b is None else b[i * n : (i + 1) * n]) for i, letter in enumerate("qkv")
    }
    return {**turned, **parts}


def solve_attention(p: AttentionProblem, operation: str) -> dict[str, Array]:
    """The arrays that `operation` asks for, by name."""
    if operation == "attention":
        return {"y": p.method.output(p.block, p.params, p.w, p.q)}
    d = p.method.output_vjp(p.block, p.params, p.w, p.q, p.dy)
    return {"q": d.q, **{f"0.{name}": value for name, value in p.method.pack(d.params).items()}}


def attention_cases(name: str, variants: Sequence[AttentionVariant]) -> Iterator[Case]:
    for variant in variants:
        for operation in variant.operations:
            yield make_attention_case(name, variant, operation)


def make_attention_case(name: str, variant: AttentionVariant, operation: str) -> Case:
    """The case of one variant. Both operations of it share their numbers; only what they are asked differs."""
    where = f"{name}.{variant.name}"
    rng, draw, block = generator(where), NUMBERS[variant.numbers], variant.block
    method, hidden = build_attention(name, variant.config), block.hidden_size

    def projection(n_in: int, out: int) -> dict[str, NDArray | None]:
        weight = draw(rng, (n_in, out) if block.fused else (out, n_in))
        return {"weight": weight, "bias": draw(rng, (out,)) / 4 if variant.bias else None}

    wide, narrow = block.num_attention_heads * block.head_dim, block.num_key_value_heads * block.head_dim
    if block.fused:
        parts = {FUSED: projection(hidden, 3 * hidden), "c_proj": projection(hidden, hidden)}
    else:
        parts = {"k_proj": projection(hidden, narrow), "v_proj": projection(hidden, narrow), "o_proj": projection(wide, hidden)}
    asked = {**{size: getattr(block, size) for size in SIZES}, "projections": parts}
    q = draw(rng, (variant.batch, block.num_attention_heads, variant.tokens, block.head_dim))
    tensors = {s.key: gate(rng) if s.shape == (1,) else draw(rng, s.shape) / SMALLER[variant.numbers] for s in method.spec(hidden)}
    return Case(
        id=f"{where}.{operation}",
        method=name,
        operation=operation,
        clause=variant.clause,
        adapters=(CaseAdapter(config=config_of(method), tensors=tensors),),
        dy=draw(rng, (variant.batch, variant.tokens, hidden)) if operation == "attention_backward" else None,
        question={"attention": asked, "q": q},
    )


def gate(rng: np.random.Generator) -> NDArray:
    """One number, neither 0 nor 1."""
    return rng.choice([-1.5, -0.5, 0.5, 1.5], (1,))
