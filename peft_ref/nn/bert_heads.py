"""BERT's classes: the encoder alone, and with each of its heads.

    class                            head                                              loss
    BertModel                        none; hidden and pooled                           none
    BertForSequenceClassification    classifier(pooled)                                by problem_type, see peft_ref/nn/loss.py
    BertForTokenClassification       classifier(y) of every token                      cross-entropy
    BertForQuestionAnswering         qa_outputs(y): a score to be the answer's         the mean of two cross-entropies over the tokens
                                     first token, and one to be its last
    BertForMaskedLM                  decoder(layer_norm(f(dense(y)))),                 cross-entropy
                                     decoder's weight may be the word table

HF      the classes of these names. HF writes the problem_type that it infers into the model's config, and keeps to it when other labels
        come; here it is inferred each time. Question answering's start_logits and end_logits are logits[..., 0] and logits[..., 1].
        PEFT refuses prefix tuning for all but BertModel (FEATURE_EXTRACTION).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from peft_ref.arrays import Array, namespace
from peft_ref.errors import ConfigError
from peft_ref.nn.bert import Bert
from peft_ref.nn.functions import activation
from peft_ref.nn.loss import (
    PROBLEM_TYPES,
    classification_loss,
    classification_loss_vjp,
    cross_entropy,
    cross_entropy_vjp,
    problem_type_of,
    span_loss,
    span_loss_vjp,
)
from peft_ref.nn.model import Inputs, Part
from peft_ref.nn.net import Gradients, Net


@final
@dataclass(frozen=True, kw_only=True)
class BertModel(Bert):
    root = ""
    embedding = "embeddings.word_embeddings"
    pools = True
    takes_past = True

    def head_parts(self) -> Mapping[str, Part]:
        return {}

    def ties(self) -> Mapping[str, str]:
        return {}

    @property
    def output_head(self) -> None:
        return None

    def head(self, net: Net, x: Array) -> None:
        return None

    def head_vjp(self, net: Net, x: Array, dy: Array) -> tuple[Array, Gradients]:
        return namespace(x).zeros_like(x), Gradients()

    def loss(self, logits: Array | None, inputs: Inputs) -> None:
        if inputs.labels is not None:
            raise ConfigError("BertModel has no loss, and the inputs have labels.\n  Take one of its classes with a head.")

    def loss_vjp(self, logits: Array | None, inputs: Inputs, dloss: Array | float) -> Array:
        raise ConfigError("BertModel has no loss.")


@dataclass(frozen=True, kw_only=True)
class LinearHead(Bert):
    """A BERT whose logits are one linear map of `pooled`, or of every token's y."""

    num_labels: int = 2

    head_name: ClassVar[str]
    drops: ClassVar[bool] = True  # whether a dropout stands before the head

    @final
    def head_parts(self) -> Mapping[str, Part]:
        before = {"dropout": Part("Dropout")} if self.drops else {}
        return {**before, self.head_name: self.linear(self.hidden_size, self.num_labels)}

    @final
    def ties(self) -> Mapping[str, str]:
        return {}

    @final
    @property
    def output_head(self) -> None:
        return None

    @final
    def head(self, net: Net, x: Array) -> Array:
        return net.apply(self.head_name, x)

    @final
    def head_vjp(self, net: Net, x: Array, dy: Array) -> tuple[Array, Gradients]:
        return net.vjp(self.head_name, x, dy)


@final
@dataclass(frozen=True, kw_only=True)
class BertForSequenceClassification(LinearHead):
    problem_type: str | None = None  # one of loss.PROBLEM_TYPES; without, it is inferred from the labels

    pools = True
    head_name = "classifier"

    def __post_init__(self) -> None:
        Bert.__post_init__(self)
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            raise ConfigError(f"problem_type={self.problem_type!r} is not known.\n  There are {', '.join(PROBLEM_TYPES)}.")

    def loss(self, logits: Array, inputs: Inputs) -> Array | None:
        if inputs.labels is None:
            return None
        return classification_loss(logits, inputs.labels, self.problem_type or problem_type_of(logits, inputs.labels))

    def loss_vjp(self, logits: Array, inputs: Inputs, dloss: Array | float) -> Array:
        return classification_loss_vjp(logits, inputs.labels, self.problem_type or problem_type_of(logits, inputs.labels), dloss)


@final
@dataclass(frozen=True, kw_only=True)
class BertForTokenClassification(LinearHead):
    pools = False
    head_name = "classifier"

    def loss(self, logits: Array, inputs: Inputs) -> Array | None:
        return None if inputs.labels is None else cross_entropy(logits, inputs.labels)

    def loss_vjp(self, logits: Array, inputs: Inputs, dloss: Array | float) -> Array:
        return cross_entropy_vjp(logits, inputs.labels, dloss)


@final
@dataclass(frozen=True, kw_only=True)
class BertForQuestionAnswering(LinearHead):
    pools = False
    head_name = "qa_outputs"
    drops = False

    def __post_init__(self) -> None:
        Bert.__post_init__(self)
        if self.num_labels != 2:
            raise ConfigError(f"num_labels={self.num_labels}: an answer has a first token and a last, so 2 scores.")

    def loss(self, logits: Array, inputs: Inputs) -> Array | None:
        if inputs.start_positions is None or inputs.end_positions is None:
            return None
        return span_loss(logits, inputs.start_positions, inputs.end_positions)

    def loss_vjp(self, logits: Array, inputs: Inputs, dloss: Array | float) -> Array:
        return span_loss_vjp(logits, inputs.start_positions, inputs.end_positions, dloss)


@final
@dataclass(frozen=True, kw_only=True)
class BertForMaskedLM(Bert):
    pools = False

    def head_parts(self) -> Mapping[str, Part]:
        at = "cls.predictions"
        return {
            "cls": Part("BertOnlyMLMHead"),
            at: Part("BertLMPredictionHead", own={"bias": (self.vocab_size,)}),
            f"{at}.transform": Part("BertPredictionHeadTransform"),
            f"{at}.transform.dense": self.linear(self.hidden_size, self.hidden_size),
            f"{at}.transform.transform_act_fn": Part(activation(self.hidden_act).class_name),
            f"{at}.transform.LayerNorm": self.norm_part,
            f"{at}.decoder": self.linear(self.hidden_size, self.vocab_size),
        }

    def ties(self) -> Mapping[str, str]:
        if not self.tie_word_embeddings:
            return {}
        at = "cls.predictions"
        return {f"{at}.decoder.weight": f"{self.embedding}.weight", f"{at}.decoder.bias": f"{at}.bias"}

    @property
    def output_head(self) -> str:
        return "cls.predictions.decoder"

    def head(self, net: Net, x: Array) -> Array:
        h = activation(self.hidden_act).f(net.apply("cls.predictions.transform.dense", x))
        return net.apply("cls.predictions.decoder", net.apply("cls.predictions.transform.LayerNorm", h))

    def head_vjp(self, net: Net, x: Array, dy: Array) -> tuple[Array, Gradients]:
        at, act = "cls.predictions.transform", activation(self.hidden_act)
        z = net.apply(f"{at}.dense", x)
        dn, of_decoder = net.vjp("cls.predictions.decoder", net.apply(f"{at}.LayerNorm", act.f(z)), dy)
        dh, of_norm = net.vjp(f"{at}.LayerNorm", act.f(z), dn)
        dx, of_dense = net.vjp(f"{at}.dense", x, act.vjp(z, dh))
        return dx, of_decoder + of_norm + of_dense

    def loss(self, logits: Array, inputs: Inputs) -> Array | None:
        return None if inputs.labels is None else cross_entropy(logits, inputs.labels)

    def loss_vjp(self, logits: Array, inputs: Inputs, dloss: Array | float) -> Array:
        return cross_entropy_vjp(logits, inputs.labels, dloss)
