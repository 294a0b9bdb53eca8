"""Several IA3 adapters as one: l = sum_i w_i l_i over those that are on the module.

The vectors multiply, and a fresh one is 1: weights that do not add up to 1 rescale the layer, and an adapter that is not on the module adds
nothing, not 1. So it is in HF.

HF      IA3Model.add_weighted_adapter
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from peft_ref.errors import ConfigError
from peft_ref.files.adapter import AdapterModule
from peft_ref.methods.ia3 import IA3, Params
from peft_ref.model.adapted import Adapted, Attached
from peft_ref.model.attaching import joined
from peft_ref.model.combine import all_targets, check_sources
from peft_ref.model.placing import check_new, place
from peft_ref.model.pruning import weighted_sum


def add_weighted_ia3(model: Adapted, adapters: Sequence[str], weights: Sequence[float], name: str) -> Adapted:
    """`model` with the weighted sum of `adapters`, all of them IA3, as a new adapter `name`."""
    sources = check_sources(model, adapters, weights)
    for other, source in zip(adapters, sources, strict=True):
        if not isinstance(source.config.method, IA3):
            raise ConfigError(f"adapter {other!r} is {type(source.config.method).__name__}, expected IA3 (HF PEFT refuses it too).")
    first = sources[0].config
    patterns = replace(first.patterns, feedforward_modules=_feedforward(sources))
    config = replace(first, targets=replace(first.targets, target_modules=all_targets(sources)), patterns=patterns, text=None)
    check_new(model, name, config)
    placed = place(model, config)
    modules: dict[str, AdapterModule] = {}
    for module, layer in placed.layers.items():
        here = [(a.modules[module].params.l, w) for a, w in zip(sources, weights, strict=True) if module in a.modules]
        if not here:
            raise ConfigError(f"none of the adapters is on {module!r}: HF PEFT would make it zero.\n  Narrow their target_modules.")
        l = weighted_sum([l for l, _ in here], [w for _, w in here])
        modules[module] = AdapterModule(placed.config.method_for(module), layer, Params(l))
    return joined(model, name, placed, modules, trainable=False)


def _feedforward(sources: Sequence[Attached]) -> str | tuple[str, ...]:
    every = [a.config.patterns.feedforward_modules for a in sources]
    texts = [f for f in every if isinstance(f, str)]
    if len(texts) == len(every):
        return "|".join(f"({f})" for f in texts)
    if texts:
        raise ConfigError("some adapters have a regex as feedforward_modules, others a list (HF PEFT refuses it too).")
    return tuple(sorted({name for f in every for name in f or ()}))
