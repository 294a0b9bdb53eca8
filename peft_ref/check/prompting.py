"""Operations about prompts: what is asked, and the right answers.

    prompt            tensors, batch, task_ids  -> the prompt, or for a prefix the keys and values of every layer
    prompt_backward   the same and dy           -> the gradient of sum(prompt * dy) for every tensor
    saved             tensors                   -> what a file holds
    splice            a prompt, inputs          -> what the model receives

`PromptVariant` says what is asked of a method. Sizes all differ, as on layers, and none is 1 but where a variant asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check.case import PROMPT_OPERATIONS, Case, CaseAdapter, NDArray, build_prompt, config_of
from peft_ref.check.variants import NUMBERS, generator, mask_of
from peft_ref.prompts import IGNORED, Context, Prompt, Tensors
from peft_ref.splice import SEQ_2_SEQ, Inputs, key_values, key_values_vjp, splice

RUN = ("prompt", "prompt_backward", "saved")
BATCH, TOKENS, DECODER_TOKENS = 2, 4, 3
# What a question about splicing brings beside the embeddings; a decoder's only where there is one.
INTEGERS = ("attention_mask", "labels", "position_ids", "token_type_ids")
TYPES = (0, 1, 4, 8, 12)  # what an input_type_mask is drawn from: padding, a template, answers


@dataclass(frozen=True, kw_only=True)
class PromptVariant:
    """One configuration of a method of prompts, and how it is asked. `task_type` and `inputs` are for splicing."""

    name: str
    clause: str
    config: Mapping[str, Any]
    operations: tuple[str, ...] = RUN
    numbers: str = "dyadic"
    batch: int = BATCH
    task_ids: tuple[int, ...] | None = None
    dropout: bool = False
    task_type: str = "CAUSAL_LM"
    inputs: tuple[str, ...] = INTEGERS


class PromptProblem(NamedTuple):
    """A case with its arrays lifted and its method built."""

    method: Prompt
    tensors: Tensors
    ctx: Context
    dy: Array | None
    prompt: Array | None
    inputs: Inputs | None
    task_type: str


def pose_prompt(case: Case, lift: Any) -> PromptProblem:
    own, question = case.adapters[0], case.question
    method = build_prompt(case.method, own.config)
    tensors = {name: lift(value) for name, value in own.tensors.items()}
    ids = question.get("task_ids")
    ctx = Context(question.get("batch", 1), None if ids is None else lift(ids), tuple(lift(mask) for mask in question.get("dropout", ())))
    given = {name: lift(value) for name, value in question.get("inputs", {}).items() if value is not None}
    return PromptProblem(
        method,
        method.check(tensors) if tensors else tensors,
        ctx,
        None if case.dy is None else lift(case.dy),
        lift(question["prompt"]) if "prompt" in question else None,
        Inputs(**given) if given else None,
        question.get("task_type", ""),
    )


def solve_prompt(problem: PromptProblem, operation: str) -> dict[str, Array]:
    """The arrays that `operation` asks for, by name."""
    method, tensors, ctx, dy, prompt, inputs, task_type = problem
    if operation == "prompt":
        return used(method, method.prompt(tensors, ctx))
    if operation == "prompt_backward":
        if method.place == "cache":
            dy = key_values_vjp(method, method.prompt(tensors, ctx), dy)
        return {f"0.{name}": value for name, value in method.prompt_vjp(tensors, ctx, dy).items()}
    if operation == "saved":
        return dict(method.saved(tensors))
    if operation == "splice" and inputs is not None:
        received = splice(method, prompt, inputs, task_type)
        return {name: value for name, value in received._asdict().items() if value is not None}
    raise ValueError(f"no arrays of a prompt answer the operation {operation!r}")


def used(method: Prompt, prompt: Array) -> dict[str, Array]:
    """A prompt under the name and in the shape in which a model takes it."""
    return {"past_key_values": key_values(method, prompt)} if method.place == "cache" else {"prompt": prompt}


def prompt_cases(name: str, variants: Sequence[PromptVariant]) -> Iterator[Case]:
    for variant in variants:
        unknown = set(variant.operations) - set(PROMPT_OPERATIONS)
        assert not unknown, f"{name}.{variant.name}: {unknown}"
        for operation in variant.operations:
            yield make_prompt_case(name, variant, operation)


def make_prompt_case(name: str, variant: PromptVariant, operation: str) -> Case:
    """The case of one variant. All operations of it share their numbers; only what they are asked differs."""
    where = f"{name}.{variant.name}"
    rng, draw = generator(where), NUMBERS[variant.numbers]
    method = build_prompt(name, variant.config)
    tensors = {key: draw(rng, shape) for key, shape in method.shapes().items()}
    question: dict[str, Any] = {}
    dy = None
    if operation == "splice":
        tensors = {}
        question = {"task_type": variant.task_type, **_spliced(rng, draw, method, variant)}
    elif operation != "saved":
        question = {"batch": variant.batch}
        if variant.task_ids is not None:
            question["task_ids"] = np.asarray(variant.task_ids)
        if variant.dropout:
            question["dropout"] = np.stack([mask_of(rng, shape) for shape in _between_layers(method)])
        if operation == "prompt_backward":
            answer = used(method, np.zeros((variant.batch, *method.table_shape)))
            dy = draw(rng, next(iter(answer.values())).shape)
    return Case(
        id=f"{where}.{operation}",
        method=name,
        operation=operation,
        clause=variant.clause,
        adapters=(CaseAdapter(config=config_of(method), tensors=tensors),),
        dy=dy,
        question=question,
    )


def _spliced(rng: np.random.Generator, draw: Any, method: Prompt, variant: PromptVariant) -> dict[str, Any]:
    batch, width = variant.batch, method.size("token_dim")

    def integers(name: str, tokens: int) -> NDArray:
        if name == "position_ids":
            return np.broadcast_to(np.arange(tokens) + 1, (batch, tokens)).copy()
        if name == "input_type_mask":
            return rng.choice(TYPES, (batch, tokens))
        return rng.integers(3, 20, (batch, tokens)) if name == "labels" else mask_of(rng, (batch, tokens))

    decoder = variant.task_type == SEQ_2_SEQ
    inputs: dict[str, NDArray] = {"embeddings": draw(rng, (batch, TOKENS, width))}
    for name in variant.inputs:
        inputs[name] = integers(name, DECODER_TOKENS if decoder and name == "labels" else TOKENS)
    if "input_type_mask" in inputs:  # a label that counts for nothing, though its type might let it
        inputs["labels"] = np.concatenate([inputs["labels"][:, :1], np.full((batch, 1), IGNORED), inputs["labels"][:, 2:]], axis=1)
    if decoder:
        inputs["decoder_embeddings"] = draw(rng, (batch, DECODER_TOKENS, width))
        inputs["decoder_attention_mask"] = integers("attention_mask", DECODER_TOKENS)
    return {"prompt": draw(rng, (batch, *method.table_shape)), "inputs": inputs}


def _between_layers(method: Prompt) -> list[tuple[int, int]]:
    """The shapes of the masks between the layers of an encoder."""
    hidden, layers = method.size("encoder_hidden_size"), method.size("encoder_num_layers")
    return [(method.table_shape[0], 2 * hidden)] * (layers - 1)
