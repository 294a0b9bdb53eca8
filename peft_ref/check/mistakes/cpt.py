"""CPT: what is asked, and what ports get wrong.

The radii of the cases are such that nothing rounds in them: HF PEFT works them out in float32. `CPT.counted` is asked as part of `splice`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.cpt_loss import LOSS_MISTAKES
from peft_ref.check.mistake import Mistake, Replay, Suite, only
from peft_ref.check.oracle import answer, float64
from peft_ref.check.prompt_family import batch_mistakes, splice_mistakes
from peft_ref.check.prompting import PromptProblem, PromptVariant, pose_prompt
from peft_ref.methods.cpt import CPT, DELTA, STILL
from peft_ref.prompts import EMBEDDING, SAVED

# Nine tokens, two examples and one without a type; no example has the types 5 to 8.
TYPES = [1, 2, 3, 4, 9, 10, 11, 12, 0]
PLAIN = {
    "cpt_token_ids": [7, 3, 11, 5, 2, 9, 4, 6, 8],
    "cpt_tokens_type_mask": TYPES,
    "token_dim": 8,
    "num_attention_heads": 1,
    "num_layers": 2,
    "opt_projection_epsilon": 16.0,  # a radius of 1, which every row of the cases exceeds
    "opt_projection_format_epsilon": 80.0,  # and one of 5, which none does
    "opt_loss_decay_factor": 0.5,  # which is not read unless the loss is to decay
}
TIGHT = {**PLAIN, "opt_projection_epsilon": 32.0, "opt_projection_format_epsilon": 8.0}
LARGE = {
    **PLAIN,
    "cpt_token_ids": [1, 2, 3, 4, 5, 6],
    "cpt_tokens_type_mask": [3, -2, 6, 7, -3, 8],
    "token_dim": 32,
    "opt_projection_epsilon": 4.0,
    "opt_projection_format_epsilon": 24.0,
}
DECAYING = {**PLAIN, "opt_weighted_loss_type": "decay"}
SHARPER = {**DECAYING, "opt_loss_decay_factor": 0.25, "cpt_tokens_type_mask": [4, 1, 2, 12, 4, 12, 3, 8, 8]}
GIVEN = ("attention_mask", "labels", "position_ids", "token_type_ids")
SPLICED = ("splice",)

VARIANTS = (
    PromptVariant(name="plain", clause="CPT-C1", config=PLAIN),
    PromptVariant(name="tight", clause="CPT-C2", config=TIGHT),
    PromptVariant(name="rounded", clause="CPT-C3", config=LARGE, numbers="rounded", batch=4),
    PromptVariant(name="one-example", clause="CPT-C10", config=PLAIN, operations=("prompt_backward",), batch=1),
    PromptVariant(name="inference", clause="CPT-C11", config={**PLAIN, "inference_mode": True}),
    PromptVariant(name="splice-causal", clause="CPT-C13", config=PLAIN, operations=SPLICED, inputs=GIVEN),
    PromptVariant(name="splice-typed", clause="CPT-C14", config=PLAIN, operations=SPLICED, inputs=(*GIVEN, "input_type_mask")),
    PromptVariant(name="splice-decay", clause="CPT-C17", config=DECAYING, operations=SPLICED, inputs=GIVEN),
    PromptVariant(
        name="splice-decay-typed", clause="CPT-C17", config=DECAYING, operations=SPLICED, inputs=("labels", "input_type_mask"), batch=4
    ),
    PromptVariant(name="splice-decay-sharper", clause="CPT-C17", config=SHARPER, operations=SPLICED, inputs=("labels", "input_type_mask")),
    PromptVariant(name="splice-bare", clause="CPT-C12", config=PLAIN, operations=SPLICED, inputs=()),
)


# ---- the prompt


def _cpt(p: PromptProblem) -> CPT:
    assert isinstance(p.method, CPT)
    return p.method


def _added(wrong: Callable[[CPT, Array, Array], Array]) -> Replay:
    """Another prompt, (rows, dim) of the method, E and D. Its gradient, which asks nothing of the projection, is right."""

    def replay(case: Case) -> Answer | None:
        p = pose_prompt(case, float64)
        if DELTA not in p.tensors:
            return None
        table = wrong(_cpt(p), p.tensors[EMBEDDING], p.tensors[DELTA])
        if np.array_equal(table, p.method.prompt(p.tensors, p.ctx)[0]):
            return None
        return {SAVED: table} if case.operation == "saved" else {"prompt": np.stack([table] * p.ctx.batch)}

    return only(prompt=replay, saved=replay)


def _within(radii: Callable[[CPT], NDArray], norm: Callable[[Array], Array] = lambda D: np.linalg.norm(D, axis=1)) -> Replay:
    """Rows of D shortened to other radii, or measured otherwise."""

    def wrong(method: CPT, E: Array, D: Array) -> Array:
        return E + D * np.minimum(1.0, radii(method) / norm(D))[:, None]

    return _added(wrong)


def _radii(method: CPT) -> NDArray:
    return np.asarray(method.radii())


def _scale(method: CPT) -> float:
    return math.sqrt(method.size("token_dim") / 2048)


def _rescaled(factor: Callable[[CPT], float]) -> Callable[[CPT], NDArray]:
    return lambda method: np.where(_radii(method) == STILL, STILL, _radii(method) * factor(method))


def _of_kinds(of: Callable[[CPT, int], float]) -> Callable[[CPT], NDArray]:
    """Radii by a token's type."""
    return lambda method: np.asarray([of(method, m) for m in method.types]) * _scale(method)


def _still(method: CPT) -> float:
    return STILL / _scale(method)


def _swapped(method: CPT, m: int) -> float:
    kinds = {2: method.opt_projection_format_epsilon, **dict.fromkeys((1, 3), method.opt_projection_epsilon)}
    return kinds.get(m % 4, _still(method)) if m > 0 else _still(method)


def _third_as_input(method: CPT, m: int) -> float:
    kinds = {1: method.opt_projection_format_epsilon, **dict.fromkeys((2, 3), method.opt_projection_epsilon)}
    return kinds.get(m % 4, _still(method)) if m > 0 else _still(method)


def _first_example_alone(method: CPT, m: int) -> float:
    kinds = {2: method.opt_projection_epsilon, **dict.fromkeys((1, 3), method.opt_projection_format_epsilon)}
    return kinds.get(m, _still(method))


def _answers_as_templates(method: CPT, m: int) -> float:
    return method.opt_projection_epsilon if m % 4 == 2 else method.opt_projection_format_epsilon


def _one_radius(method: CPT, m: int) -> float:
    return method.opt_projection_epsilon if m % 4 and m > 0 else _still(method)


def _onto(method: CPT, E: Array, D: Array) -> Array:
    return E + D * (_radii(method) / np.linalg.norm(D, axis=1))[:, None]


def _each_number(method: CPT, E: Array, D: Array) -> Array:
    e = _radii(method)[:, None]
    return E + np.clip(D, -e, e)


def _sum_shortened(method: CPT, E: Array, D: Array) -> Array:
    both = E + D
    return both * np.minimum(1.0, _radii(method) / np.linalg.norm(both, axis=1))[:, None]


# ---- the gradient


def _backward(wrong: Callable[[CPT, Array, Array], Answer]) -> Replay:
    """Another gradient, given the method, D and the gradient G of the table."""

    def backward(case: Case) -> Answer | None:
        p, right = pose_prompt(case, float64), answer(case)
        if DELTA not in p.tensors or p.dy is None:
            return None
        other = {f"0.{k}": v for k, v in wrong(_cpt(p), p.tensors[DELTA], np.sum(p.dy, axis=0)).items()}
        return {**right, **other} if any(not np.array_equal(right[k], v) for k, v in other.items()) else None

    return only(prompt_backward=backward)


def _kinds(method: CPT, kinds: tuple[int, ...]) -> NDArray:
    return np.isin(np.asarray(method.types) % 4, kinds)[:, None].astype(float)


def _through_projection(method: CPT, D: Array, G: Array) -> Answer:
    e, norm = _radii(method)[:, None], np.linalg.norm(D, axis=1, keepdims=True)
    along = np.sum(G * D, axis=1, keepdims=True) * D / norm**2
    return {DELTA: np.where(norm > e, e / norm * (G - along), G) * _kinds(method, (1, 2, 3))}


def _shortened(method: CPT, D: Array, G: Array) -> Answer:
    e, norm = _radii(method)[:, None], np.linalg.norm(D, axis=1, keepdims=True)
    return {DELTA: np.minimum(1.0, e / norm) * G * _kinds(method, (1, 2, 3))}


def _words_saved(case: Case) -> Answer | None:
    p = pose_prompt(case, float64)
    return {SAVED: p.tensors[EMBEDDING]} if DELTA in p.tensors else None


ALIKE = ("prompt-behind", "first-prompt-for-all", "mask-behind", "mask-of-zeros", "padding-seen")

SUITE = Suite(
    variants=(),
    prompts=VARIANTS,
    mistakes=(
        Mistake(
            name="not-projected",
            clause="CPT-C2",
            sentence="the trained table is added as it is, however long its rows are",
            replay=_added(lambda method, E, D: E + D),
        ),
        Mistake(
            name="words-left-out",
            clause="CPT-C1",
            sentence="the prompt is what is added to the words, without the words",
            replay=_added(lambda method, E, D: np.asarray(method.projected({EMBEDDING: E, DELTA: D})[DELTA])),
        ),
        Mistake(
            name="nothing-added",
            clause="CPT-C1",
            sentence="the prompt is the words alone",
            replay=_added(lambda method, E, D: E),
        ),
        Mistake(
            name="rows-made-longer",
            clause="CPT-C2",
            sentence="every row is brought to its radius, those inside it too",
            replay=_added(_onto),
        ),
        Mistake(
            name="every-number-clipped",
            clause="CPT-C2",
            sentence="every number is cut off at the radius instead of shortening the row",
            replay=_added(_each_number),
        ),
        Mistake(
            name="sum-projected",
            clause="CPT-C2",
            sentence="the moved word is shortened to the radius instead of its move",
            replay=_added(_sum_shortened),
        ),
        Mistake(
            name="norm-of-the-table",
            clause="CPT-C2",
            sentence="a row is measured by the norm of the whole table",
            replay=_within(_radii, lambda D: np.full(len(D), np.linalg.norm(D))),
        ),
        Mistake(
            name="norm-squared",
            clause="CPT-C2",
            sentence="a row's norm lacks its root",
            replay=_within(_radii, lambda D: np.sum(D * D, axis=1)),
        ),
        Mistake(
            name="norm-of-sizes",
            clause="CPT-C2",
            sentence="a row's norm is the sum of its numbers' sizes",
            replay=_within(_radii, lambda D: np.sum(np.abs(D), axis=1)),
        ),
        Mistake(
            name="largest-number-for-norm",
            clause="CPT-C2",
            sentence="a row's norm is its largest number",
            replay=_within(_radii, lambda D: np.max(np.abs(D), axis=1)),
        ),
        Mistake(
            name="radius-not-scaled",
            clause="CPT-C3",
            sentence="the radius is the epsilon itself, without sqrt(token_dim / 2048)",
            replay=_within(_rescaled(lambda method: 1 / _scale(method))),
        ),
        Mistake(
            name="radius-without-root",
            clause="CPT-C3",
            sentence="the radius is the epsilon times token_dim / 2048, without the root",
            replay=_within(_rescaled(_scale)),
        ),
        Mistake(
            name="epsilons-swapped",
            clause="CPT-C4",
            sentence="templates get opt_projection_epsilon and inputs opt_projection_format_epsilon",
            replay=_within(_of_kinds(_swapped)),
        ),
        Mistake(
            name="answer-template-as-input",
            clause="CPT-C4",
            sentence="the template before an answer, type 3, gets the epsilon of inputs",
            replay=_within(_of_kinds(_third_as_input)),
        ),
        Mistake(
            name="one-epsilon",
            clause="CPT-C4",
            sentence="templates and inputs both get opt_projection_epsilon",
            replay=_within(_of_kinds(_one_radius)),
        ),
        Mistake(
            name="types-not-modulo-four",
            clause="CPT-C4",
            sentence="only the types 1, 2 and 3 move, not those of the examples after the first",
            replay=_within(_of_kinds(_first_example_alone)),
        ),
        Mistake(
            name="answers-moved",
            clause="CPT-C5",
            sentence="answers, and tokens whose type is not above 0, get the epsilon of their kind, or of templates",
            replay=_within(_of_kinds(_answers_as_templates)),
        ),
        Mistake(
            name="projection-differentiated",
            clause="CPT-C7",
            sentence="the gradient goes through the projection instead of being that at the projected point",
            replay=_backward(_through_projection),
        ),
        Mistake(
            name="gradient-shortened",
            clause="CPT-C7",
            sentence="the gradient is multiplied by the factor that shortened its row",
            replay=_backward(_shortened),
        ),
        Mistake(
            name="answers-trained",
            clause="CPT-C8",
            sentence="answers have a gradient too",
            replay=_backward(lambda method, D, G: {DELTA: G}),
        ),
        Mistake(
            name="inputs-alone-trained",
            clause="CPT-C8",
            sentence="templates have no gradient, only inputs",
            replay=_backward(lambda method, D, G: {DELTA: G * _kinds(method, (2,))}),
        ),
        Mistake(
            name="untyped-held",
            clause="CPT-C8",
            sentence="a token whose type is below 0 has no gradient, whatever it is modulo 4",
            replay=_backward(lambda method, D, G: {DELTA: G * _kinds(method, (1, 2, 3)) * (np.asarray(method.types) > 0)[:, None]}),
        ),
        Mistake(
            name="words-trained",
            clause="CPT-C9",
            sentence="the words have the prompt's gradient, where they are constant",
            replay=_backward(lambda method, D, G: {EMBEDDING: G}),
        ),
        *batch_mistakes("CPT-C10"),
        Mistake(
            name="words-saved",
            clause="CPT-C11",
            sentence="the file holds the words, without what was added to them",
            replay=only(saved=_words_saved),
        ),
        *LOSS_MISTAKES,
        *(m for m in splice_mistakes() if m.name in ALIKE),
    ),
)
