"""Which adapters act, whether any do, how strongly, and which are trained.

activate    these and no others, in this order; they become trainable and the others stop being so. What is merged is unmerged, as in HF
disable     the base model's own output. What is merged is unmerged: in HF the next forward does that
enable      the active adapters act again and are trainable again
rescaled    every LoRA's scale times a factor (HF's rescale_adapter_scale, a context there)

HF      of the copies of modules_to_save freezes only the one that was active: one that was trained beside it stays trainable
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal

from peft_ref.contracts import WeightMethod
from peft_ref.errors import ConfigError
from peft_ref.model.adapted import Adapted, Merged
from peft_ref.model.tokens import check_tokens, trains

SCALING = "lora_"  # the prefix of those whose layer has a scale that can be changed


def activate(model: Adapted, names: str | Sequence[str], *, inference: bool = False) -> Adapted:
    """`model` with exactly these adapters active; frozen with `inference`."""
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        model.attached(name)
    if len(set(names)) < len(names):
        raise ConfigError(f"active adapters {', '.join(names)}: one is there twice, and would act twice.\n  Name each once.")
    if any(model.adapters[name].blocks for name in names) and (len(names) > 1 or inference):
        what = "inference=True" if inference else f"{len(names)} adapters at once"
        raise ConfigError(f"{what} of adapters on attention blocks, of which one acts (HF PEFT refuses it too).\n  Name one.")
    refuse_together(model, names, "active")
    owners: dict[str, str] = {}
    for name in names:
        for key in model.adapters[name].saved:
            if (other := owners.setdefault(key, name)) != name:
                raise ConfigError(
                    f"adapters {other!r} and {name!r} both have a copy of {key} (HF PEFT refuses it too).\n  Activate one of them."
                )
    refuse_tokens(model, names, "active")
    return trained(replace(model, active_names=names, merged=Merged()), () if inference else names)


def refuse_together(model: Adapted, names: Sequence[str], what: str) -> None:
    """Raise `ConfigError` for several adapters of a method of which one acts at a time."""
    alone = [name for name in names if isinstance(method := model.attached(name).config.method, WeightMethod) and method.swaps]
    if len(alone) > 1:
        raise ConfigError(
            f"adapters {', '.join(alone)} {what} together: of {model.adapters[alone[0]].config.method.peft_type} one acts at a time"
            " (HF PEFT refuses it too).\n  Name one."
        )


def refuse_tokens(model: Adapted, names: Sequence[str], what: Literal["active", "merged"]) -> None:
    """Raise `ConfigError` for several adapters whose trained tokens do not go together."""
    there = [(name, model.attached(name)) for name in names]
    for one, other in combinations([trains(repr(name), a.config, a.modules) for name, a in there], 2):
        check_tokens(one, other, what)


def enable(model: Adapted) -> Adapted:
    return trained(replace(model, enabled=True), model.active_names)


def disable(model: Adapted) -> Adapted:
    return trained(replace(model, enabled=False, merged=Merged()), ())


def set_trainable(model: Adapted, names: str | Iterable[str], trainable: bool = True) -> Adapted:
    """`model` with these adapters trainable or not; the others as they were."""
    names = {names} if isinstance(names, str) else set(names)
    for name in names:
        model.attached(name)
    model.refuse_attention("set_trainable")
    changed = {n: replace(a, trainable=trainable if n in names else a.trainable) for n, a in model.adapters.items()}
    return replace(model, adapters=changed)


def rescaled(model: Adapted, factor: float) -> Adapted:
    """`model` with every LoRA's scale times `factor`. What is merged stays as it is merged."""
    found = {n: a for n, a in model.adapters.items() if a.config.method.tuner_prefix == SCALING}
    if not found:
        raise ConfigError("no adapter here has a scale that can be changed (HF PEFT refuses it too).\n  LORA and ADALORA have.")
    changed = {n: replace(a, multiplier=a.multiplier * factor) for n, a in found.items()}
    return replace(model, adapters={**model.adapters, **changed})


def trained(model: Adapted, names: Iterable[str]) -> Adapted:
    """`model` with these adapters trainable and no others."""
    names = set(names)
    return replace(model, adapters={n: replace(a, trainable=n in names) for n, a in model.adapters.items()})
