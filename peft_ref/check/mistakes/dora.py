"""DoRA: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from peft_ref.arrays import Array, row_norm
from peft_ref.check import lora_family as lora
from peft_ref.check.asked import Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.lora_starts import WITH_TABLE, identity, laws
from peft_ref.check.mistake import Formula, Mistake, Suite, autograd, dropped, one_by_one, only, stored
from peft_ref.check.oracle import Problem, pose
from peft_ref.check.tape import constant
from peft_ref.check.variants import RUN, Variant, gains
from peft_ref.layers import Layer
from peft_ref.stack import Adapter

M = {"m": gains}

# Five whole numbers whose squares add up to a power of four: rows whose norm is 4 or 8.
UNIT_ROWS = ((3, 2, 1, 1, 1), (2, 2, 2, 2, 0), (5, 5, 3, 2, 1), (7, 3, 2, 1, 1), (6, 4, 2, 2, 2), (6, 5, 1, 1, 1))


def unit_norms(rng: np.random.Generator, shape: tuple[int, int], tensors: Mapping[str, NDArray]) -> NDArray:
    """A frozen weight for which every row of W + s B A has a norm that is a power of two."""
    rows = [rng.permutation(UNIT_ROWS[i % len(UNIT_ROWS)]) * rng.choice([-1, 1], shape[1]) for i in range(shape[0])]
    s = lora.scale_of({**lora.PLAIN, "use_rslora": False})
    return np.asarray(rows, dtype=np.float64) - s * (tensors["lora_B.weight"] @ tensors["lora_A.weight"])


VARIANTS = (
    Variant(name="plain", clause="DORA-C1", configs=(lora.PLAIN,), layers=(*lora.KINDS, "conv1d-dilation"), draws=M),
    Variant(name="unit-norm", clause="DORA-C1", configs=(lora.PLAIN,), numbers="small", draws=M, weight=unit_norms),
    Variant(
        name="rounded",
        clause="DORA-C7",
        configs=({"r": 9, "lora_alpha": 5},),
        layers=("linear-large",),
        numbers="rounded",
        draws=M,
    ),
    Variant(name="matrix", clause="DORA-C1", configs=(lora.PLAIN,), layers=lora.LINEAR_AND_TABLE, operations=RUN, rows=(3,), draws=M),
    Variant(name="no-bias", clause="DORA-C8", configs=(lora.PLAIN,), bias=False, draws=M),
    Variant(name="rslora", clause="DORA-C7", configs=(lora.RSLORA,), draws=M),
    Variant(
        name="dropout",
        clause="DORA-C11",
        configs=({**lora.PLAIN, "lora_dropout": 0.75},),
        layers=("linear", "conv2d"),
        dropout=0.75,
        draws=M,
    ),
    Variant(
        name="two-adapters",
        clause="DORA-C9",
        configs=(lora.PLAIN, {"r": 2, "lora_alpha": 8}),
        layers=("linear", "transposed_linear", "embedding"),
        draws=M,
    ),
)


def delta(a: Adapter) -> Array:
    return a.method.scale * (a.params.B @ a.params.A)  # type: ignore[attr-defined]  # every method of this suite has a scale


def column(v: Array) -> Array:
    return v.reshape(-1, 1)


def _row_norm(a: Adapter, W: Array) -> Array:
    return column(row_norm(W + delta(a)))


def _squares(V: Array, axis: int | None) -> Array:
    return np.sum(V * V, axis=axis)


def gain(norm: Callable[[Adapter, Array, Array], Array], held: bool = True) -> Formula:
    """W' = m / n (W + s B A) with another n, given (adapter, W, W0); held constant in the gradient, or not."""

    def step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        n = norm(a, W, W0)
        return column(a.params.m) / (constant(n) if held else n) * (W + delta(a)), b

    def unmerge(p: Problem) -> tuple[Array, Array | None]:
        W, norms = p.W, []
        for a in p.adapters:  # the norms that merging used
            norms.append(norm(a, W, p.W))
            W, _ = step(p.layer, a, W, None, p.W)
        W = p.merged_W
        for a, n in zip(reversed(p.adapters), reversed(norms), strict=True):
            W = W / (column(a.params.m) / n) - delta(a)
        return W, p.merged_b

    return Formula(weight=one_by_one(step), unmerge=unmerge)


def parts(
    combine: Callable[[Array, Array, Array], Array],
    bias: Callable[[Array, Array], Array] = lambda g, b: b,
    unmerge: Callable[[Array, Array, Array], Array] | None = None,
) -> Formula:
    """W' from the right gain m / n (out, 1), W and s B A, combined in a wrong way."""

    def step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        g = column(a.params.m) / constant(_row_norm(a, W0))
        return combine(g, W, delta(a)), None if b is None else bias(g.reshape(-1), b)

    def undo(p: Problem) -> tuple[Array, Array | None]:
        W = p.merged_W
        for a in reversed(p.adapters):
            assert unmerge is not None
            W = unmerge(column(a.params.m) / _row_norm(a, p.W), W, delta(a))
        return W, p.merged_b

    return Formula(weight=one_by_one(step), unmerge=None if unmerge is None else undo)


def _forward(p: Problem) -> Array:
    """The right forward with a norm that takes part in the gradient."""
    return gain(lambda a, W, W0: _row_norm(a, W0), held=False).forward(p)


def _merged_norm(case: Case) -> Answer:
    p = pose(case)
    W = p.merged_W
    for a in reversed(p.adapters):
        W = W * column(row_norm(W) / a.params.m) - delta(a)
    return stored(p.layer, W, p.merged_b)


def _low_rank_dropout(p: Problem) -> Array:
    """Dropout on B A x alone; W x in the gained part sees all of x."""
    y = p.layer.apply(p.x, p.W, p.b)
    for a in p.adapters:
        g = column(a.params.m) / constant(_row_norm(a, p.W))
        y = y + p.layer.apply(p.x, (g - 1) * p.W, None) + p.layer.apply(dropped(p.x, a), g * delta(a), None)
    return y


def _dropout_on_low_rank_only(case: Case) -> Answer | None:
    if not case.adapters[0].dropout:
        return None
    if case.operation == "forward":
        return {"y": _low_rank_dropout(pose(case))}
    return autograd(case, _low_rank_dropout) if case.operation == "backward" else None


DORA_MISTAKES = (
    Mistake(
        name="norm-wrong-axis",
        clause="DORA-C3",
        sentence="the norm is taken over the columns instead of the rows of W + s B A (out, in)",
        replay=gain(lambda a, W, W0: np.sqrt(_squares(W0 + delta(a), 0)).reshape(1, -1)),
        links=("https://github.com/KohakuBlueleaf/LyCORIS/issues/216",),
    ),
    Mistake(
        name="norm-of-base-only",
        clause="DORA-C4",
        sentence="the norm is that of the frozen weight, without s B A",
        replay=gain(lambda a, W, W0: column(row_norm(W0))),
        links=("https://github.com/Comfy-Org/ComfyUI/pull/15458",),
    ),
    Mistake(
        name="norm-scale-forgotten",
        clause="DORA-C4",
        sentence="the norm is that of W + B A, without the scale",
        replay=gain(lambda a, W, W0: column(row_norm(W0 + a.params.B @ a.params.A))),
    ),
    Mistake(
        name="norm-not-rooted",
        clause="DORA-C3",
        sentence="the norm is the sum of squares, without its root",
        replay=gain(lambda a, W, W0: column(_squares(W0 + delta(a), 1))),
    ),
    Mistake(
        name="norm-global",
        clause="DORA-C3",
        sentence="the norm is that of the whole matrix instead of one per row",
        replay=gain(lambda a, W, W0: np.sqrt(_squares(W0 + delta(a), None))),
    ),
    Mistake(
        name="norm-l1",
        clause="DORA-C3",
        sentence="the norm is the sum of magnitudes instead of the Euclidean one",
        replay=gain(lambda a, W, W0: column(np.sum(abs(W0 + delta(a)), axis=1))),
    ),
    Mistake(
        name="norm-of-merged",
        clause="DORA-C10",
        sentence="with several adapters the norm is measured on what the earlier ones made of the weight",
        replay=gain(lambda a, W, W0: _row_norm(a, W)),
        links=("https://github.com/huggingface/peft/issues/3608",),
    ),
    Mistake(
        name="magnitude-ignored",
        clause="DORA-C1",
        sentence="the magnitude is ignored: this is plain LoRA",
        replay=parts(lambda g, W, d: W + d, unmerge=lambda g, W, d: W - d),
    ),
    Mistake(
        name="norm-ignored",
        clause="DORA-C1",
        sentence="the magnitude multiplies W + s B A, which is not divided by its norm",
        replay=gain(lambda a, W, W0: 1.0),
    ),
    Mistake(
        name="delta-not-normalised",
        clause="DORA-C1",
        sentence="m / n multiplies the frozen weight only, not s B A",
        replay=parts(lambda g, W, d: g * W + d, unmerge=lambda g, W, d: (W - d) / g),
    ),
    Mistake(
        name="base-not-normalised",
        clause="DORA-C1",
        sentence="m / n multiplies s B A only, not the frozen weight",
        replay=parts(lambda g, W, d: W + g * d, unmerge=lambda g, W, d: W - g * d),
    ),
    Mistake(
        name="bias-scaled",
        clause="DORA-C8",
        sentence="m / n multiplies the bias too",
        replay=only(
            forward=parts(lambda g, W, d: g * (W + d), bias=lambda g, b: g * b),
            backward=parts(lambda g, W, d: g * (W + d), bias=lambda g, b: g * b),
        ),
        links=("https://github.com/huggingface/peft/pull/2371",),
    ),
    Mistake(
        name="grad-through-norm",
        clause="DORA-C17",
        sentence="the norm takes part in the gradient, where HF (and section 4.3 of the paper) holds it constant",
        replay=only(backward=lambda case: autograd(case, _forward)),
    ),
    Mistake(
        name="unmerge-with-merged-norm",
        clause="DORA-C16",
        sentence="unmerge divides by m / n with the norm of the merged weight instead of the one that merging used",
        replay=only(unmerge=_merged_norm),
    ),
    Mistake(
        name="dropout-on-low-rank-only",
        clause="DORA-C11",
        sentence="dropout reaches B A x only; HF drops the input of the frozen weight in (m / n - 1) W x as well",
        replay=_dropout_on_low_rank_only,
    ),
)

FRESH = Fresh(
    clause="DORA-C21",
    starts={"default": Start(lora.PLAIN, ("linear", "embedding", "conv1d"))},
    laws=laws,
    identity=identity,
)
FILES = Files(
    configs_clause="DORA-C22",
    keys_clause="DORA-C23",
    configs={
        "plain": {"r": 4, "lora_alpha": 6, "use_dora": True},
        "alpha-pattern": {"r": 4, "use_dora": True, "alpha_pattern": {"q_proj": 20}},
    },
    saved_on=WITH_TABLE,
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        *DORA_MISTAKES,
        *lora.SCALING,
        *lora.LAYOUT,
        *(m for m in lora.GRADIENTS if m.name == "input-grad-missing"),
        *(m for m in lora.DROPOUT if m.name in ("dropout-missing", "dropout-not-rescaled", "dropout-divided-by-p")),
        *lora.MERGING,
    ),
    base_apart=True,  # HF computes W x + (m/n - 1) W x
)
