"""What an adapter folder holds, told from its configuration and the header of its tensors: no tensor is read, however large.

    Inspection    the folder: configuration, modules, what is beside them, and the findings
    Module        one adapted module: its method with the patterns' values, the layer as far as the tensors tell, scale and rank
    Finding       what a reader should know: WRONG where it cannot be loaded as it is, ODD where it can and may not be meant

A header says shapes and dtypes. Where a function asks for arrays, it is given zeros of that shape which take no memory.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np

from peft_ref.attending import AttentionMethod
from peft_ref.checkpoints.folding import folded
from peft_ref.checkpoints.scales import Scale, rank_of, scale_of
from peft_ref.contracts import LowRank, WeightMethod
from peft_ref.errors import PeftRefError
from peft_ref.files.adapter import DEFAULT, PICKLES, adapter_names, load_config, open_adapter, spanned, with_tokens_of
from peft_ref.files.config import AdapterConfig, flatten
from peft_ref.files.infer import infer_layer
from peft_ref.files.keys import PREFIX, SHARED_PREFIX, Sorted, sort_tensors, told_apart
from peft_ref.files.safetensors import Entry, NDArray, SafetensorsFile, Tensor, dtypes
from peft_ref.files.tokens import KEY, WORD, once_more
from peft_ref.graph.patterns import Matcher
from peft_ref.graph.rules import SAVED_BY_TASK
from peft_ref.graph.targets import unused_patterns
from peft_ref.layers import Conv, Embedding, Layer, Linear
from peft_ref.model.converting import CHANGING
from peft_ref.prompts import SAVED, Prompt

Level: TypeAlias = Literal["wrong", "odd"]
WRONG: Level = "wrong"
ODD: Level = "odd"
NAMED = 3  # of what a finding is about, that many names


class Finding(NamedTuple):
    level: Level
    said: str


class Module(NamedTuple):
    method: WeightMethod[Any]
    layer: Layer | None  # None where the tensors fit no layer
    tensors: Mapping[str, Entry]  # by the parameter's key
    scale: Scale | None
    rank: int | None
    told: tuple[bool, bool] = (False, False)  # whether the tensors tell what the layer gives out, and what it takes in

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """(out, in) of the weight matrix, as far as it is told."""
        out, n_in = (None, None) if self.layer is None else self.layer.shape
        return out if self.told[0] else None, n_in if self.told[1] else None

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry.dtype for entry in self.tensors.values()))

    @property
    def parameters(self) -> int:
        return parameters(self.tensors.values())


@dataclass(frozen=True, eq=False, kw_only=True)
class Inspection:
    folder: Path
    config: AdapterConfig
    file: SafetensorsFile
    found: Sorted  # by what they are, as the header tells them
    modules: Mapping[str, Module] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @property
    def method(self) -> str:
        return type(self.config.method).__name__

    @cached_property
    def flat(self) -> dict[str, Any]:
        return flatten(self.config)

    @property
    def settings(self) -> dict[str, Any]:
        """The method's hyper-parameters that are not the defaults, as the file says them."""
        flat = self.flat
        defaults = {f.name: f.default for f in fields(cast(Any, self.config.method))}
        return {name: flat[name] for name, usual in defaults.items() if name in flat and (usual is MISSING or flat[name] != usual)}

    @property
    def beside(self) -> dict[str, Mapping[str, Entry]]:
        """What is not an adapted module's own, by what it is; only what there is."""
        kinds = ("prompt", "shared", "modules_to_save", "biases", "embeddings")
        return {kind: cast(Mapping[str, Entry], held) for kind in kinds if (held := getattr(self.found, kind))}

    @property
    def wrong(self) -> bool:
        return any(finding.level == WRONG for finding in self.findings)


def parameters(entries: Iterable[Entry]) -> int:
    return sum(math.prod(entry.shape) for entry in entries)


def hollow(shape: Sequence[int], dtype: str = "F32") -> NDArray:
    """Zeros of that shape that take no memory: every element is the same one."""
    return np.broadcast_to(np.zeros((), dtypes().get(dtype, np.dtype("u1"))), tuple(shape))


def inspect(folder: str | os.PathLike[str], name: str = DEFAULT) -> Inspection:
    """The adapter in `folder`. Raises where the configuration or the header itself cannot be read."""
    config, file = load_config(folder, name), open_adapter(folder, name)
    findings: list[Finding] = []
    entries = cast(Mapping[str, Tensor], file.entries)  # what sorts tensors reads their keys alone
    found = _sorted(config, entries, findings)
    modules: dict[str, Module] = {}
    if isinstance(config.method, WeightMethod):
        config = _with_tokens(config, found, findings)
        modules = _modules(config, found, findings)
        findings += _shared(config, modules, cast(Mapping[str, Entry], found.shared))
        findings += _patterns(config, {name: module for name, module in modules.items() if name not in config.beside})
    elif isinstance(config.method, AttentionMethod):
        findings += _blocks(config.method, found)
    findings += [*_dtypes(file.entries), *_scales(modules), *_start(config), *_saved(config, found), *_folder(Path(folder))]
    if not any((found.modules, found.prompt, found.shared)):
        findings.insert(0, Finding(WRONG, f"The file holds {len(file.entries)} tensors, and none of them is the adapter's."))
    return Inspection(folder=Path(folder), config=config, file=file, found=found, modules=modules, findings=tuple(findings))


def gathered(level: Level, problems: Mapping[str, str]) -> list[Finding]:
    """One finding for every kind of problem, by the names that have it: what is said of the first, and which others it holds for."""
    kinds: dict[str, list[str]] = {}
    for name, said in problems.items():
        kinds.setdefault(said.replace(name, "*"), []).append(name)
    found = []
    for first, *others in kinds.values():
        also = f"\n  And so {len(others)} more: {listed(folded(others))}." if others else ""
        found.append(Finding(level, problems[first] + also))
    return found


def listed(names: Sequence[str], most: int = NAMED) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---- what the tensors are


def _sorted(config: AdapterConfig, entries: Mapping[str, Tensor], findings: list[Finding]) -> Sorted:
    if copies := once_more(entries):
        again = f"{listed(list(copies))} should be {listed(list(dict.fromkeys(copies.values())))} once more"
        findings.append(Finding(ODD, f"{again}: HF wraps what is tied anew for every further adapter."))
        entries = {key: entry for key, entry in entries.items() if key not in copies}
    if not isinstance(config.method, Prompt):
        found, strangers = told_apart(config, entries)
        findings += gathered(WRONG, strangers)
        return found
    try:
        found = sort_tensors(config, entries)
        _check_prompt(config.method, cast(Mapping[str, Entry], found.prompt))
        return found
    except PeftRefError as error:
        findings.append(Finding(WRONG, str(error)))
        own = {key: entry for key, entry in entries.items() if key in config.method.file_keys}
        return Sorted({}, {}, {}, {}, own, {})


def _with_tokens(config: AdapterConfig, found: Sorted, findings: list[Finding]) -> AdapterConfig:
    """The configuration that knows which modules have trained tokens."""
    try:
        config = with_tokens_of(config, found.modules)
    except PeftRefError as error:
        findings.append(Finding(WRONG, str(error)))
    if config.tokens and not any(KEY in own for own in found.modules.values()):
        findings.append(Finding(WRONG, f"{WORD} asks for trained tokens, and the file has none ({KEY})."))
    return config


def _check_prompt(method: Prompt, own: Mapping[str, Entry]) -> None:
    fitted = method.fitted(own[SAVED].shape) if SAVED in own else method
    fitted.loaded({key: hollow(entry.shape) for key, entry in own.items()})


def _modules(config: AdapterConfig, found: Sorted, findings: list[Finding]) -> dict[str, Module]:
    alone = spanned(config, None, {key: tuple(entry.shape) for key, entry in found.shared.items()})
    made, problems = dict[str, Module](), dict[str, str]()
    layers, told = dict[Any, Layer](), dict[Any, tuple[bool, bool]]()  # most modules are alike
    if config.targets.target_parameters:
        findings.append(Finding(ODD, "target_parameters: which tensor belongs to which parameter, the model alone can tell."))
    for name, tensors in found.modules.items():
        own = cast(Mapping[str, Entry], tensors)
        try:
            method = alone.method_for(name)
        except PeftRefError as error:
            problems[name] = str(error)
            continue
        layer = None
        if not config.targets.target_parameters:
            like = (method, *((key, entry.shape) for key, entry in own.items()))
            try:
                layer = layers[like] if like in layers else layers.setdefault(like, _told_layer(config.method_for(name), method, own, name))
            except PeftRefError as error:
                problems[name] = str(error)
        if (method, layer) not in told:
            told[method, layer] = (False, False) if layer is None else _told_sizes(method, layer)
        made[name] = Module(method, layer, own, scale_of(config, name, layer), rank_of(method), told[method, layer])
    findings += gathered(WRONG, problems)
    return made


def _told_layer(alone: WeightMethod[Any], method: WeightMethod[Any], own: Mapping[str, Entry], name: str) -> Layer:
    """The layer that these tensors fit. `method` knows what its layers share, `alone` does not."""
    layer = infer_layer(alone, {key: hollow(entry.shape) for key, entry in own.items()}, name)
    check_fit(method, own, name, layer)
    return layer


def _told_sizes(method: WeightMethod[Any], layer: Layer) -> tuple[bool, bool]:
    """Whether the tensors' sizes tell what the layer gives out, and what it takes in: some size follows that one alone.

    What depends on whether there is a bias tells neither: with one more input and without a bias the tensors would be the same.
    """
    wide, deep = _doubled(layer)
    now, wider, deeper = (_sizes(method, other) for other in (layer, wide, deep))
    if isinstance(layer, Linear) and _sizes(method, replace(layer, bias=not layer.bias)) != now:
        return False, False
    with_out = {place for place in now if wider.get(place) != now[place]}
    with_in = {place for place in now if deeper.get(place) != now[place]}
    return bool(with_out - with_in), bool(with_in - with_out)


def _doubled(layer: Layer) -> tuple[Layer, Layer]:
    """The layer with twice as much that it gives out, and with twice as much that it takes in."""
    if isinstance(layer, Linear):
        return replace(layer, out_features=2 * layer.out_features), replace(layer, in_features=2 * layer.in_features)
    if isinstance(layer, Embedding):
        return replace(layer, embedding_dim=2 * layer.embedding_dim), replace(layer, num_embeddings=2 * layer.num_embeddings)
    if isinstance(layer, Conv):
        return replace(layer, out_channels=2 * layer.out_channels), replace(layer, in_channels=2 * layer.in_channels)
    return layer, layer


def _sizes(method: WeightMethod[Any], layer: Layer) -> dict[tuple[str, int], int]:
    """The sizes of the tensors that the method has on that layer, by key and axis."""
    try:
        specs = method.spec(layer)
    except PeftRefError:
        return {}
    return {(spec.key, axis): size for spec in specs if spec.saved for axis, size in enumerate(spec.stored_shape)}


def check_fit(method: WeightMethod[Any], own: Mapping[str, Entry], name: str, layer: Layer) -> None:
    """Raise what reading these tensors would raise, if they are not those of `method` on that layer."""
    method.check_layer(layer, name)
    method.unpack(layer, {key: hollow(entry.shape) for key, entry in own.items()}, where=PREFIX + name, own=True)


def _blocks(method: AttentionMethod[Any], found: Sorted) -> list[Finding]:
    problems = {}
    for name, tensors in found.modules.items():
        hollows = {key: hollow(tensor.shape) for key, tensor in tensors.items()}
        try:
            method.unpack(method.hidden_size_of(hollows), hollows, where=PREFIX + name)
        except PeftRefError as error:
            problems[name] = str(error)
    return gathered(WRONG, problems)


def _shared(config: AdapterConfig, modules: Mapping[str, Module], shared: Mapping[str, Entry]) -> list[Finding]:
    """What the layers share is there, in its shape, and nothing else."""
    problems, used = dict[str, str](), set[str]()
    known = {name: module for name, module in modules.items() if module.layer is not None}
    method = cast(WeightMethod[Any], config.method)
    keys = method.shared_keys(tuple(known)) if known else {}
    for name, (method, layer, *_) in known.items() if keys else ():
        for spec in method.spec(cast(Layer, layer)):
            if not spec.shared:
                continue
            key = keys[name][spec.field]
            used.add(key)
            if key not in shared and spec.saved:
                problems[key] = f"{SHARED_PREFIX}{key} is missing, which the modules share."
            elif key in shared and not spec.saved:
                problems[key] = f"{SHARED_PREFIX}{key} is there, and the configuration says that it is not saved: HF PEFT reads over it."
    if known:
        problems |= {key: f"{SHARED_PREFIX}{key} is shared by none of the modules." for key in shared.keys() - used}
    return gathered(WRONG, problems)


# ---- what is odd


def _patterns(config: AdapterConfig, modules: Mapping[str, Module]) -> list[Finding]:
    """Words of the configuration that decide about nothing in the file."""
    targets = config.targets
    if targets.target_parameters or not modules:  # a pattern may name a parameter; a file may hold nothing beside a layer
        return []
    findings = []
    if not hasattr(config.method, "live_r"):  # its rank_pattern is no patterns
        for word in ("rank_pattern", "alpha_pattern"):
            unused = unused_patterns(tuple(getattr(config.patterns, word)), modules)
            findings += [Finding(ODD, f"{word} {key!r} matches no module of the file.") for key in unused]
    if isinstance(targets.target_modules, tuple):
        idle = [t for t in targets.target_modules if not any(f".{name}".endswith(f".{t}") for name in modules)]
        findings += [Finding(ODD, f"target_modules names {listed(idle, 8)}, and the file has no such module.")] if idle else []
    elif targets.target_modules not in (None, "all-linear"):
        clock = Matcher()
        if astray := [name for name in modules if not clock.full(str(targets.target_modules), name)]:
            said = f"target_modules={targets.target_modules!r:.60} does not match {listed(folded(astray))}, which the file has."
            findings.append(Finding(ODD, said))
    return findings


def _dtypes(entries: Mapping[str, Entry]) -> list[Finding]:
    unknown = {
        key: f"{key} is {entry.dtype}, which is no NumPy dtype here.\n  Convert the adapter to F32."
        for key, entry in entries.items()
        if entry.dtype not in dtypes()
    }
    count = Counter(entry.dtype for entry in entries.values() if entry.dtype.startswith(("F", "BF")))
    told = ", ".join(f"{n} of {dtype}" for dtype, n in count.items())
    return [*gathered(WRONG, unknown), *([Finding(ODD, f"Dtypes of the tensors are mixed: {told}.")] if len(count) > 1 else [])]


def _scales(modules: Mapping[str, Module]) -> list[Finding]:
    astray, nought, high = dict[str, str](), dict[str, str](), dict[str, str]()
    for name, m in modules.items():
        if m.scale is not None and not math.isfinite(m.scale.value):
            astray[name] = f"{name}: the scale is {m.scale.value} ({m.scale.said()})."
        elif m.scale is not None and m.scale.value == 0:
            nought[name] = f"{name}: the scale is 0 ({m.scale.said()}), so the adapter changes nothing there."
        if isinstance(m.method, LowRank) and all(m.told) and m.layer is not None and m.rank is not None and m.rank > min(m.layer.shape):
            out, n_in = m.layer.shape
            high[name] = f"{name}: rank {m.rank} on a matrix of {out} x {n_in}, which can have no more than {min(m.layer.shape)}."
    return [*gathered(WRONG, astray), *gathered(ODD, nought), *gathered(ODD, high)]


def _start(config: AdapterConfig) -> list[Finding]:
    init = flatten(config).get("init_lora_weights") if config.method.peft_type == "LORA" else None
    if not str(init).lower().startswith(CHANGING):
        return []
    said = f"init_lora_weights={init!r} took a part off the frozen weight: the adapter belongs to what is left, not to the base as it is."
    return [
        Finding(
            ODD, f"{said}\n  HF PEFT takes it off again when it loads; `peft-ref convert --initial` makes a LoRA for the base as it is."
        )
    ]


def _saved(config: AdapterConfig, found: Sorted) -> list[Finding]:
    """Modules that are to be saved in full, and are not there. Of those that a task adds, one of several names is enough."""
    of_task = SAVED_BY_TASK.get(str(config.housekeeping.get("task_type")), ())
    saved = [name for name in config.targets.modules_to_save or () if name not in of_task]
    idle = [name for name in saved if not any(f".{name}." in f".{key}" for key in found.modules_to_save)]
    return [Finding(ODD, f"modules_to_save names {listed(idle, 8)}, and the file has no such tensor.")] if idle else []


def _folder(folder: Path) -> list[Finding]:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES and p.name.startswith("adapter"))
    others = [name for name in adapter_names(folder) if name != DEFAULT]
    findings = [Finding(ODD, f"{name} lies beside it: a pickle, which runs code when it is read. Not read.") for name in pickles]
    return findings + ([Finding(ODD, f"Other adapters are in folders below: {listed(others, 8)}.")] if others else [])
