"""What is got wrong about the labels of CPT and their weights in the loss. Worked out token by token, apart from the method's own code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from peft_ref.check.case import Answer, NDArray
from peft_ref.check.mistake import Mistake, Replay
from peft_ref.check.prompt_family import other_splice
from peft_ref.check.prompting import PromptProblem
from peft_ref.methods.cpt import CPT
from peft_ref.prompts import IGNORED

Shares = Callable[[list[float], NDArray], NDArray]


def _raised(m: int, types: list[int]) -> int:
    return m + max(types) if m > 0 else m


def _rank(m: int, answers: list[int]) -> int:
    """Of the answers' types, each once and in order, how many come after m."""
    return len(answers) - 1 - answers.index(m)


def _mean(weights: NDArray, judged: NDArray) -> NDArray:
    return np.asarray(weights / np.sum(judged))


@dataclass(frozen=True, kw_only=True)
class Counting:
    """How a port counts: each step as it should be, unless a mistake says otherwise."""

    raised: Callable[[int, list[int]], int] = _raised
    own_counts: Callable[[int], bool] = lambda m: m > 0 and m % 4 == 0
    given_counts: Callable[[int], bool] = lambda m: m > 0 and m % 4 == 0
    rank: Callable[[int, list[int]], int] = _rank
    share: Callable[[NDArray, NDArray], NDArray] = _mean
    ignored_weighs: bool = False
    first_judged: bool = False
    among_all: bool = False  # answers of the whole batch instead of each example
    decays: bool | None = None

    def answer(self, p: PromptProblem, right: Answer) -> Answer | None:
        method, inputs = p.method, p.inputs
        assert isinstance(method, CPT)
        if inputs is None or inputs.labels is None:
            return None
        own, ids, given = method.types, method.cpt_token_ids or [], inputs.input_type_mask
        rows = [[4] * row.size for row in inputs.labels] if given is None else given.tolist()
        types = [[*own, *(self.raised(m, own) for m in row)] for row in rows]
        labels, first = [], 0 if self.first_judged else 1
        for row, said in zip(types, inputs.labels.tolist(), strict=True):
            counts = [(self.own_counts if i < len(own) else self.given_counts)(m) for i, m in enumerate(row)]
            labels.append([label if c else IGNORED for c, label in zip(counts, [*ids, *said], strict=True)])
        answers = [sorted({m for m in row[first:] if m > 0 and m % 4 == 0}) for row in types]
        if self.among_all:
            answers = [sorted({m for row in answers for m in row})] * len(answers)
        weighs, judged = np.zeros((len(types), len(types[0]))), np.zeros((len(types), len(types[0])))
        decays = method.opt_weighted_loss_type == "decay" if self.decays is None else self.decays
        for b, row in enumerate(types):
            for t, m in list(enumerate(row))[first:]:
                judged[b, t] = (self.ignored_weighs and m in answers[b]) or labels[b][t] != IGNORED
                factor = method.opt_loss_decay_factor ** self.rank(m, answers[b]) if decays and m in answers[b] else 1.0
                weighs[b, t] = factor * judged[b, t]
        if not np.any(judged):
            return None
        return {**right, "labels": np.asarray(labels), "loss_weights": self.share(weighs, judged)}


def _counting(counting: Counting) -> Replay:
    def change(p: PromptProblem, right: Answer) -> Answer | None:
        out = counting.answer(p, right)
        same = out is None or all(np.array_equal(out[name], right[name]) for name in ("labels", "loss_weights"))
        return None if same else out

    return other_splice(change)


def _last_raised(m: int, types: list[int]) -> int:
    return m + types[-1] if m > 0 else m


def _shifted(p: PromptProblem, right: Answer) -> Answer | None:
    if "loss_weights" not in right:
        return None
    weights = right["loss_weights"]
    return {**right, "loss_weights": np.concatenate([weights[:, 1:], np.zeros_like(weights[:, :1])], axis=1)}


def _labels_shifted(p: PromptProblem, right: Answer) -> Answer | None:
    if "labels" not in right:
        return None
    labels = right["labels"]
    return {**right, "labels": np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], IGNORED)], axis=1)}


def _of_each_example(weights: NDArray, judged: NDArray) -> NDArray:
    return np.asarray(weights / np.maximum(1.0, np.sum(judged, axis=1, keepdims=True)) / len(weights))


def _mistake(name: str, clause: str, sentence: str, counting: Counting) -> Mistake:
    return Mistake(name=name, clause=clause, sentence=sentence, replay=_counting(counting))


LOSS_MISTAKES = (
    _mistake(
        "own-labels-ignored",
        "CPT-C13",
        "the prompt's tokens have no labels: -100, as before every other prompt",
        Counting(own_counts=lambda m: False),
    ),
    _mistake(
        "all-own-labels-count",
        "CPT-C13",
        "every token of the prompt is a label, templates and inputs too",
        Counting(own_counts=lambda m: True),
    ),
    _mistake(
        "types-of-the-input-unread",
        "CPT-C15",
        "every label of the input counts, whatever its type",
        Counting(given_counts=lambda m: True),
    ),
    _mistake(
        "types-not-raised",
        "CPT-C14",
        "the types of the input are not raised by the prompt's largest, so that they meet the prompt's",
        Counting(raised=lambda m, types: m),
    ),
    _mistake(
        "padding-raised",
        "CPT-C14",
        "types of 0 are raised too, and become an answer's",
        Counting(raised=lambda m, types: m + max(types)),
    ),
    _mistake(
        "raised-by-the-last",
        "CPT-C14",
        "the types of the input are raised by the prompt's last type instead of its largest",
        Counting(raised=_last_raised),
    ),
    _mistake("decay-ignored", "CPT-C17", "the loss does not decay", Counting(decays=False)),
    _mistake("decay-always", "CPT-C17", "the loss decays though opt_weighted_loss_type is none", Counting(decays=True)),
    _mistake(
        "decay-reversed",
        "CPT-C17",
        "the first answer has the weight 1 and the last decays most",
        Counting(rank=lambda m, answers: answers.index(m)),
    ),
    _mistake(
        "decay-from-one",
        "CPT-C17",
        "the last answer decays already: its weight is the factor instead of 1",
        Counting(rank=lambda m, answers: _rank(m, answers) + 1),
    ),
    _mistake(
        "decay-once",
        "CPT-C17",
        "every answer but the last has the factor once, however far back it is",
        Counting(rank=lambda m, answers: min(_rank(m, answers), 1)),
    ),
    _mistake(
        "decay-by-number",
        "CPT-C17",
        "the decay goes by how far a type is from the last in number, so that a gap in the types counts",
        Counting(rank=lambda m, answers: (answers[-1] - m) // 4),
    ),
    _mistake(
        "decay-over-the-batch",
        "CPT-C17",
        "an answer's place is counted among those of the whole batch instead of its own example",
        Counting(among_all=True),
    ),
    _mistake(
        "mean-by-weights",
        "CPT-C16",
        "the sum is divided by the sum of the weights instead of the number of labels",
        Counting(share=lambda weights, judged: weights / np.sum(weights)),
    ),
    _mistake(
        "mean-over-all-tokens",
        "CPT-C16",
        "the sum is divided by the number of all tokens instead of the labels that count",
        Counting(share=lambda weights, judged: weights / (weights.size - len(weights))),
    ),
    _mistake(
        "mean-of-examples",
        "CPT-C16",
        "the mean is taken in each example and then over the batch",
        Counting(share=_of_each_example),
    ),
    _mistake(
        "ignored-labels-weigh",
        "CPT-C16",
        "answers whose label is -100 are counted in the mean",
        Counting(ignored_weighs=True),
    ),
    _mistake(
        "first-token-judged",
        "CPT-C16",
        "the first token's label counts, though nothing comes before it that could predict it",
        Counting(first_judged=True),
    ),
    Mistake(
        name="weights-shifted",
        clause="CPT-C16",
        sentence="the weights stand where the logits are, one place before their labels",
        replay=other_splice(_shifted),
    ),
    Mistake(
        name="labels-shifted",
        clause="CPT-C13",
        sentence="the labels are moved one token to the left, which the loss does again",
        replay=other_splice(_labels_shifted),
    ),
)
