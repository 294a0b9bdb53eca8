"""The combination that is the sum of the deltas, and how far another one is from it.

    Delta = sum_i w_i Delta_i       as a LoRA of rank sum_i r_i, exact, or of a given rank by the SVD, the nearest there is
    error = |Delta_c - Delta|       Frobenius, of a combination c at one module; relative to |Delta|

HF's linear type has  Delta_c - Delta = sum_{i != j} sign_j sqrt|w_i s_i w_j s_j| B_i A_j,  the cross terms.

Any method whose effect is a delta can be a part: LoRA, AdaLoRA, LoHa. What is not low-rank by its own needs a rank. A bias adds up too, as
lora_bias. Ranks of a grouped convolution are kept group by group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from peft_ref.arrays import Array, namespace, regroup, zeros_like
from peft_ref.contracts import Additive, Delta, Factors, LowRank
from peft_ref.errors import ConfigError, NotMergeableError
from peft_ref.files.adapter import AdapterModule
from peft_ref.files.config import AdapterConfig
from peft_ref.files.tokens import name_of
from peft_ref.layers import Layer
from peft_ref.methods.lora import LoRA, Params
from peft_ref.model.adapted import Adapted, Attached
from peft_ref.model.attaching import joined
from peft_ref.model.combine import all_targets, as_lora, check_sources, factorised, with_ranks
from peft_ref.model.placing import check_new, place
from peft_ref.model.pruning import weighted_sum


class Deviation(NamedTuple):
    """How far a combination is from the sum of the deltas at one module."""

    error: float
    relative: float  # infinite where the sum is zero and the combination is not


def add_exact(model: Adapted, adapters: Sequence[str], weights: Sequence[float], name: str, *, rank: int | None = None) -> Adapted:
    """`model` with a LoRA `name` whose delta is the weighted sum of those of `adapters`; its best part of `rank` where one is given."""
    sources = check_sources(model, adapters, weights)
    parts: dict[str, list[tuple[Attached, float]]] = {}
    for source, w in zip(sources, weights, strict=True):
        for module in source.modules:
            parts.setdefault(module, []).append((source, w))
    biased = any(_bias_in(source, module) is not None for module, here in parts.items() for source, _ in here)
    modules = {module: _summed(module, here[0][0].modules[module].layer, here, rank, biased) for module, here in parts.items()}
    top = max((as_lora(m.method).r for m in modules.values()), default=1)
    config = AdapterConfig(
        method=LoRA(r=top, lora_alpha=top, lora_bias=biased),
        targets=replace(sources[0].config.targets, target_modules=all_targets(sources), modules_to_save=None),
        housekeeping={k: v for k, v in sources[0].config.housekeeping.items() if k in ("base_model_name_or_path", "task_type")},
    )
    config = with_ranks(config, modules)
    check_new(model, name, config)
    placed = place(model, config)
    if placed.layers.keys() != modules.keys():
        raise ConfigError(
            f"the targets of {', '.join(adapters)} together are not the modules that they are on:"
            f" {', '.join(sorted(placed.layers.keys() ^ modules.keys()))}."
            "\n  layers_to_transform or exclude_modules of the first one differ from another's."
        )
    return joined(model, name, placed, {module: modules[module] for module in placed.layers}, trainable=False)


def deviations(model: Adapted, combination: str, adapters: Sequence[str], weights: Sequence[float]) -> Mapping[str, Deviation]:
    """At every module how far the adapter `combination` is from the weighted sum of the deltas of `adapters`."""
    sources = [model.attached(name) for name in adapters]
    combined = model.attached(combination)
    found: dict[str, Deviation] = {}
    for module, made in combined.modules.items():
        here = [(_delta(a, module).W, w) for a, w in zip(sources, weights, strict=True) if module in a.modules]
        got = _delta(combined, module).W
        wanted = weighted_sum([W for W, _ in here], [w for _, w in here]) if here else zeros_like(made.layer.shape, got)
        error, size = _norm(got - wanted), _norm(wanted)
        found[module] = Deviation(error, error / size if size else math.inf if error else 0.0)
    return found


def _summed(module: str, layer: Layer, parts: Sequence[tuple[Attached, float]], rank: int | None, biased: bool) -> AdapterModule:
    biases = [(c, w) for a, w in parts if (c := _bias_in(a, module)) is not None]
    factors = [_factors(a, module) for a, _ in parts]
    if rank is None:
        stacked = [(f, w) for f, (_, w) in zip(factors, parts, strict=True) if f is not None]
        if len(stacked) < len(parts):
            raise ConfigError(f"a part of the sum at {module!r} has no rank of its own.\n  Give `rank`, at most {min(layer.shape)}.")
        A, B = _stacked(layer, stacked)
    else:
        A, B = factorised(weighted_sum([_delta(a, module).W for a, _ in parts], [w for _, w in parts]), rank)
    r = A.shape[0]
    method = LoRA(r=r, lora_alpha=r, lora_bias=biased)
    c = None
    if biased:
        c = weighted_sum([c for c, _ in biases], [w for _, w in biases]) if biases else zeros_like((layer.shape[0],), A)
    return AdapterModule(method, layer, Params(A, B, c))


def _stacked(layer: Layer, parts: Sequence[tuple[Factors, float]]) -> tuple[Array, Array]:
    """All ranks one after the other, in every group of the layer."""
    xp, g = namespace(parts[0][0].A), layer.groups
    rows = [regroup(f.A, (g, f.A.shape[0] // g, f.A.shape[1])) if g > 1 else xp.expand_dims(f.A, axis=0) for f, _ in parts]
    A = xp.concat(rows, axis=1)
    return xp.reshape(A, (A.shape[0] * A.shape[1], A.shape[2])), xp.concat([w * f.B for f, w in parts], axis=1)


def _factors(adapter: Attached, module: str) -> Factors | None:
    """The factors of what is low-rank by its own."""
    method, params, _ = adapter.adapter(module)
    return method.factors(params) if isinstance(method, LowRank) else None


def _bias_in(adapter: Attached, module: str) -> Array | None:
    factors = _factors(adapter, module)  # a grouped convolution has these and no delta
    return _delta(adapter, module).b if factors is None else factors.b


def _delta(adapter: Attached, module: str) -> Delta:
    method, params, _ = adapter.adapter(module)
    if not isinstance(method, LowRank | Additive):
        raise NotMergeableError(
            f"{name_of(method)} at {module!r}: its effect is no delta.\n  LoRA's, AdaLoRA's and LoHa's are, and add up."
        )
    return method.delta(adapter.modules[module].layer, params)


def _norm(x: Array) -> float:
    xp = namespace(x)
    return float(xp.sqrt(xp.sum(x * x)))
