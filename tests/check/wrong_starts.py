"""Wrong starts: what is done to a right draw, on which case, and the name that the judge must give it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from peft_ref.check.case import Case
from peft_ref.methods import METHODS
from tests.methods import facts
from tests.methods.wrong import Draw, Host, Wrong, fan_in, key_with, replaced


def rank(case: Case) -> int:
    return int(case.adapters[0].config["r"])


def base_kept(case: Case, draw: Draw, rng: np.random.Generator) -> Draw:
    assert case.weight is not None
    return {**draw, "weight": case.weight}


def no_base_sent(case: Case, draw: Draw, rng: np.random.Generator) -> Draw:
    return {k: v for k, v in draw.items() if k != "weight"}


def swapped(case: Case, draw: Draw, rng: np.random.Generator) -> Draw:
    a, b = key_with(draw, "_A"), key_with(draw, "_B")
    return {**draw, a: rng.normal(size=draw[a].shape), b: np.zeros_like(draw[b])}


def singular_values_in_B(case: Case, draw: Draw, rng: np.random.Generator) -> Draw:
    a, b = key_with(draw, "_A"), key_with(draw, "_B")
    root = np.linalg.norm(draw[a], axis=1)
    return {**draw, a: draw[a] / root[:, None], b: draw[b] * root}


def scale_not_taken_out(case: Case, draw: Draw, rng: np.random.Generator) -> Draw:
    """B A is the best part of W, instead of s B A."""
    s = case.adapters[0].config["lora_alpha"] / rank(case)
    a, b = key_with(draw, "_A"), key_with(draw, "_B")
    return {**draw, a: draw[a] * math.sqrt(s), b: draw[b] * math.sqrt(s)}


def orthogonal_apart(case: Case, draw: Draw, rng: np.random.Generator) -> Draw:
    """A and B each orthogonal, and not to each other."""
    a, b = key_with(draw, "_A"), key_with(draw, "_B")
    return {**draw, a: np.linalg.qr(rng.normal(size=draw[a].shape[::-1]))[0].T, b: np.linalg.qr(rng.normal(size=draw[b].shape))[0]}


def norm_of_columns(case: Case, v: Host, rng: np.random.Generator) -> Host:
    return np.full_like(v, np.linalg.norm(np.asarray(case.weight)))


def words_at(pick: Callable[[Case, np.random.Generator], Any]) -> Wrong:
    """The words of these ids as the first rows."""

    def wrong(case: Case, draw: Draw, rng: np.random.Generator) -> Draw:
        return {**draw, "embedding.weight": case.question["words"][np.asarray(pick(case, rng))]}

    return wrong


def padded_with_zeros(case: Case, v: Host, rng: np.random.Generator) -> Host:
    return np.concatenate([v[:2], v[2:] * 0])


WRONG: dict[str, tuple[str, Wrong, str]] = {
    "A zero": ("lora.linear.init-default", replaced("_A", lambda c, v, rng: v * 0), "init-A-zero"),
    "B random": ("lora.linear.init-default", replaced("_B", lambda c, v, rng: rng.normal(size=v.shape)), "init-B-random"),
    "A normal with deviation 1/r": (
        "lora.linear.init-default",
        replaced("_A", lambda c, v, rng: rng.normal(0, 1 / rank(c), v.shape)),
        "init-wrong",
    ),
    "A with torch's plain kaiming bound, sqrt(6 / fan in)": (
        "lora.linear.init-default",
        replaced("_A", lambda c, v, rng: rng.uniform(-1, 1, v.shape) * math.sqrt(6 / fan_in(c))),
        "init-wrong-bound",
    ),
    "A too wide by sqrt 3": ("lora.linear.init-default", replaced("_A", lambda c, v, rng: v * math.sqrt(3)), "init-wrong-bound"),
    "A too narrow by sqrt 3": ("lora.linear.init-default", replaced("_A", lambda c, v, rng: v / math.sqrt(3)), "init-wrong-law"),
    "A never negative": ("lora.linear.init-default", replaced("_A", lambda c, v, rng: np.abs(v)), "init-wrong-law"),
    "A by the fan out": (
        "lora.linear.init-default",
        replaced("_A", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(rank(c))),
        "init-wrong-bound",
    ),
    "A of a convolution without its kernel": (
        "lora.conv2d.init-default",
        replaced("_A", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(v.shape[1])),
        "init-wrong-bound",
    ),
    "A of groups by one group's inputs": (
        "lora.conv2d-groups.init-default",
        replaced("_A", lambda c, v, rng: v * math.sqrt(2)),
        "init-wrong-bound",
    ),
    "gaussian with deviation 1": (
        "lora.linear.init-gaussian",
        replaced("_A", lambda c, v, rng: rng.normal(size=v.shape)),
        "init-wrong-law",
    ),
    "gaussian with deviation 1/sqrt r": (
        "lora.linear.init-gaussian",
        replaced("_A", lambda c, v, rng: rng.normal(0, rank(c) ** -0.5, v.shape)),
        "init-wrong-law",
    ),
    "gaussian ignored": (
        "lora.linear.init-gaussian",
        replaced("_A", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(fan_in(c))),
        "init-wrong-law",
    ),
    "gaussian is zero": ("lora.linear.init-gaussian", replaced("_A", lambda c, v, rng: v * 0), "init-zero"),
    "False ignored, B zero": ("lora.linear.init-false", replaced("_B", lambda c, v, rng: v * 0), "zero"),
    "lora_bias random": (
        "lora.linear.init-default-bias",
        replaced("B.bias", lambda c, v, rng: rng.normal(size=v.shape)),
        "init-bias-random",
    ),
    "embedding roles swapped": ("lora.embedding.init-default", swapped, "embedding-init-swapped"),
    "embedding B as narrow as a linear's": (
        "lora.embedding.init-default",
        replaced("_B", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / 2),
        "init-wrong-law",
    ),
    "pissa without the base changed": ("lora.linear.init-pissa", base_kept, "init-pissa-base-kept"),
    "pissa without the base sent": ("lora.linear.init-pissa", no_base_sent, "init-pissa-base-kept"),
    "pissa without the scale": ("lora.linear.init-pissa", scale_not_taken_out, "init-pissa"),
    "pissa with all of S in B": ("lora.linear.init-pissa", singular_values_in_B, "init-pissa"),
    "olora without the base changed": ("lora.linear.init-olora", base_kept, "init-olora-base-kept"),
    "olora with a wrong Q": ("lora.linear.init-olora", replaced("_B", lambda c, v, rng: v * 2), "init-olora"),
    "orthogonal with B A not zero": ("lora.linear.init-orthogonal", orthogonal_apart, "init-orthogonal"),
    "orthogonal with B zero": ("lora.linear.init-orthogonal", replaced("_B", lambda c, v, rng: v * 0), "init-orthogonal"),
    "magnitude of ones": ("dora.linear.init-default", replaced("magnitude", lambda c, v, rng: np.ones_like(v)), "init-magnitude"),
    "one magnitude for all": ("dora.linear.init-default", replaced("magnitude", norm_of_columns), "init-magnitude"),
    "magnitude of squares": ("dora.conv1d.init-default", replaced("magnitude", lambda c, v, rng: v * v), "init-magnitude"),
    "magnitude of a table, ones": (
        "dora.embedding.init-default",
        replaced("magnitude", lambda c, v, rng: np.ones_like(v)),
        "init-magnitude",
    ),
    "AdaLoRA's E like A and B": (
        "adalora.linear.init-default",
        replaced("_E", lambda c, v, rng: rng.normal(0, 0.02, v.shape)),
        "init-E-random",
    ),
    "AdaLoRA's E of ones": ("adalora.conv2d.init-default", replaced("_E", lambda c, v, rng: np.ones_like(v)), "init-E-random"),
    "AdaLoRA's B zero, as LoRA's": ("adalora.linear.init-default", replaced("_B", lambda c, v, rng: v * 0), "init-zero"),
    "AdaLoRA's A uniform, as LoRA's": (
        "adalora.linear.init-default",
        replaced("_A", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(fan_in(c))),
        "init-wrong-law",
    ),
    "AdaLoRA's False ignored": (
        "adalora.linear.init-false",
        replaced("_A", lambda c, v, rng: rng.normal(0, 0.02, v.shape)),
        "init-wrong-law",
    ),
    "LoHa's w2_b random": ("loha.linear.init-default", replaced("w2_b", lambda c, v, rng: rng.normal(size=v.shape)), "init-not-identity"),
    "LoHa's w1_a as LyCORIS draws it": (
        "loha.linear.init-default",
        replaced("w1_a", lambda c, v, rng: rng.normal(0, 0.1, v.shape)),
        "init-wrong-law",
    ),
    "adaption prompt zero": ("adaption_prompt.init-3", replaced("_prompt", lambda c, v, rng: v * 0), "init-zero"),
    "adaption prompt as a transformer draws it": (
        "adaption_prompt.init-5",
        replaced("_prompt", lambda c, v, rng: v * 0.02),
        "init-wrong-law",
    ),
    "adaption gate open": ("adaption_prompt.init-3", replaced("_gate", lambda c, v, rng: v + 1), "init-gate-open"),
    "adaption gate drawn": ("adaption_prompt.init-5", replaced("_gate", lambda c, v, rng: rng.normal(size=1)), "init-gate-open"),
    "prompt zero": ("prompt_tuning.init-random", replaced("embedding", lambda c, v, rng: v * 0), "init-zero"),
    "prompt as a transformer draws it": (
        "prompt_tuning.init-random",
        replaced("embedding", lambda c, v, rng: v * 0.02),
        "init-wrong-law",
    ),
    "prompt uniform with deviation 1": (
        "multitask_prompt_tuning.init-random",
        replaced("embedding", lambda c, v, rng: rng.uniform(-1, 1, v.shape) * math.sqrt(3)),
        "init-wrong-law",
    ),
    "vocabulary's init ignored": (
        "prompt_tuning.init-vocabulary",
        replaced("embedding", lambda c, v, rng: rng.normal(size=v.shape)),
        "init-no-word",
    ),
    "words averaged": ("prompt_tuning.init-vocabulary", replaced("embedding", lambda c, v, rng: v * 0 + np.mean(v)), "init-no-word"),
    "the first words of the vocabulary": ("prompt_tuning.init-vocabulary", words_at(lambda c, rng: range(3)), "init-words-unlike"),
    "never the last word": ("prompt_tuning.init-two-sides", words_at(lambda c, rng: rng.integers(0, 8, 6)), "init-words-unlike"),
    "rather the first words": (
        "prompt_tuning.init-two-sides",
        words_at(lambda c, rng: np.floor(9 * rng.uniform(size=6) ** 3).astype(int)),
        "init-words-unlike",
    ),
    "no word twice": ("prompt_tuning.init-two-sides", words_at(lambda c, rng: rng.permutation(9)[:6]), "init-words-once"),
    "text filled up with its last word": ("prompt_tuning.init-text-short", words_at(lambda c, rng: (5, 2, 2)), "init-text-not-repeated"),
    "text filled up with zeros": ("prompt_tuning.init-text-short", replaced("embedding", padded_with_zeros), "init-text-not-repeated"),
    "text repeated word by word": (
        "multitask_prompt_tuning.init-text-short",
        words_at(lambda c, rng: (5, 5, 2)),
        "init-text-words-repeated",
    ),
    "text cut in front": ("prompt_tuning.init-text-long", words_at(lambda c, rng: (5, 8, 2)), "init-text-cut-in-front"),
    "text by places": ("prompt_tuning.init-text-long", words_at(lambda c, rng: (0, 1, 2)), "init-text-as-positions"),
    "text reversed": ("prompt_tuning.init-text-long", words_at(lambda c, rng: (5, 1, 7)), "init-text: "),
    "text's init ignored": (
        "prompt_tuning.init-text-short",
        replaced("embedding", lambda c, v, rng: rng.normal(size=v.shape)),
        "init-text: ",
    ),
    "text for U": ("multitask_prompt_tuning.init-text-long", replaced("task_cols", lambda c, v, rng: v / 0.02), "init-wrong-law"),
    "U with deviation 1": ("multitask_prompt_tuning.init-random", replaced("task_cols", lambda c, v, rng: v / 0.02), "init-wrong-law"),
    "V zero, as in LoRA": ("multitask_prompt_tuning.init-random", replaced("task_rows", lambda c, v, rng: v * 0), "init-zero"),
    "U and V so that the prompt is P": (
        "multitask_prompt_tuning.init-vocabulary",
        replaced("task_rows", lambda c, v, rng: v * 0 + 1),
        "init-wrong-law",
    ),
    "source ignored": (
        "multitask_prompt_tuning.init-source-only-source-shared",
        replaced("embedding", lambda c, v, rng: rng.normal(size=v.shape)),
        "init-source-ignored",
    ),
    "source's tasks taken too": (
        "multitask_prompt_tuning.init-source-only-source-shared",
        replaced("task_cols", lambda c, v, rng: c.question["source"]["prefix_task_cols"][1:2]),
        "init-wrong-law",
    ),
    "the source's first task": (
        "multitask_prompt_tuning.init-source-exact-source-task",
        replaced("task_rows", lambda c, v, rng: c.question["source"]["prefix_task_rows"][:1]),
        "init-source-task",
    ),
    "the source's tasks summed": (
        "multitask_prompt_tuning.init-source-average-source-tasks",
        replaced("task_cols", lambda c, v, rng: v * 3),
        "init-source-not-averaged",
    ),
    "the mean of the source's prompts": (
        "multitask_prompt_tuning.init-source-average-source-tasks",
        replaced("embedding", lambda c, v, rng: v / 3),
        "init-source-ignored",
    ),
    "prefix zero unasked": ("prefix_tuning.init-random", replaced("embedding", lambda c, v, rng: v * 0), "init-zero"),
    "prefix random where zero was asked": (
        "prefix_tuning.init-zero",
        replaced("embedding", lambda c, v, rng: rng.normal(size=v.shape)),
        "init-weights-ignored",
    ),
    "projection random where zero was asked": (
        "prefix_tuning.init-projected-zero",
        replaced("transform.2.weight", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(3)),
        "init-last-layer-random",
    ),
    "last bias random where zero was asked": (
        "prefix_tuning.init-projected-zero",
        replaced("transform.2.bias", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(3)),
        "init-last-layer-random",
    ),
    "everything zero where the last layer was asked": (
        "prefix_tuning.init-projected-zero",
        replaced("embedding", lambda c, v, rng: v * 0),
        "init-zero",
    ),
    "first layer of the projection zero": (
        "prefix_tuning.init-projected-zero",
        replaced("transform.0.weight", lambda c, v, rng: v * 0),
        "init-encoder-zero",
    ),
    "bias of a dense layer zero": ("p_tuning.init-mlp", replaced("mlp_head.0.bias", lambda c, v, rng: v * 0), "init-encoder-zero"),
    "dense layer by Xavier": (
        "p_tuning.init-mlp",
        replaced("mlp_head.0.weight", lambda c, v, rng: rng.uniform(-1, 1, v.shape) * math.sqrt(6 / sum(v.shape))),
        "init-wrong-bound",
    ),
    "dense layer normal": (
        "p_tuning.init-mlp",
        replaced("mlp_head.2.weight", lambda c, v, rng: rng.normal(0, 0.02, v.shape)),
        "init-wrong-law",
    ),
    "dense layer by its outputs": (
        "prefix_tuning.init-projected",
        replaced("transform.2.weight", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(v.shape[0])),
        "init-wrong-law",
    ),
    "LSTM by its inputs": (
        "p_tuning.init-lstm",
        replaced("weight_ih_l0", lambda c, v, rng: rng.uniform(-1, 1, v.shape) / math.sqrt(v.shape[1])),
        "init-wrong-law",
    ),
    "LSTM's forget bias one": ("p_tuning.init-lstm", replaced("bias_ih_l0", lambda c, v, rng: v * 0 + 1), "init-wrong-bound"),
    "LSTM's biases zero": ("p_tuning.init-lstm", replaced("bias_hh_l1_reverse", lambda c, v, rng: v * 0), "init-encoder-zero"),
    "LSTM's way back a copy in narrow": ("p_tuning.init-lstm", replaced("weight_hh_l1_reverse", lambda c, v, rng: v / 2), "init-wrong-law"),
    "frozen rows zero": ("cartridge.init-random", replaced("frozen_embedding", lambda c, v, rng: v * 0), "init-zero"),
    "trained rows small": ("cartridge.init-nothing-frozen", replaced("trainable", lambda c, v, rng: v * 0.02), "init-wrong-law"),
    "words moved at once": ("cpt.init-words", replaced("delta", lambda c, v, rng: rng.normal(size=v.shape)), "init-words-moved"),
    "the first words for the words": ("cpt.init-words", words_at(lambda c, rng: range(3)), "init-token-ids: the rows are the first"),
    "words drawn": ("cpt.init-words", words_at(lambda c, rng: rng.integers(0, 9, 3)), "init-token-ids: the rows are not"),
    "IA3 zeros": ("ia3.linear.init-default", replaced("ia3_l", lambda c, v, rng: v * 0), "ia3-init-not-one"),
    "IA3 nearly one": ("ia3.linear.init-default-feedforward", replaced("ia3_l", lambda c, v, rng: v * 1.25), "ia3-init-not-one"),
    **{label: row for name in METHODS for label, row in facts(name).wrong_starts.items()},
}
