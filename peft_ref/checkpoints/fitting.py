"""Whether an adapter is one for this base: its modules are there, its tensors fit them, and no module is left without.

Read are headers and configurations. A checkpoint may leave out the first part of the live model's names, or have one that the live model
has not ("transformer." of GPT-2): the one change of the beginning that finds most of the adapter's modules is made for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

from peft_ref.attending import AttentionMethod
from peft_ref.checkpoints.folding import folded
from peft_ref.checkpoints.inspecting import ODD, WRONG, Finding, Inspection, Module, check_fit, gathered, listed
from peft_ref.contracts import WeightMethod
from peft_ref.errors import PeftRefError
from peft_ref.files.keys import PREFIX, PROMPT_PREFIX, parameter_name
from peft_ref.files.safetensors import Entry
from peft_ref.files.tokens import WORD
from peft_ref.graph import CheckpointGraph, Graph
from peft_ref.graph.blocks import attention_blocks
from peft_ref.graph.replicated import ReplicatedGraph
from peft_ref.graph.targets import match
from peft_ref.layers import Layer, Linear
from peft_ref.methods.trainable_tokens import TrainableTokens
from peft_ref.model.tokens import tied_to_table, tokens_beside
from peft_ref.prompts import SAVED, Prompt
from peft_ref.sizes import WIDTHS

PACKED = "in_proj_weight"  # torch's MultiheadAttention has queries, keys and values in one
CANDIDATES = 8  # changes of the beginning that are tried for each part of a name left out


class Renaming(NamedTuple):
    """What the adapter's names begin with, and what the base's begin with instead."""

    ours: str = ""
    theirs: str = ""

    def __call__(self, name: str) -> str:
        return self.theirs + name[len(self.ours) :] if name.startswith(self.ours) else name


@dataclass(frozen=True, eq=False, kw_only=True)
class Fit:
    graph: Graph  # under the adapter's names wherever one beginning does it
    renamed: Renaming
    layers: Mapping[str, Layer] = field(default_factory=dict)  # of the modules that fit, by the adapter's names
    changed: tuple[str, ...] = ()  # the parameters of the base that the adapter changes
    findings: tuple[Finding, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(math.prod(p.shape) for p in self.graph.parameters().values())

    @property
    def changed_parameters(self) -> int:
        return sum(math.prod(self.graph.parameters()[name].shape) for name in self.changed)


def fitted(inspection: Inspection, base: CheckpointGraph) -> Fit:
    """The adapter beside a checkpoint."""
    names = tuple(inspection.found.modules)
    renamed = _renaming(names, base)
    graph: Graph = base
    if not renamed.theirs and renamed.ours and all(name.startswith(renamed.ours) for name in names):
        graph, renamed = CheckpointGraph(base.folder, prefix=renamed.ours), Renaming()
    if pairs := inspection.config.housekeeping.get("layer_replication"):
        graph = ReplicatedGraph(graph, pairs)
    method = inspection.config.method
    if isinstance(method, Prompt):
        findings = _prompt(inspection, method, graph)
        return Fit(graph=graph, renamed=renamed, findings=(*findings, *_beside(inspection, graph, renamed, PROMPT_PREFIX)[1]))
    if isinstance(method, AttentionMethod):
        return Fit(graph=graph, renamed=renamed, findings=tuple(_blocks(inspection, method, graph)))
    layers, findings = _layers(inspection, graph, renamed)
    changed, others = _beside(inspection, graph, renamed, PREFIX)
    weights = [graph.modules()[renamed(module)].weight or f"{renamed(module)}.{PACKED}" for module in layers]
    findings += [*others, *(_left_out(inspection, graph, renamed) if layers else [])]
    resolved = dict.fromkeys(graph.resolve(name) for name in (*weights, *changed))
    return Fit(graph=graph, renamed=renamed, layers=layers, changed=tuple(resolved), findings=tuple(findings))


def _renaming(names: tuple[str, ...], base: CheckpointGraph) -> Renaming:
    """Of the changes of the beginning that find the first name, the one that finds most of all."""
    modules = base.modules()
    best, most = Renaming(), sum(name in modules for name in names)
    for change in _changes(names[0], tuple(modules)) if names and most < len(names) else ():
        if (n := sum(change(name) in modules for name in names)) > most:
            best, most = change, n
    return best


def _changes(name: str, modules: tuple[str, ...]) -> Iterator[Renaming]:
    numbered = any(part.isdecimal() for part in name.split("."))
    for head in ("", *(name[: at + 1] for at, letter in enumerate(name) if letter == ".")):
        rest = name[len(head) :]
        if numbered and not any(part.isdecimal() for part in rest.split(".")):
            return  # without its number it would be any layer
        ends = [other for other in modules if other == rest or other.endswith(f".{rest}")]
        for other in ends[:CANDIDATES]:
            yield Renaming(head, other[: len(other) - len(rest)])


def _layers(inspection: Inspection, graph: Graph, renamed: Renaming) -> tuple[dict[str, Layer], list[Finding]]:
    known, layers = graph.modules(), dict[str, Layer]()
    absent = [name for name in inspection.found.modules if renamed(name) not in known]
    problems: dict[str, str] = {}
    if inspection.config.targets.target_parameters:
        return {}, [Finding(ODD, "target_parameters: the parameters' tensors were not compared with the base.")]
    for name, module in inspection.modules.items():
        if name in absent or module.layer is None:
            continue
        there = known[renamed(name)]
        if there.layer is None and (packed := graph.parameters().get(f"{renamed(name)}.{PACKED}")) is not None:
            if packed.shape == module.layer.shape:
                layers[name] = module.layer
            else:
                problems[name] = f"{name} is of {module.layer.shape} in the file, and its {PACKED} of {packed.shape} in the base."
            continue
        if there.layer is None:
            problems[name] = f"{name}: the base's is no layer that an adapter of {inspection.method} could be on."
            continue
        layer = replace(there.layer, bias=there.bias is not None) if isinstance(there.layer, Linear) else there.layer
        try:
            layers[name] = _fitting(module, layer, name)
        except PeftRefError as error:
            problems[name] = str(error)
    findings = gathered(WRONG, problems)
    if absent:
        n = len(inspection.found.modules)
        whose = "It is another model's adapter." if len(absent) == n else "It was made for another model, or another version of it."
        findings.insert(0, Finding(WRONG, f"The base has no {listed(folded(absent))}: {len(absent)} of {n} modules. {whose}"))
    return layers, findings


def _fitting(module: Module, layer: Layer, name: str) -> Layer:
    """The base's layer, if the tensors fit it. A checkpoint does not say the groups of a convolution; the tensors do."""
    told = cast(Layer, module.layer)
    if layer.kernel_size and told.groups > 1 and told.shape == layer.shape:
        return told
    check_fit(module.method, module.tensors, name, layer)
    return layer


def _left_out(inspection: Inspection, graph: Graph, renamed: Renaming) -> list[Finding]:
    """Modules of the base that the configuration sends an adapter to, and of which the file has none."""
    config, method = inspection.config, cast(WeightMethod[Any], inspection.config.method)
    try:
        matched = match(config.targets, graph, peft_type=method.peft_type, task_type=config.housekeeping.get("task_type")).modules
        wanted = (*matched, *(name for name, tokens in tokens_beside(config, graph).methods.items() if tokens.own))
        if isinstance(method, TrainableTokens):
            wanted = (*wanted, *tied_to_table(graph, matched))
    except PeftRefError as error:
        return [Finding(WRONG, f"PEFT would not put this adapter onto the base. {error}")]
    there = {renamed(name) for name in inspection.found.modules}
    missing = [name for name in wanted if name not in there]
    if not missing:
        return []
    words = f"target_modules matches{f' or {WORD} means' if config.tokens else ''}"
    of = f"{len(missing)} of the {len(wanted)} modules that {words} in the base have no adapter"
    return [Finding(WRONG, f"{of}: {listed(folded(missing))}.\n  It was made for a smaller model, or the file is not whole.")]


def _beside(inspection: Inspection, graph: Graph, renamed: Renaming, prefix: str) -> tuple[list[str], list[Finding]]:
    """The parameters that the file has in full, and what of them does not fit."""
    found, problems = [], dict[str, str]()
    for kind in ("modules_to_save", "biases", "embeddings"):
        for key, entry in inspection.beside.get(kind, {}).items():
            own = parameter_name(key, prefix)
            name = renamed(own)
            if name not in graph.parameters() and name not in graph.tied():
                if kind != "modules_to_save":  # a head of the task's own is in no checkpoint
                    problems[own] = f"The base has no {own}, which the file holds ({kind})."
                continue
            there = graph.parameters()[graph.resolve(name)].shape
            if there != entry.shape:
                problems[own] = f"{own} is {entry.shape} in the file ({kind}) and {there} in the base."
            found.append(name)
    return found, gathered(WRONG, problems)


def _prompt(inspection: Inspection, method: Prompt, graph: Graph) -> list[Finding]:
    """The table has the sizes that the base's own configuration gives."""
    table = cast(Mapping[str, Entry], inspection.found.prompt).get(SAVED)
    bare: Any = replace(method, token_dim=None, num_attention_heads=None, num_layers=None)
    try:
        wanted = bare.sized(graph.config, inspection.config.housekeeping.get("task_type")).table_shape
    except PeftRefError as error:
        return [Finding(WRONG, str(error))]
    if table is None or table.shape == wanted:
        return []
    return [Finding(WRONG, f"The prompt is {table.shape}, and on this base it would be {wanted}.\n  It is another model's.")]


def _width(model: Mapping[str, Any]) -> int | None:
    text = model.get("text_config") or model
    return next((int(text[name]) for name in WIDTHS if isinstance(text.get(name), int)), None)


def _blocks(inspection: Inspection, method: AttentionMethod[Any], graph: Graph) -> list[Finding]:
    target = inspection.config.targets.target_modules
    try:
        wanted = attention_blocks(tuple(graph.modules()), graph.model_type, method.adapter_layers, cast(str | None, target))
    except PeftRefError as error:
        return [Finding(WRONG, str(error))]
    if astray := sorted(set(wanted) ^ inspection.found.modules.keys()):
        return [Finding(WRONG, f"{listed(folded(astray))}: of the blocks of the base and those of the file, one has it and the other not.")]
    width = _width(graph.config)
    own = {n: method.hidden_size_of(cast(Any, tensors)) for n, tensors in inspection.found.modules.items()}
    return gathered(WRONG, {n: f"{n}: rows of {size} numbers, and the base's have {width}." for n, size in own.items() if size != width})
