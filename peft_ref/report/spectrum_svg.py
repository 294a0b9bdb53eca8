"""The singular values of an adapter's deltas as a picture: one SVG file that needs no other, written by hand.

A panel for every kind of module (q_proj, v_proj ...), and in it a line for every layer, from light for the first to dark for the last. All
panels have one logarithmic scale, so that it can be seen where the adapter does most. A line that falls at once has few directions, a flat
one many. What is smaller than the largest by more than DECADES powers of ten runs along the bottom.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from peft_ref.checkpoints.folding import folded
from peft_ref.checkpoints.spectrum import DeltaNumbers
from peft_ref.errors import ConfigError
from peft_ref.report.drawing import GRID, INK, PAPER, SOFT, escaped, nice, text
from peft_ref.report.inspecting import percent

WIDTH, COLUMNS = 1000, 3
LEFT, TOP, GAP = 56, 112, 26
PANEL_WIDTH, PANEL_HEIGHT, ROW = 290, 150, 218
MOST_PANELS, MOST_POINTS, MOST_LINES, DECADES = 12, 64, 200, 5
LIGHT, DARK = (158, 202, 225), (8, 48, 107)


class _Scale(NamedTuple):
    """Logarithms to the base of ten: of the bottom of the picture and of its top."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> _Scale:
        given = [v for v in values if v > 0] or [1.0]
        high = math.log10(max(given)) + 0.05
        return cls(max(min(math.log10(min(given)) - 0.05, high - 1), high - DECADES), high)

    def y(self, value: float) -> float:
        """Below the top of a panel."""
        part = (math.log10(value) - self.low) / (self.high - self.low) if value > 0 else 0.0
        return PANEL_HEIGHT * (1 - min(max(part, 0.0), 1.0))


class _Panel(NamedTuple):
    name: str  # folded
    lines: tuple[tuple[float, ...], ...]  # singular values, in the order of the layers
    deltas: tuple[DeltaNumbers, ...]


def svg(deltas: Mapping[str, DeltaNumbers], title: str = "Singular values of what the adapter adds", subtitle: str = "") -> str:
    panels = _panels(deltas)
    if not panels:
        why = next((d.why_not for d in deltas.values() if d.why_not), "there is no adapted weight")
        raise ConfigError(f"there are no singular values to draw: {why}.")
    shown = panels[:MOST_PANELS]
    scale = _Scale.of([value for panel in panels for line in panel.lines for value in line])
    height = TOP + ROW * -(-len(shown) // COLUMNS) + 10
    left_out = f"{len(panels) - len(shown)} more kinds of modules are not drawn." if len(panels) > len(shown) else ""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img"'
            f' font-family="Helvetica, Arial, sans-serif" font-size="14" fill="{INK}">',
            f"<title>{escaped(title)}</title>",
            f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}"/>',
            text(24, 38, title, size=21, weight="bold"),
            text(24, 62, " ".join(part for part in (subtitle, left_out) if part), colour=SOFT),
            *_legend(max(len(panel.lines) for panel in shown)),
            *(mark for n, panel in enumerate(shown) for mark in _drawn(n, panel, scale)),
            "</svg>\n",
        ]
    )


def _panels(deltas: Mapping[str, DeltaNumbers]) -> list[_Panel]:
    kinds: dict[str, list[str]] = {}
    for name, delta in deltas.items():
        if delta.singular:
            kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    found = []
    for names in kinds.values():
        names.sort(key=lambda name: [int(part) for part in name.split(".") if part.isdecimal()])
        own = tuple(deltas[name] for name in names)
        found.append(_Panel(", ".join(folded(names)), tuple(tuple(d.singular or ()) for d in own), own))
    return found


def _legend(n: int) -> Iterator[str]:
    if n < 2:
        return
    for step in range(24):
        yield f'<rect x="{WIDTH - 236 + 5 * step}" y="28" width="5.5" height="10" fill="{_colour(step / 23)}"/>'
    yield text(WIDTH - 244, 38, "first layer", size=12, colour=SOFT, anchor="end")
    yield text(WIDTH - 108, 38, "last layer", size=12, colour=SOFT)


def _drawn(place: int, panel: _Panel, scale: _Scale) -> Iterator[str]:
    x0, y0 = LEFT + (place % COLUMNS) * (PANEL_WIDTH + GAP), TOP + (place // COLUMNS) * ROW
    n = max(max(len(line) for line in panel.lines), 2)
    yield text(x0, y0 - 10, _short(panel.name), size=12, weight="bold")
    for power in range(math.ceil(scale.low), math.floor(scale.high) + 1):
        y = y0 + scale.y(10.0**power)
        yield f'<path d="M{x0} {y:.1f}h{PANEL_WIDTH}" stroke="{GRID}"/>'
        if place % COLUMNS == 0:
            yield text(x0 - 6, y + 4, f"{10.0**power:g}", size=11, colour=SOFT, anchor="end")
    tick = nice(n - 1, 6)
    for k in sorted({1, *range(tick, n + 1, tick)} - ({tick} if 1 < tick < n / 10 else set())):
        yield text(x0 + PANEL_WIDTH * (k - 1) / (n - 1), y0 + PANEL_HEIGHT + 16, str(k), size=11, colour=SOFT, anchor="middle")
    every = -(-len(panel.lines) // MOST_LINES)
    for i in range(0, len(panel.lines), every):
        yield _line(panel.lines[i], x0, y0, n, scale, _colour(i / max(len(panel.lines) - 1, 1)))
    yield text(x0, y0 + PANEL_HEIGHT + 34, _told(panel), size=11, colour=SOFT)


def _line(values: Sequence[float], x0: float, y0: float, n: int, scale: _Scale, colour: str) -> str:
    every = -(-len(values) // MOST_POINTS)
    points = [(i, values[i]) for i in [*range(0, len(values), every), *([len(values) - 1] if (len(values) - 1) % every else [])]]
    places = [f"{x0 + PANEL_WIDTH * i / (n - 1):.1f} {y0 + scale.y(v):.1f}" for i, v in points]
    if len(places) == 1:
        x, y = places[0].split()
        return f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>'
    return f'<path d="M{"L".join(places)}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-linejoin="round"/>'


def _told(panel: _Panel) -> str:
    effective = [e for d in panel.deltas if (e := d.effective_rank) is not None]
    low, high = (f"{v:.1f}" for v in (min(effective), max(effective)))
    of = f"effective rank {low if low == high else f'{low} to {high}'}"
    relative = [d.relative for d in panel.deltas if d.relative is not None]
    return of + (f", {percent(relative)} of |W|" if relative else "")


def _short(name: str) -> str:
    return name if len(name) <= 44 else f"...{name[-41:]}"


def _colour(depth: float) -> str:
    return "#" + "".join(f"{round(a + (b - a) * depth):02x}" for a, b in zip(LIGHT, DARK, strict=True))
