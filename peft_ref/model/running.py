"""One layer of a model run with its active adapters, and batches whose rows want different adapters.

    y_i = layer(x_i; W, b) under the adapter that row i names, "__base__" for none

HF      runs all rows through the frozen layer and adds each group's path; modules_to_save likewise. It refuses merged adapters, and DoRA,
        whose rows are plain here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from peft_ref import stack
from peft_ref.arrays import Array, device, namespace
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.model.adapted import Adapted
from peft_ref.model.attaching import weight_name
from peft_ref.model.numbers import as_stored, wide

BASE = "__base__"


def forward(model: Adapted, module: str, x: Array) -> Array:
    """What the layer `module` computes for `x` with all that acts on it now."""
    layer, found = model.layer(module), model.modules()[module]
    if not found.exact:
        raise UnsupportedLayerError(
            f"{module!r} is a {layer.kind} whose stride, padding, dilation and groups are not known.\n  Give the graph the layer."
        )
    weight = model.weight(weight_name(model, module))
    b = None if found.bias is None else wide(model.weight(found.bias))
    is_float = layer.kind != "embedding"
    y = stack.forward(layer, wide(layer.fold(weight)), b, model.active(module), wide(x) if is_float else x)
    return as_stored(y, x if is_float else weight)


def acting_alone(model: Adapted, name: str) -> Adapted:
    """`model` with one adapter active, or none for "__base__": what the rows that name it see."""
    if model.merged.names:
        raise ConfigError(f"rows name adapters while {', '.join(model.merged.names)} is merged (HF PEFT refuses it too).\n  Unmerge first.")
    model.refuse_attention("rows that name adapters, which HF ignores there")
    return replace(model, active_names=() if name == BASE else (name,) if model.attached(name) else ())


def forward_rows(model: Adapted, module: str, x: Array, names: Sequence[str]) -> Array:
    """`forward` with the adapter that each row of `x` names."""
    return run_rows(x, names, lambda name, rows: forward(acting_alone(model, name), module, rows))


def run_rows(x: Array, names: Sequence[str], run: Callable[[str, Array], Array]) -> Array:
    """`run(name, rows)` for the rows of `x` that share a name, and the rows of the answers back in their places."""
    if len(names) != x.shape[0]:
        raise ConfigError(f"{len(names)} adapter names for {x.shape[0]} rows (HF PEFT refuses it too).\n  Give one for each row.")
    groups = {name: [i for i, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
    parts = [run(name, _rows(x, rows)) for name, rows in groups.items()]
    taken = [i for rows in groups.values() for i in rows]
    return _rows(namespace(*parts).concat(parts, axis=0), [taken.index(i) for i in range(len(names))])


def _rows(x: Array, rows: Sequence[int]) -> Array:
    xp = namespace(x)
    indices = xp.asarray(list(rows), dtype=xp.int64) if xp.__name__ == "numpy" else xp.asarray(list(rows), dtype=xp.int64, device=device(x))
    return xp.take(x, indices, axis=0)
