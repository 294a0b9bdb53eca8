"""What there is to say of an adapter folder, worked out once: facts, rows of modules that are alike, JSON.

`inspect_text` and `inspect_html` lay it out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from peft_ref.attending import AttentionMethod
from peft_ref.checkpoints.elsewhere import Verdict
from peft_ref.checkpoints.fitting import Fit
from peft_ref.checkpoints.folding import families, folded
from peft_ref.checkpoints.inspecting import WRONG, Finding, Inspection, Module, parameters
from peft_ref.checkpoints.inspecting_base import Base
from peft_ref.checkpoints.spectrum import DeltaNumbers, Measured
from peft_ref.files.safetensors import Entry
from peft_ref.files.tokens import WORD
from peft_ref.prompts import Prompt

VERSION = 1
ENERGIES = (0.9, 0.99)


@dataclass(frozen=True, eq=False, kw_only=True)
class Told:
    inspection: Inspection
    fit: Fit | None = None
    measured: Measured | None = None
    elsewhere: Mapping[str, tuple[Verdict, ...]] = field(default_factory=dict)

    @property
    def findings(self) -> tuple[Finding, ...]:
        more = (*(self.fit.findings if self.fit else ()), *(self.measured.findings if self.measured else ()))
        return (*self.inspection.findings, *more)

    @property
    def bad(self) -> bool:
        """Whether anything is wrong with it, or with taking it elsewhere."""
        return any(f.level == WRONG for f in self.findings) or any(v.bad for found in self.elsewhere.values() for v in found)

    def sizes(self, module: str) -> tuple[int, int] | None:
        """(out, in) of a module's weight matrix in the base."""
        layer = None if self.fit is None else self.fit.layers.get(module)
        return None if layer is None else layer.shape

    def delta(self, module: str) -> DeltaNumbers | None:
        return None if self.measured is None else self.measured.deltas.get(module)


class Row(NamedTuple):
    """Modules that are alike."""

    name: str  # folded
    members: tuple[str, ...]
    module: Module  # one of them
    deltas: tuple[DeltaNumbers, ...]
    sizes: tuple[int, int] | None = None  # (out, in), where a base told them

    @property
    def size(self) -> str:
        return " x ".join("?" if size is None else str(size) for size in (self.sizes or self.module.sizes))

    @property
    def parameters(self) -> int:
        return self.module.parameters * len(self.members)


def rows(told: Told, each: bool = False) -> list[Row]:
    """The modules, those that are alike in one row; with `each` one row for every module."""
    modules = told.inspection.modules
    kinds: dict[Any, list[str]] = {}
    for name, m in modules.items():
        like = (
            m.layer,
            told.sizes(name),
            m.rank,
            m.scale and (m.scale.value, m.scale.said()),
            tuple((k, e.dtype, e.shape) for k, e in m.tensors.items()),
        )
        kinds.setdefault(name if each else like, []).append(name)
    found = []
    for names in kinds.values():
        for text, members in families(names).items():
            deltas = tuple(d for name in members if (d := told.delta(name)) is not None)
            found.append(Row(text, members, modules[members[0]], deltas, told.sizes(members[0])))
    return found


def headline(told: Told) -> tuple[str, str]:
    """In one word, and in one sentence."""
    wrong = [f for f in told.findings if f.level == WRONG]
    away = {program: [v for v in found if v.bad] for program, found in told.elsewhere.items()}
    if wrong:
        return "Wrong", wrong[0].said.splitlines()[0]
    if lost := [program for program, found in away.items() if found]:
        refusing = [p for p in lost if any(v.rule.outcome == "refuses" for v in away[p])]
        parts = [f"{' and '.join(refusing)} would not load it"] if refusing else []
        parts += [f"{' and '.join(p for p in lost if p not in refusing)} would compute something else"] if len(refusing) < len(lost) else []
        return "Not elsewhere", f"The adapter is fine, and {', and '.join(parts)}."
    odd = len(told.findings)
    compared = told.fit is not None and bool(told.fit.layers or not told.inspection.modules)
    what = "There is nothing wrong with it" if not compared else "It fits the base, and there is nothing wrong with it"
    return "Fine", what + (f"; {many(odd, 'thing')} to know." if odd else ".")


def facts(told: Told) -> list[tuple[str, str]]:
    """Labels and what there is to say, in order."""
    i = told.inspection
    flat, keeping = i.flat, i.config.housekeeping
    base = keeping.get("base_model_name_or_path")
    revision = keeping.get("revision")
    found = [
        ("method", " ".join([i.method, *variants(i)])),
        ("base model", f"{base or 'not said'}{f' at {revision}' if revision else ''}"),
        ("task", str(keeping.get("task_type") or "not said")),
        ("PEFT", str(keeping.get("peft_version") or "not said")),
        ("settings", ", ".join(f"{name}={_json(value)}" for name, value in i.settings.items()) or "the method's defaults"),
        ("targets", _json(flat["target_modules"]) if flat.get("target_modules") is not None else ""),
        ("patterns", "; ".join(f"{w} {_json(flat[w])}" for w in ("rank_pattern", "alpha_pattern") if flat.get(w))),
        ("trained tokens", _json(flat[WORD]) if i.config.tokens else ""),
        ("file", _file(i)),
        *((kind.replace("_", " "), beside(entries)) for kind, entries in i.beside.items()),
    ]
    if isinstance(i.config.method, AttentionMethod):
        found.append(("blocks", ", ".join(folded(i.found.modules))))
    if told.fit is not None and told.fit.changed:
        fit = told.fit
        share = fit.changed_parameters / max(fit.parameters, 1)
        found.append(
            ("of the base", f"{len(fit.changed)} of {len(fit.graph.parameters())} tensors are changed, {share:.1%} of its parameters")
        )
    return [(label, text) for label, text in found if text]


def _file(i: Inspection) -> str:
    entries = i.file.entries.values()
    return f"{many(len(entries), 'tensor')}, {number(parameters(entries))} parameters, {size(_bytes(i))}, {held(entries)}"


def variants(inspection: Inspection) -> list[str]:
    """What else the method is called: switches and starts with names."""
    settings = inspection.settings
    named = [f"with {name}" for name, value in settings.items() if value is True and name.startswith("use_")]
    starts = [f"from {value}" for name, value in settings.items() if name.startswith("init_") and isinstance(value, str)]
    kind = inspection.config.method.peft_type
    flag = type(inspection.config.method).switch()
    told = [*([] if kind == inspection.method.upper() else [kind]), *([flag] if flag else [])]
    return [*named, *starts, *([f"({', '.join(told)})"] if told else [])]


def beside(entries: Mapping[str, Entry]) -> str:
    names = folded(entries)
    told = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{many(len(entries), 'tensor')}, {number(parameters(entries.values()))} parameters: {told}"


def held(entries: Iterable[Entry]) -> str:
    """The dtypes, the most frequent first."""
    count: dict[str, int] = {}
    for entry in entries:
        count[entry.dtype] = count.get(entry.dtype, 0) + 1
    return ", ".join(sorted(count, key=lambda dtype: -count[dtype])) or "nothing"


def number(n: int) -> str:
    """1234567 as 1.23 M."""
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if n >= 10**power:
            return f"{n / 10**power:.3g} {letter}"
    return str(n)


def size(n: int) -> str:
    return f"{number(n)}B" if n >= 1000 else f"{n} bytes"


def many(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def span(values: Sequence[float], form: str = ".3g") -> str:
    """The least and the most."""
    low, high = (f"{v:{form}}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def percent(shares: Sequence[float]) -> str:
    low, high = (f"{100 * v:.0f}" if v >= 0.1 else f"{100 * v:.2g}" for v in (min(shares), max(shares)))
    return f"{low if low == high else f'{low} to {high}'} %"


def profile(deltas: Sequence[DeltaNumbers]) -> list[float]:
    """The singular values over the largest, each the mean over the modules."""
    given = [d.singular for d in deltas if d.singular and d.singular[0] > 0]
    if not given:
        return []
    n = min(len(s) for s in given)
    return [sum(s[i] / s[0] for s in given) / len(given) for i in range(n)]


def _bytes(inspection: Inspection) -> int:
    return max((entry.end for entry in inspection.file.entries.values()), default=0)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


# ---- JSON


def to_json(told: Told) -> dict[str, Any]:
    """Everything, every module in full."""
    i = told.inspection
    keeping = i.config.housekeeping
    out: dict[str, Any] = {
        "peft_ref_inspect": VERSION,
        "folder": str(i.folder),
        "method": i.method,
        "peft_type": i.config.method.peft_type,
        "switch": type(i.config.method).switch(),
        "settings": i.settings,
        "base_model": keeping.get("base_model_name_or_path"),
        "task_type": keeping.get("task_type"),
        "peft_version": keeping.get("peft_version"),
        "adapter_config": i.flat,
        "tensors": len(i.file.entries),
        "parameters": parameters(i.file.entries.values()),
        "bytes": _bytes(i),
        "dtypes": sorted({entry.dtype for entry in i.file.entries.values()}),
        "modules": {name: _module(told, name, module) for name, module in i.modules.items()},
        "blocks": list(i.found.modules) if isinstance(i.config.method, AttentionMethod) else [],
        "prompt": isinstance(i.config.method, Prompt),
        "beside": {kind: {key: _entry(entry) for key, entry in entries.items()} for kind, entries in i.beside.items()},
        "findings": [finding._asdict() for finding in told.findings],
        "elsewhere": {program: [_verdict(v) for v in found] for program, found in told.elsewhere.items()},
        "fine": not told.bad,
    }
    if told.fit is not None:
        out["base"] = {
            "folder": str(getattr(told.fit.graph, "folder", "")),
            "fits": sorted(told.fit.layers),
            "changed": list(told.fit.changed),
            "parameters": told.fit.parameters,
            "changed_parameters": told.fit.changed_parameters,
        }
    if told.measured is not None:
        out["numbers"] = {key: numbers._asdict() for key, numbers in told.measured.tensors.items()}
    finite: dict[str, Any] = _finite(out)
    return finite


def base_json(base: Base) -> dict[str, Any]:
    return {
        "peft_ref_inspect": VERSION,
        "folder": str(base.folder),
        "model_type": base.config.get("model_type"),
        "architectures": base.config.get("architectures"),
        "tensors": {name: _entry(entry) for name, entry in base.entries.items()},
        "parameters": base.parameters,
        "bytes": base.size,
        "dtypes": base.dtypes,
        "shards": {shard.name: {"bytes": shard.size, "tensors": len(shard.entries)} for shard in base.shards},
        "tied": dict(base.tied),
        "findings": [finding._asdict() for finding in base.findings],
    }


def _module(told: Told, name: str, module: Module) -> dict[str, Any]:
    out: dict[str, Any] = {
        "kind": None if module.layer is None else module.layer.kind,
        "shape": list(told.sizes(name) or module.sizes),
        "rank": module.rank,
        "scale": None if module.scale is None else module.scale.value,
        "scale_from": None if module.scale is None else module.scale.said(),
        "parameters": module.parameters,
        "tensors": {key: _entry(entry) for key, entry in module.tensors.items()},
    }
    if (delta := told.delta(name)) is not None:
        out |= {
            "delta_norm": delta.norm,
            "relative_norm": delta.relative,
            "singular_values": delta.singular,
            "not_told": delta.why_not or None,
        }
        out |= {"effective_rank": delta.effective_rank}
        out |= {f"rank_of_{share:.0%}_energy".replace("%", ""): delta.rank_of_energy(share) for share in ENERGIES}
    return out


def _entry(entry: Entry) -> dict[str, Any]:
    return {"dtype": entry.dtype, "shape": list(entry.shape)}


def _verdict(v: Verdict) -> dict[str, Any]:
    return {"rule": v.rule.name, "outcome": v.rule.outcome, "said": v.rule.said, "by": list(v.by), "source": v.rule.source.url}


def _finite(value: Any) -> Any:
    """The same with text for what JSON has no word for, NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
