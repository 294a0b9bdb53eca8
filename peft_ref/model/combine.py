"""Several LoRAs as one: HF's add_weighted_adapter, whose types differ in what they add up.

    with s_i the scale of adapter i, w_i its weight, Delta_i = s_i B_i A_i

    linear                A = sum_i sign_i sqrt|w_i s_i| A_i     B = sum_i sqrt|w_i s_i| B_i      sign_i that of w_i s_i
    ties, dare_linear, dare_ties, magnitude_prune   the same weights, and A_i and B_i thinned out first (`pruning.py`)
    cat                   A = [w_1 s_1 A_1; w_2 s_2 A_2; ...]     B = [B_1, B_2, ...]             rank sum_i r_i, exact
    svd                   B A = the best of its rank to sum_i w_i Delta_i                         and B = U S, A = V^T
    *_svd                 the same of the thinned out Delta_i

linear is no sum of the deltas: it has the products of B_i with A_j, too. `exact.py` adds the deltas, and says how far a combination is off.
The combination is a new adapter, neither active nor trainable. With one adapter every type is linear.

HF      LoraModel.add_weighted_adapter; IA3Model's is in `combine_ia3.py`.
followed        use_rslora stays on while alpha is set to r: what comes out is sqrt(r) times too large. A lora_bias comes out zero, DoRA's
                magnitudes fresh, modules_to_save and trained tokens as the base's own
not followed    where patterns gave a module another rank, the configuration does not say so and its file cannot be loaded: here it does
refused         an existing name, for which HF does nothing; more weights than adapters, or fewer, which HF drops; a grouped convolution
                under cat, whose groups HF mixes; pissa and olora, which change the frozen weight once more
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from peft_ref.arrays import Array, namespace, row_norm, to, zeros_like
from peft_ref.contracts import Method, WeightMethod
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.files.adapter import AdapterModule
from peft_ref.files.config import AdapterConfig, Patterns
from peft_ref.layers import Layer
from peft_ref.methods.dora import DoRA
from peft_ref.methods.lora import LoRA
from peft_ref.model import pruning
from peft_ref.model.adapted import Adapted, Attached
from peft_ref.model.attaching import joined, weight_name
from peft_ref.model.numbers import wide
from peft_ref.model.placing import check_new, place
from peft_ref.model.tokens import followed

SAME_RANK = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
TYPES = (*SAME_RANK, "cat", "svd", *(f"{kind}_svd" for kind in SAME_RANK[1:]))

Draw: TypeAlias = Callable[[tuple[int, ...]], "np.ndarray[Any, Any]"]  # a mask of zeros and ones in a shape


class Source(NamedTuple):
    """One adapter at one module."""

    method: LoRA | DoRA
    A: Array
    B: Array
    scale: float
    weight: float


class Options(NamedTuple):
    density: float | None
    majority_sign_method: pruning.Majority
    draw: Draw | None
    rank: int
    clamp: float | None


def bernoulli(rng: np.random.Generator, density: float) -> Draw:
    """Masks whose entries are 1 with probability `density`."""
    return lambda shape: (rng.random(shape) < density).astype(np.float64)


def add_weighted(
    model: Adapted,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    combination_type: str = "svd",
    *,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    density: float | None = None,
    majority_sign_method: pruning.Majority = "total",
    draw: Draw | None = None,
) -> Adapted:
    """`model` with the weighted combination of `adapters`, all of them LoRA, as a new adapter `name`.

    `density` is what the pruning types keep, `draw` gives the masks of the DARE types: for each module those of its A's, then of its B's,
    or of its deltas. `svd_clamp` cuts the factors of an svd type off at that quantile of their entries.
    """
    sources = _checked(model, adapters, weights)
    if combination_type not in TYPES:
        raise ConfigError(f"combination_type={combination_type!r} (HF PEFT refuses it too).\n  There are {', '.join(TYPES)}.")
    kind = "linear" if len(adapters) == 1 else combination_type
    if kind.startswith("dare") and draw is None:
        raise ConfigError(f"combination_type={kind!r} keeps entries at random: give `draw`, such as bernoulli(rng, density).")
    options = Options(density, majority_sign_method, draw, _rank(kind, sources, svd_rank), svd_clamp)
    config = union(sources, options.rank)
    check_new(model, name, config)
    placed = place(model, config)
    modules: dict[str, AdapterModule] = {}
    for module, layer in placed.layers.items():
        if module in placed.config.beside:
            modules[module] = AdapterModule(*_fresh(model, module, layer, placed.config))
            continue
        here = [_source(a, module, w) for a, w in zip(sources, weights, strict=True) if module in a.modules]
        if not here:
            raise ConfigError(f"none of the adapters is on {module!r} (HF PEFT refuses it too).\n  Narrow their target_modules.")
        A, B = combined(kind, layer, here, options)
        method = as_lora(placed.config.method_for(module))
        modules[module] = _module(method, layer, A, B, model, module)
    modules = followed(modules, placed.following)
    return joined(model, name, placed._replace(config=with_ranks(placed.config, modules)), modules, trainable=False)


def _fresh(model: Adapted, module: str, layer: Layer, config: AdapterConfig) -> tuple[WeightMethod[Any], Layer, Any]:
    """Trained tokens as they start."""
    method, W = config.method_for(module), layer.fold(model.frozen(weight_name(model, module)))
    return method, layer, method.init(layer, wide(W), np.random.default_rng(0)).params


def combined(kind: str, layer: Layer, sources: Sequence[Source], o: Options) -> tuple[Array, Array]:
    """A (r, in) and B (out, r / groups) of the combination on one layer."""
    if kind == "cat":
        if layer.groups > 1:
            raise UnsupportedLayerError(
                f"combination_type='cat' on a convolution with groups={layer.groups}: HF PEFT gives every group the ranks of another.\n"
                "  Use 'linear', or the exact combination."
            )
        xp = namespace(sources[0].A)
        A = xp.concat([s.weight * s.scale * s.A for s in sources], axis=0)
        B = xp.concat([s.B for s in sources], axis=1)
        missing = o.rank - A.shape[0]
        if missing > 0:
            A = xp.concat([A, zeros_like((missing, A.shape[1]), A)], axis=0)
            B = xp.concat([B, zeros_like((B.shape[0], missing), B)], axis=1)
        return A, B
    if kind == "svd" or kind.endswith("_svd"):
        deltas = [s.method.delta(layer, _params(s)).W if isinstance(s.method, LoRA) else s.scale * (s.B @ s.A) for s in sources]
        total = _thinned(kind.removesuffix("_svd"), deltas, [s.weight for s in sources], o)
        return factorised(total, o.rank, o.clamp)
    signed = [s.weight * s.scale for s in sources]
    roots = [math.sqrt(abs(w)) for w in signed]
    A = _thinned(kind, [s.A for s in sources], [math.copysign(r, w) for r, w in zip(roots, signed, strict=True)], o)
    return A, _thinned(kind, [s.B for s in sources], roots, o)


def factorised(delta: Array, rank: int, clamp: float | None = None) -> tuple[Array, Array]:
    """A = V^T and B = U S of the best rank-`rank` part of `delta` (out, in)."""
    if rank > min(delta.shape):
        raise ConfigError(f"rank {rank} of a delta {tuple(delta.shape)}, which has {min(delta.shape)} (HF PEFT breaks there).\n  Use that.")
    xp = namespace(delta)
    U, S, Vh = xp.linalg.svd(delta, full_matrices=False)
    B, A = U[:, :rank] * S[:rank], Vh[:rank, :]
    if clamp is not None:
        high = pruning.quantile(xp.concat([xp.reshape(B, (-1,)), xp.reshape(A, (-1,))]), clamp)
        A, B = (_below(_above(x, -high), high) for x in (A, B))  # a quantile below zero makes all entries equal to it, as in HF
    return A, B


def _above(x: Array, low: Array) -> Array:
    return namespace(x).where(x < low, low, x)


def _below(x: Array, high: Array) -> Array:
    return namespace(x).where(x > high, high, x)


def union(sources: Sequence[Attached], rank: int) -> AdapterConfig:
    """The first adapter's configuration, for the targets of all, with rank and alpha `rank` and no patterns."""
    first = sources[0].config
    method = replace(as_lora(first.method), r=rank, lora_alpha=rank)
    return replace(
        first, method=method, targets=replace(first.targets, target_modules=all_targets(sources)), patterns=Patterns(), text=None
    )


def all_targets(sources: Sequence[Attached]) -> str | tuple[str, ...]:
    """The targets of all adapters as one."""
    targets = [a.config.targets.target_modules for a in sources]
    texts = [t for t in targets if isinstance(t, str)]
    if len(texts) == len(targets):
        return "|".join(f"({t})" for t in texts)
    if texts:
        raise ConfigError("some adapters have a regex as target_modules, others a list (HF PEFT refuses it too).")
    return tuple(sorted({name for t in targets for name in t or ()}))


def with_ranks(config: AdapterConfig, modules: Mapping[str, AdapterModule]) -> AdapterConfig:
    """`config` with the patterns that give every module the rank and alpha that it has."""
    whole = as_lora(config.method)
    other = {re.escape(name): as_lora(m.method) for name, m in modules.items() if name not in config.beside and m.method != whole}
    ranks = {name: method.r for name, method in other.items() if method.r != whole.r}
    alphas = {name: method.lora_alpha for name, method in other.items() if method.lora_alpha != whole.lora_alpha}
    return replace(config, patterns=replace(config.patterns, rank_pattern=ranks, alpha_pattern=alphas)) if other else config


def as_lora(method: Method) -> LoRA | DoRA:
    """`method` as what has A, B and a scale; raises where it is neither of the two."""
    if not isinstance(method, LoRA | DoRA):
        raise ConfigError(f"{type(method).__name__} is no LoRA, which alone is combined, swapped and padded (HF PEFT refuses it too).")
    return method


def check_sources(model: Adapted, adapters: Sequence[str], weights: Sequence[float]) -> list[Attached]:
    """The adapters to combine, which must be there, as many as weights, and not both have a copy of one module."""
    sources = [model.attached(name) for name in adapters]
    if not sources or len(sources) != len(weights):
        raise ConfigError(f"{len(weights)} weights for {len(sources)} adapters: HF PEFT drops what is too much.\n  Give one for each.")
    copies = [key for a in sources for key in a.saved]
    if len(copies) != len(set(copies)):
        twice = next(key for key in copies if copies.count(key) > 1)
        raise ConfigError(f"several of {', '.join(adapters)} have a copy of {twice} (HF PEFT refuses it too).")
    return sources


def _checked(model: Adapted, adapters: Sequence[str], weights: Sequence[float]) -> list[Attached]:
    sources = check_sources(model, adapters, weights)
    if model.mixed:
        raise ConfigError("adapters of a mixed model are not combined so (HF PEFT refuses it too).\n  Use the exact combination.")
    for source in sources:
        as_lora(source.config.method)
    if (init := as_lora(sources[0].config.method).init_lora_weights) in ("pissa", "olora", "corda", "loftq"):
        raise ConfigError(
            f"adapter {adapters[0]!r} has init_lora_weights={init!r}: HF PEFT would take its part off the frozen weight once more.\n"
            "  Combine exactly, or give the first adapter another init."
        )
    return sources


def _rank(kind: str, sources: Sequence[Attached], svd_rank: int | None) -> int:
    ranks = [max([as_lora(a.config.method).r, *a.config.patterns.rank_pattern.values()]) for a in sources]
    if kind == "cat":
        return sum(ranks)
    if kind in SAME_RANK:
        if len(set(ranks)) != 1:
            raise ConfigError(f"combination_type={kind!r} of ranks {ranks} (HF PEFT refuses it too).\n  Use 'cat' or an svd type.")
        return int(ranks[0])
    return int(svd_rank or max(ranks))


def _source(adapter: Attached, module: str, weight: float) -> Source:
    acting = adapter.adapter(module)
    method = as_lora(acting.method)
    return Source(method, wide(acting.params.A), wide(acting.params.B), method.scale, weight)


def _params(s: Source) -> Any:
    return s.method.to_params(A=s.A, B=s.B)


def _thinned(kind: str, tensors: Sequence[Array], weights: Sequence[float], o: Options) -> Array:
    if kind in ("linear", "svd"):
        return pruning.weighted_sum(tensors, weights)
    density: Any = o.density
    if kind == "ties":
        return pruning.ties(tensors, weights, density, o.majority_sign_method)
    if kind == "magnitude_prune":
        return pruning.magnitude_prune(tensors, weights, density)
    draw: Any = o.draw
    masks = [to(draw(tuple(t.shape)), t) for t in tensors]
    if kind == "dare_linear":
        return pruning.dare_linear(tensors, weights, density, masks)
    return pruning.dare_ties(tensors, weights, density, masks, o.majority_sign_method)


def _module(method: LoRA | DoRA, layer: Layer, A: Array, B: Array, model: Adapted, module: str) -> AdapterModule:
    """The factors as parameters under a method of their rank and the same scale."""
    r, scale = A.shape[0], method.scale
    if r != method.r:
        method = replace(method, r=r, lora_alpha=scale * (math.sqrt(r) if method.use_rslora else r))
    if isinstance(method, DoRA):
        W = wide(layer.fold(model.frozen(weight_name(model, module))))
        return AdapterModule(method, layer, method.to_params(A=A, B=B, m=row_norm(W)))
    c = zeros_like((layer.shape[0],), A) if method.lora_bias and layer.kind != "embedding" else None
    return AdapterModule(method, layer, method.to_params(A=A, B=B, c=c))
