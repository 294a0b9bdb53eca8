"""A whole adapter as a LoRA adapter, which PEFT loads onto the same frozen model.

converted    of an adapter's file, alone where its deltas do not depend on the frozen weights
as_lora      of an adapter on a model
plain        of a LoRA from an init that took a part off the frozen weight (pissa, olora, corda, lora_ga), for the weight as it was. With
             A0, B0 as the init left them,  W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]:  twice the rank, the same scale

Ranks that differ from the most frequent one are in rank_pattern and alpha_pattern, by the modules' whole names. Everything else in the file
(modules_to_save, biases, embeddings) comes along.

HF      convert_to_lora and save_as_lora: as `to_lora` says. They refuse biases, which come along here, and name modules in the patterns by
        their ends. path_initial_model_for_weight_conversion is `plain`; it leaves out whatever is no A or B of a linear layer, writes a
        configuration into the initial adapter's folder, and refuses use_rslora with patterns, which are no difficulty
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from peft_ref.arrays import Array, namespace, zeros_like
from peft_ref.errors import ConfigError, FileFormatError, KeyMismatchError, ShapeError
from peft_ref.files.adapter import AdapterFile, AdapterModule
from peft_ref.files.config import AdapterConfig, Patterns, flatten
from peft_ref.methods.lora import LoRA, Params
from peft_ref.methods.to_lora import Converted, check_asked, to_lora
from peft_ref.model.adapted import Adapted
from peft_ref.model.attaching import weight_name
from peft_ref.model.numbers import as_stored, is_finite, to_file, wide
from peft_ref.model.storing import adapter_file

KEPT = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode", "fan_in_fan_out")
CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")  # inits that leave another frozen weight
TRUNCATING = "kasa_config"  # the switch of the method whose start leaves another frozen weight, whatever its init is called


class Conversion(NamedTuple):
    file: AdapterFile
    lost: Mapping[str, float]  # by module: the share of the delta's energy that is not in the LoRA


def check_finite(file: AdapterFile) -> None:
    """Raise `FileFormatError` where a parameter is not finite: no LoRA is near to it."""
    for name, module in file.modules.items():
        for field, tensor in zip(module.params._fields, module.params, strict=True):
            if not (tensor is None or is_finite(wide(tensor))):
                raise FileFormatError(f"{name}: {field} holds NaN or an infinity.\n  The training diverged, or the file is damaged.")


def converted(
    file: AdapterFile,
    *,
    rank: int | None = None,
    energy: float | None = None,
    weights: Callable[[str], tuple[Array, Array | None]] | None = None,
) -> Conversion:
    """`file` as a LoRA adapter. `weights` gives a module's frozen matrix (out, in) and bias."""
    check_asked(rank, energy)
    check_on_its_weight(file.config)
    if not file.modules:
        raise ConfigError(f"{type(file.config.method).__name__} changes no layer's weight: there is nothing that a LoRA could be.")
    if file.config.tokens:
        raise ConfigError(
            "an adapter with trainable_token_indices: rows that take the place of others are no LoRA, and it would be without them.\n"
            "  Merge it, or train a LoRA without."
        )
    if file.shared:
        raise ConfigError(
            f"{type(file.config.method).__name__}'s layers share {', '.join(file.shared)}.\n  Give the model: it tells which."
        )
    made: dict[str, Converted] = {}
    for module, (method, layer, params) in file.modules.items():
        W, b = (None, None) if weights is None else weights(module)
        computed = type(params)(*(None if p is None else wide(p) for p in params))
        made[module] = to_lora(method, layer, computed, W, b, rank=rank, energy=energy)
    biased = any(m.params.c is not None for m in made.values())
    modules = {}
    for module, found in made.items():
        layer, like = file.modules[module].layer, next(p for p in file.modules[module].params if p is not None)
        A, B, c = found.params
        c = zeros_like((layer.shape[0],), A) if biased and c is None else c
        method = replace(found.method, lora_bias=biased)
        method.check_layer(layer, module)
        modules[module] = AdapterModule(method, layer, Params(*(None if p is None else as_stored(p, like) for p in (A, B, c))))
    config = config_of(file.config, modules)
    return Conversion(replace(file, config=config, modules=modules), {module: found.lost for module, found in made.items()})


def as_lora(model: Adapted, name: str, *, rank: int | None = None, energy: float | None = None) -> Conversion:
    """The adapter `name` of `model` as a LoRA adapter."""

    def weights(module: str) -> tuple[Array, Array | None]:
        bias = model.modules()[module].bias
        W = wide(model.layer(module).fold(to_file(model.frozen(weight_name(model, module)))))
        return W, None if bias is None else wide(to_file(model.frozen(bias)))

    return converted(adapter_file(model, name), rank=rank, energy=energy, weights=weights)


def plain(trained: AdapterFile, initial: AdapterFile) -> AdapterFile:
    """`trained` as a LoRA for the weight as it was before the init that left `initial` took its part off."""
    whole = _lora(trained.config)
    if missing := sorted(trained.modules.keys() ^ initial.modules.keys()):
        raise KeyMismatchError(f"{missing[0]} is in one of the two adapters, and so {len(missing) - 1} more.\n  Give the very start of it.")
    modules = {module: _doubled(found, initial.modules[module], module) for module, found in trained.modules.items()}
    patterns = Patterns(
        rank_pattern={key: 2 * r for key, r in trained.config.patterns.rank_pattern.items()},
        alpha_pattern={key: _twice(whole) * alpha for key, alpha in trained.config.patterns.alpha_pattern.items()},
    )
    config = replace(trained.config, method=_of_twice_the_rank(whole), patterns=patterns)
    return replace(trained, config=config, modules=modules)


def _of_twice_the_rank(method: LoRA) -> LoRA:
    """`method` with twice the rank and the same scale."""
    return replace(method, r=2 * method.r, lora_alpha=_twice(method) * method.lora_alpha, init_lora_weights=True)


def _twice(method: LoRA) -> float:
    """What alpha grows by where the rank is doubled and the scale is to stay."""
    return 2**0.5 if method.use_rslora else 2


def _doubled(trained: AdapterModule, initial: AdapterModule, module: str) -> AdapterModule:
    A, B, c = trained.params
    A0, B0, c0 = initial.params
    if tuple(A.shape) != tuple(A0.shape) or tuple(B.shape) != tuple(B0.shape):
        raise ShapeError(f"{module!r}: A {tuple(A.shape)} and B {tuple(B.shape)} started as {tuple(A0.shape)} and {tuple(B0.shape)}.")
    if trained.layer.groups > 1 or c is not None or c0 is not None:
        raise ConfigError(f"{module!r}: no init that changes the weight takes a grouped convolution or lora_bias (HF PEFT refuses it too).")
    xp = namespace(A)
    return AdapterModule(_of_twice_the_rank(_lora(trained)), trained.layer, Params(xp.concat([A, A0], axis=0), xp.concat([B, -B0], axis=1)))


def check_on_its_weight(config: AdapterConfig) -> None:
    """Raise `ConfigError` where the adapter belongs to another weight than the model's own."""
    init = flatten(config).get("init_lora_weights", True) if config.method.peft_type == "LORA" else True
    if str(init).lower().startswith(CHANGING):
        raise ConfigError(
            f"init_lora_weights={init!r} took a part off the frozen weight, to which this adapter belongs.\n"
            "  Use `plain` with the adapter as it was before training (on the command line --initial)."
        )
    if config.method.flag == TRUNCATING:
        raise ConfigError(f"{type(config.method).__name__} cuts the frozen weight off, which no LoRA does (HF PEFT refuses it too).")


def config_of(source: AdapterConfig, modules: Mapping[str, AdapterModule]) -> AdapterConfig:
    """The configuration of a LoRA on the modules of `source`, with the ranks that it has there."""
    ranks = {module: _lora(found).r for module, found in modules.items()}
    most = Counter(ranks.values()).most_common(1)[0][0]
    other = {f"^{_escaped(module)}": r for module, r in ranks.items() if r != most}
    kept: dict[str, Any] = {key: source.housekeeping[key] for key in KEPT if key in source.housekeeping}
    bias = str(source.housekeeping.get("bias", "none"))
    return AdapterConfig(
        method=LoRA(r=most, lora_alpha=most, lora_bias=_lora(next(iter(modules.values()))).lora_bias),
        targets=source.targets,
        patterns=Patterns(rank_pattern=other, alpha_pattern=dict(other)),
        housekeeping={**kept, "bias": "lora_only" if bias.endswith("_only") else bias},
    )


def _escaped(module: str) -> str:
    return module.replace(".", r"\.")


def _lora(of: AdapterModule | AdapterConfig) -> LoRA:
    if not isinstance(of.method, LoRA):
        raise ConfigError(f"{type(of.method).__name__}: of a plain LoRA alone an init's part is put back so (HF PEFT drops what is more).")
    return of.method
