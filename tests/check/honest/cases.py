"""Random cases beyond the corpus: its variants with other numbers, other sizes and other kinds of numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from peft_ref.check.attending import make_attention_case
from peft_ref.check.case import LAYER_OPERATIONS, Case, build_method
from peft_ref.check.mistakes import SUITES
from peft_ref.check.prompting import make_prompt_case
from peft_ref.check.variants import LAYERS, NUMBERS, Variant, make_case
from peft_ref.contracts import Additive, LowRank, WeightMethod
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Embedding, Layer, Linear
from peft_ref.methods import METHODS

# The methods that are written twice. Of the others the honest ports are HF PEFT in float32 and our own on other libraries.
TWICE = frozenset({"adalora", "dora", "hra", "ia3", "loha", "lora", "oft", "road"})
WRITTEN = tuple(name for name in SUITES if name in TWICE or name not in METHODS.weights)


def random_cases(seed: int, count: int, largest: int = 14) -> list[Case]:
    """All operations of `count` random variants of every method; a variant's name is its numbers' seed."""
    rng = np.random.default_rng(seed)
    return [case for i in range(count) for method in WRITTEN for case in _of(method, f"{seed}-{i}", rng, largest)]


def _of(name: str, label: str, rng: np.random.Generator, largest: int) -> list[Case]:
    if name in METHODS.attention:
        variant = SUITES[name].attention[int(rng.integers(len(SUITES[name].attention)))]
        other = replace(variant, name=f"{variant.name}-{label}", numbers=str(rng.choice(sorted(NUMBERS))))
        return [make_attention_case(name, other, operation) for operation in variant.operations]
    if name in METHODS.prompts:
        return _prompts(name, label, rng)
    variants = SUITES[name].variants
    variant = variants[int(rng.integers(len(variants)))]
    layer_name = variant.layers[int(rng.integers(len(variant.layers)))]
    made_to_measure = variant.weight is not None
    layer = LAYERS[layer_name] if made_to_measure else _resized(LAYERS[layer_name], rng, largest)
    configured = [build_method(name, {"peft_type": METHODS[name].peft_type, **c}) for c in variant.configs]
    layer = layer if _taken(configured, layer) and _drawn(variant, configured, layer) else LAYERS[layer_name]
    numbers = variant.numbers if made_to_measure else str(rng.choice(sorted(NUMBERS)))
    methods = [build_method(name, {"peft_type": METHODS[name].peft_type, **c}) for c in variant.configs]
    mergeable = layer.groups == 1 or not issubclass(METHODS.weights[name], LowRank)
    mergeable &= variant.bias or not any(c.get("lora_bias") for c in variant.configs)
    cases = []
    for operation in LAYER_OPERATIONS:
        if (name, operation) == ("road", "unmerge"):
            continue  # of numbers that are not chosen the determinant may vanish in a narrow format; the corpus chooses them
        if operation in ("merge", "unmerge", "delta") and (variant.dropout or not mergeable):
            continue
        if operation == "delta" and (len(methods) > 1 or not issubclass(METHODS.weights[name], LowRank | Additive)):
            continue
        other = replace(variant, name=f"{variant.name}-{label}", numbers=numbers)
        cases.append(make_case(name, other, layer_name, layer, methods, operation))
    return cases


def _taken(methods: list[WeightMethod[Any]], layer: Layer) -> bool:
    try:
        return all(m.check_layer(layer) is None for m in methods)  # type: ignore[func-returns-value]
    except UnsupportedLayerError:
        return False


def _drawn(variant: Variant, methods: list[WeightMethod[Any]], layer: Layer) -> bool:
    """Whether what the variant draws has the shapes asked for: OFT's quaternions are blocks of four."""
    rng = np.random.default_rng(0)
    specs = [s for m in methods for s in m.spec(layer) if s.field in variant.draws]
    return all(np.shape(variant.draws[s.field](rng, s.stored_shape)) == s.stored_shape for s in specs)


def _prompts(name: str, label: str, rng: np.random.Generator) -> list[Case]:
    """Splicing copies numbers, whatever they are: only what is computed is asked. Sizes hang together, so they stay."""
    variants = [v for v in SUITES[name].prompts if v.operations != ("splice",)]
    variant = variants[int(rng.integers(len(variants)))]
    other = replace(variant, name=f"{variant.name}-{label}", numbers=str(rng.choice(sorted(NUMBERS))))
    return [make_prompt_case(name, other, operation) for operation in variant.operations]


def _resized(layer: Layer, rng: np.random.Generator, largest: int) -> Layer:
    n_in, out = (int(v) for v in rng.integers(2, largest, 2))
    if isinstance(layer, Linear):
        return replace(layer, in_features=n_in, out_features=out)
    if isinstance(layer, Embedding):
        return replace(layer, num_embeddings=n_in, embedding_dim=out)
    return layer
