"""An adapter folder, or a checkpoint, as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from peft_ref.checkpoints.folding import families
from peft_ref.checkpoints.inspecting import WRONG, Finding
from peft_ref.checkpoints.inspecting_base import Base
from peft_ref.errors import clean
from peft_ref.report.inspecting import ENERGIES, Row, Told, facts, headline, many, number, percent, profile, rows, size, span
from peft_ref.report.terminal import Paint

WIDTH = 110
BARS = "▁▂▃▄▅▆▇█"
MOST_BARS = 16
LABEL = 17


def render(told: Told, each: bool = False, color: bool = False) -> str:
    """Everything, the verdict last."""
    paint = Paint(color)
    word, sentence = headline(told)
    parts = ["\n".join(_fact(label, text, paint) for label, text in facts(told))]
    if told.inspection.modules:
        parts.append(_modules(rows(told, each), paint))
    parts += [_findings(told.findings, paint), *(_elsewhere(told, program, paint) for program in told.elsewhere)]
    parts.append(f"{paint(word.upper(), 'bad' if told.bad else 'good', 'bold')}  {clean(sentence)}")
    return "\n\n".join(part for part in parts if part)


def render_base(base: Base, color: bool = False) -> str:
    paint = Paint(color)
    names = base.config.get("architectures") or []
    told = [
        ("checkpoint", f"{base.config.get('model_type') or 'no config.json'}{f', {names[0]}' if names else ''}"),
        ("parameters", f"{number(base.parameters)} in {many(len(base.entries), 'tensor')}, {size(base.size)}"),
        ("dtypes", ", ".join(f"{dtype} ({number(n)})" for dtype, n in base.dtypes.items())),
        ("tied", ", ".join(f"{second} is {first}" for second, first in base.tied.items())),
    ]
    wide = max((len(shard.name) for shard in base.shards), default=0)
    shards = [f"  {clean(s.name):{wide}}  {size(s.size):>9}  {many(len(s.entries), 'tensor')}" for s in base.shards]
    kinds: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, entry in base.entries.items():
        kinds.setdefault((entry.dtype, entry.shape), []).append(name)
    tensors = [(text, dtype, shape) for (dtype, shape), found in kinds.items() for text in families(found)]
    lines = [f"  {dtype:8} {' x '.join(map(str, shape)) or 'one number':>16}  {clean(text)}" for text, dtype, shape in tensors]
    parts = [
        "\n".join(_fact(label, text, paint) for label, text in told if text),
        "\n".join(shards),
        "\n".join(lines),
        _findings(base.findings, paint),
    ]
    return "\n\n".join(part for part in parts if part)


def bars(values: Sequence[float]) -> str:
    """Numbers from 0 to 1 as bars of eight heights; many of them in groups, each as high as its highest."""
    wide = -(-len(values) // MOST_BARS) if values else 1
    highest = [max(values[n : n + wide]) for n in range(0, len(values), wide)]
    return "".join(BARS[min(int(v * len(BARS)), len(BARS) - 1)] for v in highest)


def _fact(label: str, text: str, paint: Paint) -> str:
    lines = textwrap.wrap(clean(text), WIDTH - LABEL - 2, break_on_hyphens=False) or [""]
    return "\n".join([f"  {paint(f'{label:<{LABEL}}', 'dim')}{lines[0]}", *(" " * (LABEL + 2) + line for line in lines[1:])])


def _modules(found: Sequence[Row], paint: Paint) -> str:
    measured = any(row.deltas for row in found)
    head = ["out x in", "rank", "scale", "parameters"]
    lines = []
    for row in found:
        scale = row.module.scale
        cells = [row.size, str(row.module.rank or ""), "" if scale is None else f"{scale.value:.6g}", number(row.parameters)]
        cells += [_norm(row), _relative(row), *_ranks(row)] if measured else []
        lines.append(
            (clean(row.name), f"{len(row.members)}", cells, [] if scale is None else [scale.said()], profile(row.deltas), _why(row))
        )
    head += ["|delta|", "of |W|", "eff. rank", *(f"{share:.0%}" for share in ENERGIES)] if measured else []
    keep = [n for n in range(len(head)) if any(cells[n] for _, _, cells, *_ in lines)]
    wide = {n: max(len(head[n]), *(len(cells[n]) for _, _, cells, *_ in lines)) for n in keep}
    alike = len({tuple(scales) for _, _, _, scales, *_ in lines}) == 1 and len(lines) > 1
    out = [paint("  modules" + " " * 6 + "  ".join(f"{head[n]:>{wide[n]}}" for n in keep), "dim")]
    for name, n, cells, scales, shape, why in lines:
        out.append(f"  {name}")
        out.append(f"  {f'{n} of them':<13}" + "  ".join(f"{cells[k]:>{wide[k]}}" for k in keep) + (f"  {bars(shape)}" if shape else ""))
        out += [paint(f"  {'':<13}scale: {text}", "dim") for text in scales if not alike]
        out += [paint(f"  {'':<13}not told: {clean(text)}", "doubtful") for text in why]
    out += [paint(f"  every scale: {text}", "dim") for text in lines[0][3] if alike]
    return "\n".join(out)


def _norm(row: Row) -> str:
    return span(found) if (found := [d.norm for d in row.deltas if d.norm is not None]) else ""


def _relative(row: Row) -> str:
    return percent(found) if (found := [d.relative for d in row.deltas if d.relative is not None]) else ""


def _ranks(row: Row) -> list[str]:
    effective = [e for d in row.deltas if (e := d.effective_rank) is not None]
    energies = [[float(k) for d in row.deltas if (k := d.rank_of_energy(share)) is not None] for share in ENERGIES]
    return [span(effective, ".1f") if effective else "", *(span(found, ".0f") if found else "" for found in energies)]


def _why(row: Row) -> list[str]:
    return list(dict.fromkeys(d.why_not for d in row.deltas if d.why_not))


def _findings(findings: Sequence[Finding], paint: Paint) -> str:
    out = []
    for finding in findings:
        first, *more = (
            line for part in clean(finding.said).splitlines() for line in textwrap.wrap(part, WIDTH - 9, break_on_hyphens=False)
        )
        out.append(f"  {paint(f'{finding.level:<7}', 'bad' if finding.level == WRONG else 'doubtful')}{first}")
        out += [f"         {line}" for line in more]
    return "\n".join(out)


def _elsewhere(told: Told, program: str, paint: Paint) -> str:
    found = told.elsewhere[program]
    if not found:
        return f"  {program}: nothing that is known here stands in the way."
    out = [f"  {paint(program, 'bold')}"]
    for v in found:
        out.append(f"  {paint(f'{v.rule.outcome:<9}', 'bad' if v.bad else 'doubtful')}{v.rule.said}")
        by = textwrap.wrap(clean("; ".join(v.by[:4]) + (f" and {len(v.by) - 4} more" if len(v.by) > 4 else "")), WIDTH - 11)
        out += [f"           {line}" for line in by]
        out.append(paint(f"           {v.rule.source}", "dim"))
    return "\n".join(out)
