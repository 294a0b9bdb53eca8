"""What stands beside target_modules: single parameters that get an adapter, and modules that are trained and saved in full."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from peft_ref.errors import TargetError, UnsupportedLayerError
from peft_ref.graph.decide import suffixes
from peft_ref.graph.protocol import Graph
from peft_ref.graph.rules import SAVED_BY_TASK

if TYPE_CHECKING:
    from peft_ref.graph.targets import Targets

NOT_SAVED = ("ModuleDict", "ModuleList", "ParameterDict", "ParameterList")


def chosen_parameters(targets: Targets, graph: Graph, chosen: Collection[str]) -> tuple[str, ...]:
    wanted = set(targets.target_parameters or ())
    modules, tied = graph.modules(), graph.tied()
    order = {"": -1} | {name: place for place, name in enumerate(modules)}
    found = []
    for name in (*graph.parameters(), *tied) if wanted else ():
        holder = name.rpartition(".")[0]
        if holder in order and not wanted.isdisjoint((name, *suffixes(name))):
            if problem := _parameter_problem(holder, len(graph.parameters()[tied.get(name, name)].shape), chosen):
                raise TargetError(f"target_parameters: {name!r} {problem} (HF PEFT refuses it too).\n  Name the parameters more closely.")
            found.append(name)
    linear = [name for name in chosen if modules[name].kind in ("linear", "transposed_linear")]
    if found and linear and modules[linear[-1]].kind == "transposed_linear":
        # PEFT notes in the configuration how the module it wrapped last stores its weight, and then refuses that for a parameter.
        raise TargetError(
            f"target_parameters beside {linear[-1]!r}, which stores its weight transposed (HF PEFT refuses it too).\n"
            "  Use one adapter for the modules and one for the parameters."
        )
    return tuple(sorted(found, key=lambda name: order[name.rpartition(".")[0]]))


def _parameter_problem(holder: str, axes: int, chosen: Collection[str]) -> str | None:
    if not holder:
        return "belongs to the model itself, which cannot be wrapped"
    if holder in chosen:
        return f"is of the module {holder!r}, which target_modules chose already"
    return None if axes in (2, 3) else f"has {axes} axes, and only 2 and 3 are supported"


def saved_modules(targets: Targets, graph: Graph, task_type: str | None, adapted: Collection[str]) -> tuple[str, ...]:
    ends = (*(targets.modules_to_save or ()), *SAVED_BY_TASK.get(task_type or "", ()))
    found: dict[str, None] = {}
    for name in (*graph.modules(), *graph.aliases()) if ends else ():
        # Two levels below a module that is saved, PEFT takes the name for its own wrapper's inside.
        if not name.endswith(ends) or ".".join(name.split(".")[:-2]) in found:
            continue
        kind = graph.modules()[graph.aliases().get(name, name)].class_name
        if name in adapted or kind in NOT_SAVED:
            what = "gets an adapter" if name in adapted else f"is a {kind}"
            raise UnsupportedLayerError(
                f"modules_to_save takes every module whose name ends with {' or '.join(map(repr, ends))}.\n"
                f"  {name!r} is one and {what} (HF PEFT refuses it too). Name the modules in full, and exclude them from target_modules."
            )
        found[name] = None
    return tuple(found)
