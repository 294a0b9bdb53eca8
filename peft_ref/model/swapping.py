"""One LoRA for another under the same name: what an adapter computes changes, what it is called and where it may go does not.

    the new one on fewer modules    nothing is left of the old one on the others
    on more modules                 refused
    of another rank or alpha        it brings its own: HF sets the new scale, and pads a smaller rank with zeros, which changes no output

`padded` is that padding, to be asked for: every module at one rank R, its scale kept by alpha' = alpha R / r (rsLoRA: alpha sqrt(R / r)).

HF      peft.utils.hotswap. It asks that use_rslora, lora_dropout, alpha_pattern and use_dora are equal, and that the old adapter is not
        merged. Not followed: it looks rank_pattern up under a tensor's key, which no pattern matches, so that a module of another rank gets
        the scale of the others; and the model's configuration stays that of the old adapter, so that a save puts the new numbers under the
        old rank and alpha. Here the configuration is swapped too.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from peft_ref.arrays import Array, namespace, zeros_like
from peft_ref.errors import ConfigError, KeyMismatchError, UnsupportedLayerError
from peft_ref.files.adapter import AdapterFile, AdapterModule
from peft_ref.files.config import AdapterConfig, Patterns
from peft_ref.layers import Layer
from peft_ref.methods.dora import DoRA
from peft_ref.methods.lora import LoRA
from peft_ref.model.adapted import Adapted
from peft_ref.model.attaching import weight_name
from peft_ref.model.combine import as_lora, with_ranks
from peft_ref.model.numbers import brought


def hotswap(model: Adapted, name: str, new: AdapterFile) -> Adapted:
    """`model` whose adapter `name` computes what `new` does."""
    old = model.attached(name)
    if name in model.merged.names:
        raise ConfigError(f"adapter {name!r} is merged (HF PEFT refuses it too).\n  Unmerge it first.")
    _check_alike(old.config, new.config)
    if extra := sorted(new.modules.keys() - old.modules.keys()):
        raise KeyMismatchError(
            f"the new adapter is on {extra[0]!r}, and {len(extra) - 1} more modules, where {name!r} is not (HF PEFT refuses it too).\n"
            "  Load it as an adapter of its own."
        )
    modules: dict[str, AdapterModule] = {}
    for module, old_module in old.modules.items():
        if module not in new.modules:
            continue
        method, _, params = new.modules[module]
        like = model.frozen(weight_name(model, module))
        tensors = {key: brought(t, like) for key, t in method.pack(new.modules[module].layer, params).items()}
        modules[module] = AdapterModule(method, old_module.layer, method.unpack(old_module.layer, tensors, where=module))
    return replace(model, adapters={**model.adapters, name: replace(old, config=new.config, modules=modules, multiplier=1.0)})


def padded(model: Adapted, name: str, rank: int) -> Adapted:
    """`model` whose LoRA `name` has `rank` everywhere and computes what it did."""
    adapter = model.attached(name)
    method = as_lora(adapter.config.method)
    modules = {
        module: _padded(f"{name!r} at {module!r}", as_lora(found.method), found.layer, found.params, rank)
        for module, found in adapter.modules.items()
    }
    alpha = next((as_lora(m.method).lora_alpha for m in modules.values()), float(rank))
    whole = replace(adapter.config, method=replace(method, r=rank, lora_alpha=alpha), patterns=Patterns())
    return replace(model, adapters={**model.adapters, name: replace(adapter, config=with_ranks(whole, modules), modules=modules)})


def _padded(where: str, method: LoRA | DoRA, layer: Layer, params: Any, rank: int) -> AdapterModule:
    r, g = method.r, layer.groups
    if r > rank:
        raise ConfigError(f"adapter {where} has rank {r} and cannot be padded to {rank} (HF PEFT refuses it too).")
    if rank % g:
        raise UnsupportedLayerError(f"rank {rank} of adapter {where}, whose groups={g} must divide it (HF PEFT refuses it too).")
    more = math.sqrt(rank / r) if method.use_rslora else rank / r
    wide_method = replace(method, r=rank, lora_alpha=method.lora_alpha * more)
    A, B = _more_rows(params.A, g, (rank - r) // g), _more_columns(params.B, (rank - r) // g)
    return AdapterModule(wide_method, layer, params._replace(A=A, B=B))


def _more_rows(A: Array, groups: int, n: int) -> Array:
    """`n` zero rows after each group's."""
    xp, (r, n_in) = namespace(A), A.shape
    grid = xp.reshape(A, (groups, r // groups, n_in))
    return xp.reshape(xp.concat([grid, zeros_like((groups, n, n_in), A)], axis=1), (r + groups * n, n_in))


def _more_columns(B: Array, n: int) -> Array:
    return namespace(B).concat([B, zeros_like((B.shape[0], n), B)], axis=1)


def _check_alike(old: AdapterConfig, new: AdapterConfig) -> None:
    before, after = as_lora(old.method), as_lora(new.method)
    if old.tokens or new.tokens:
        raise ConfigError("an adapter with trainable_token_indices is not swapped here.\n  Load it as an adapter of its own.")
    if type(before) is not type(after):
        raise ConfigError("one adapter is a DoRA, the other is not (HF PEFT refuses it too).\n  Load it as an adapter of its own.")
    pairs = {
        "use_rslora": (before.use_rslora, after.use_rslora),
        "lora_dropout": (before.lora_dropout, after.lora_dropout),
        "alpha_pattern": (dict(old.patterns.alpha_pattern), dict(new.patterns.alpha_pattern)),
    }
    for key, (was, comes) in pairs.items():
        if was != comes:
            raise ConfigError(f"{key} is {was!r:.60}, and {comes!r:.60} in the new adapter (HF PEFT refuses it too).")
