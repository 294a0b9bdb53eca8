"""What the methods of prompts get wrong alike: the gradient over the batch, and how a prompt goes before the inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check import tape
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.mistake import Mistake, Replay, only
from peft_ref.check.oracle import answer, float64
from peft_ref.check.prompting import PromptProblem, PromptVariant, pose_prompt, used
from peft_ref.prompts import IGNORED, SAVED
from peft_ref.splice import splice

SPLICED = (
    ("causal", "CAUSAL_LM"),
    ("classification", "SEQ_CLS"),
    ("tokens", "TOKEN_CLS"),
    ("answering", "QUESTION_ANS"),
    ("features", "FEATURE_EXTRACTION"),
)
# The clauses about embeddings. Those of the cache are prefix tuning's own.
CLAUSES = {
    "embeddings": "PROMPTTUNING-C6",
    "mask": "PROMPTTUNING-C8",
    "labels": "PROMPTTUNING-C9",
    "types": "PROMPTTUNING-C11",
}


def splice_variants(config: Mapping[str, Any], clause: str) -> tuple[PromptVariant, ...]:
    """How a prompt of this configuration goes before the inputs of every task, and before inputs that are embeddings alone."""
    return (
        *(
            PromptVariant(name=f"splice-{name}", clause=clause, config=config, operations=("splice",), task_type=task)
            for name, task in SPLICED
        ),
        PromptVariant(name="splice-bare", clause=clause, config=config, operations=("splice",), inputs=()),
        PromptVariant(
            name="splice-encoder-decoder",
            clause=clause,
            config={**config, "num_transformer_submodules": 2},
            operations=("splice",),
            task_type="SEQ_2_SEQ_LM",
            inputs=("attention_mask", "labels"),
        ),
    )


def other_prompt(
    prompt: Callable[[PromptProblem], Array], shows: Callable[[PromptProblem], bool] = lambda p: True, in_file: bool = True
) -> Replay:
    """A wrong prompt, where it is another one than the right one; its gradient is autograd's.

    `in_file` where a file holds what the method makes of its tensors, and so the wrong prompt; else it holds the tensors as they are.
    """

    def replay(case: Case) -> Answer | None:
        if case.operation == "splice" or (case.operation == "saved" and not in_file):
            return None
        p = pose_prompt(case, float64)
        if not shows(p):
            return None
        if case.operation == "prompt":
            return used(p.method, prompt(p))
        if case.operation == "saved":
            return {**answer(case), SAVED: prompt(p)[0, ...]}
        return autograd(case, as_used(prompt))

    return replay


def as_used(prompt: Callable[[PromptProblem], Array]) -> Callable[[PromptProblem], Array]:
    """A wrong prompt in the shape in which a model takes it."""

    def one(p: PromptProblem) -> Array:
        (array,) = used(p.method, prompt(p)).values()
        return array

    return one


def autograd(case: Case, prompt: Callable[[PromptProblem], Array]) -> Answer:
    """What an autograd engine returns for a wrong prompt, given as a model takes it."""
    p = pose_prompt(case, tape.tape_array)
    assert case.dy is not None
    tape.backward(prompt(p), case.dy)
    return {f"0.{name}": tape.gradients(value) for name, value in p.tensors.items()}


def other_splice(change: Callable[[PromptProblem, Answer], Answer | None]) -> Replay:
    """A wrong way to put a prompt before the inputs, given the right one. None where it does not show."""
    return only(splice=lambda case: change(pose_prompt(case, float64), answer(case)))


def _behind(array: NDArray, n: int) -> NDArray:
    """The first n along the second axis, put at the end."""
    return np.concatenate([array[:, n:], array[:, :n]], axis=1)


def _moved_behind(*names: str) -> Callable[[PromptProblem, Answer], Answer | None]:
    def change(p: PromptProblem, right: Answer) -> Answer | None:
        n = p.method.size("num_virtual_tokens")
        longer = {name for name in names if name in right and _longer(p, right, name)}
        return {k: _behind(v, n) if k in longer else v for k, v in right.items()} if longer else None

    return change


def _filled(name: str, value: int, *others: str) -> Callable[[PromptProblem, Answer], Answer | None]:
    """Another number in front than the right one."""

    def change(p: PromptProblem, right: Answer) -> Answer | None:
        n = p.method.size("num_virtual_tokens")
        longer = [k for k in (name, *others) if k in right and _longer(p, right, k)]
        wrong = {k: np.concatenate([np.full_like(right[k][:, :n], value), right[k][:, n:]], axis=1) for k in longer}
        return {**right, **wrong} if wrong else None

    return change


def _all_seen(p: PromptProblem, right: Answer) -> Answer | None:
    masks: Answer = {k: np.ones_like(right[k]) for k in ("attention_mask", "decoder_attention_mask") if k in right}
    return {**right, **masks} if masks else None


def _labels_shifted(p: PromptProblem, right: Answer) -> Answer | None:
    """Label t at t - 1, as the loss of a causal model does it."""
    if "labels" not in right or not _longer(p, right, "labels"):
        return None
    labels = right["labels"]
    return {**right, "labels": np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], IGNORED)], axis=1)}


def _first_prompt(p: PromptProblem, right: Answer) -> Answer:
    """Every example gets the first one's prompt."""
    assert p.prompt is not None
    assert p.inputs is not None
    alike = np.broadcast_to(p.prompt[:1], p.prompt.shape)
    return {k: np.asarray(v) for k, v in splice(p.method, alike, p.inputs, p.task_type)._asdict().items() if v is not None}


def _longer(p: PromptProblem, right: Answer, name: str) -> bool:
    """Whether something was put in front of it."""
    given = getattr(p.inputs, name)
    return given is not None and bool(right[name].shape[1] > given.shape[1])


def _first_example(case: Case) -> Answer:
    """The gradient of the first example alone."""
    assert case.dy is not None
    axis = 2 if case.dy.ndim == 6 else 0
    first = np.take(case.dy, [0], axis=axis)
    padded = np.concatenate([first, np.zeros_like(np.delete(case.dy, 0, axis=axis))], axis=axis)
    return answer(replace(case, dy=padded))


def _averaged(case: Case) -> Answer:
    return {name: value / case.question["batch"] for name, value in answer(case).items()}


def batch_mistakes(clause: str) -> tuple[Mistake, ...]:
    return (
        Mistake(
            name="gradient-averaged",
            clause=clause,
            sentence="the gradients are the mean over the batch instead of the sum",
            replay=only(prompt_backward=_averaged),
        ),
        Mistake(
            name="gradient-of-first-example",
            clause=clause,
            sentence="only the first example's gradient reaches the prompt",
            replay=only(prompt_backward=_first_example),
        ),
    )


def splice_mistakes(clauses: Mapping[str, str] = CLAUSES) -> tuple[Mistake, ...]:
    """`clauses` names, for embeddings, mask, labels and types, what is broken."""
    return (
        Mistake(
            name="prompt-behind",
            clause=clauses["embeddings"],
            sentence="the prompt is put behind the input's embeddings instead of before them",
            replay=other_splice(_moved_behind("embeddings", "decoder_embeddings")),
        ),
        Mistake(
            name="everything-behind",
            clause=clauses["embeddings"],
            sentence="the prompt, and with it ones, ignored labels and types, is put behind the input instead of before it",
            replay=other_splice(
                _moved_behind("embeddings", "decoder_embeddings", "attention_mask", "decoder_attention_mask", "labels", "token_type_ids")
            ),
        ),
        Mistake(
            name="first-prompt-for-all",
            clause=clauses["embeddings"],
            sentence="every example gets the first one's prompt",
            replay=other_splice(_first_prompt),
        ),
        Mistake(
            name="mask-behind",
            clause=clauses["mask"],
            sentence="the attention mask is made longer at its end instead of its beginning",
            replay=other_splice(_moved_behind("attention_mask", "decoder_attention_mask")),
        ),
        Mistake(
            name="mask-of-zeros",
            clause=clauses["mask"],
            sentence="the attention mask has zeros for the virtual tokens, so nothing sees them",
            replay=other_splice(_filled("attention_mask", 0, "decoder_attention_mask")),
        ),
        Mistake(
            name="padding-seen",
            clause=clauses["mask"],
            sentence="the attention mask is made anew, ones everywhere, and the input's own zeros are lost",
            replay=other_splice(_all_seen),
        ),
        Mistake(
            name="labels-behind",
            clause=clauses["labels"],
            sentence="-100 is put behind the labels instead of before them",
            replay=other_splice(_moved_behind("labels")),
        ),
        Mistake(
            name="labels-zero",
            clause=clauses["labels"],
            sentence="the labels of virtual tokens are 0, a token that the loss counts, instead of -100",
            replay=other_splice(_filled("labels", 0)),
        ),
        Mistake(
            name="labels-minus-one",
            clause=clauses["labels"],
            sentence="the labels of virtual tokens are -1, which the loss does not ignore, instead of -100",
            replay=other_splice(_filled("labels", -1)),
        ),
        Mistake(
            name="labels-shifted",
            clause=clauses["labels"],
            sentence="the labels are moved one token to the left, which the model's own loss does again",
            replay=other_splice(_labels_shifted),
        ),
        Mistake(
            name="token-types-one",
            clause=clauses["types"],
            sentence="virtual tokens are of token type 1 instead of 0",
            replay=other_splice(_filled("token_type_ids", 1)),
        ),
        Mistake(
            name="token-types-behind",
            clause=clauses["types"],
            sentence="the token types are made longer at their end instead of their beginning",
            replay=other_splice(_moved_behind("token_type_ids")),
        ),
    )
