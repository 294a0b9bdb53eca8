"""The loss over a training as a picture: one SVG file that needs no other, written by hand.

Every step's loss as a thin line, and over it the mean of the steps around it, as wide as a twentieth of the training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from peft_ref.report.drawing import COLOURS, GRID, INK, PAPER, SOFT, escaped, nice, text

WIDTH, HEIGHT = 1000, 480
LEFT, RIGHT, TOP, BOTTOM = 80, 960, 90, 410  # the plot
POINTS = 800  # of a line: a longer training is drawn by means


class _Axes(NamedTuple):
    steps: int
    low: float
    high: float

    def x(self, step: float) -> float:
        return LEFT + (RIGHT - LEFT) * (step - 1) / max(self.steps - 1, 1)

    def y(self, loss: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (loss - self.low) / (self.high - self.low)


def svg(losses: Sequence[float], title: str = "Loss of the training", subtitle: str = "") -> str:
    if not losses or not all(map(math.isfinite, losses)):
        raise ValueError("a picture needs at least one loss, and finite ones")
    tick = _tick(max(losses) - min(losses) or 1.0)
    low = math.floor(min(losses) / tick) * tick
    axes = _Axes(len(losses), low, max(math.ceil(max(losses) / tick) * tick, low + tick))
    middle = (TOP + BOTTOM) / 2
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img"'
            f' font-family="Helvetica, Arial, sans-serif" font-size="14" fill="{INK}">',
            f"<title>{escaped(title)}</title>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>',
            text(LEFT, 38, title, size=21, weight="bold"),
            text(LEFT, 62, subtitle, colour=SOFT),
            *_grid(axes, tick),
            _line(losses, axes, f'stroke="{COLOURS[4]}" stroke-width="1"'),
            _line(_smoothed(losses), axes, f'stroke="{COLOURS[0]}" stroke-width="2.6"'),
            text((LEFT + RIGHT) / 2, BOTTOM + 48, "step of the training", anchor="middle"),
            f'<g transform="rotate(-90 24 {middle})">{text(24, middle, "loss", anchor="middle")}</g>',
            "</svg>\n",
        ]
    )


def _tick(span: float) -> float:
    """1, 2 or 5 times a power of ten, at most ten of them in the span."""
    power = 10.0 ** math.floor(math.log10(span / 10))
    return next(f * power for f in (1, 2, 5, 10) if span <= 10.5 * f * power)


def _grid(axes: _Axes, tick: float) -> Iterator[str]:
    for n in range(round((axes.high - axes.low) / tick) + 1):
        loss = axes.low + n * tick
        yield f'<path d="M{LEFT} {axes.y(loss):.1f}H{RIGHT}" stroke="{GRID}"/>'
        yield text(LEFT - 10, axes.y(loss) + 5, f"{loss:.6g}", anchor="end", colour=SOFT)
    every = nice(axes.steps, 12)
    for step in sorted({1, *range(every, axes.steps + 1, every)} - ({every} if every > 1 and every < axes.steps / 14 else set())):
        yield f'<path d="M{axes.x(step):.1f} {BOTTOM}v6" stroke="{SOFT}"/>'
        yield text(axes.x(step), BOTTOM + 22, str(step), anchor="middle", colour=SOFT)
    yield f'<path d="M{LEFT} {BOTTOM}H{RIGHT}" stroke="{SOFT}"/>'


def _smoothed(losses: Sequence[float]) -> list[float]:
    half = len(losses) // 40
    around = [losses[max(0, n - half) : n + half + 1] for n in range(len(losses))]
    return [sum(near) / len(near) for near in around]


def _line(losses: Sequence[float], axes: _Axes, style: str) -> str:
    wide = -(-len(losses) // POINTS)
    groups = [(n, losses[n : n + wide]) for n in range(0, len(losses), wide)]
    points = [(n + 1 + (len(group) - 1) / 2, sum(group) / len(group)) for n, group in groups]
    path = "L".join(f"{axes.x(step):.1f} {axes.y(loss):.1f}" for step, loss in points)
    return f'<path d="M{path}" fill="none" stroke-linejoin="round" stroke-linecap="round" {style}/>'
