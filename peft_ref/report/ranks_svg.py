"""The ranks of the modules over a training as a picture: one SVG file that needs no other, written by hand.

A line in steps for every module, named at its end; the mean rank that the budget allows as a dashed line; behind them the phases of the
schedule. Lines that share a rank run side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from peft_ref.methods.adalora_allocator import last_allocation
from peft_ref.report.drawing import COLOURS, GRID, INK, PAPER, SOFT, escaped, nice, text
from peft_ref.report.ranks import History

WIDTH, HEIGHT = 1000, 540
LEFT, RIGHT, TOP, BOTTOM = 70, 710, 110, 470  # the plot
WARM, FROZEN = "#faf3e0", "#e9eff5"
APART = 4.0  # pixels between lines of one rank
ROW = 19.0  # and between two names
LONGEST = 28  # characters of a name


class Mark(NamedTuple):
    """A line of the picture, with what stands at its end."""

    name: str
    values: Sequence[float]
    colour: str
    offset: float = 0.0
    dash: str = ""
    width: float = 2.6


class Axes(NamedTuple):
    first: int
    last: int
    top: int

    def x(self, step: float) -> float:
        return LEFT + (RIGHT - LEFT) * (step - self.first) / max(self.last - self.first, 1)

    def y(self, rank: float) -> float:
        return BOTTOM - 16 - (BOTTOM - TOP - 40) * rank / max(self.top, 1)


def svg(history: History, title: str = "AdaLoRA: how the allocator shares out the ranks") -> str:
    axes = Axes(history.steps[0], history.steps[-1], max(max(ranks) for ranks in history.ranks.values()))
    n = len(history.ranks)
    marks = [Mark("budget, for each module", [b / n for b in history.budget], INK, dash="6 4", width=1.6)]
    for i, (name, ranks) in enumerate(history.ranks.items()):
        dash = "" if i < len(COLOURS) else "9 3"
        marks.append(Mark(name, ranks, COLOURS[i % len(COLOURS)], (i - (n - 1) / 2) * min(APART, 24 / n), dash))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img"'
            f' font-family="Helvetica, Arial, sans-serif" font-size="14" fill="{INK}">',
            f"<title>{escaped(title)}</title>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>',
            text(LEFT, 38, title, size=21, weight="bold"),
            text(LEFT, 62, _settings(history), colour=SOFT),
            *_phases(history, axes),
            *_grid(axes),
            *(_line(mark, history.steps, axes) for mark in marks),
            *_names(marks, axes),
            "</svg>\n",
        ]
    )


def _settings(history: History) -> str:
    m = history.method
    return (
        f"init_r {m.init_r}, target_r {m.target_r}, tinit {m.tinit}, tfinal {m.tfinal}, deltaT {m.deltaT}, total_step {m.total_step},"
        f" beta1 {m.beta1:g}, beta2 {m.beta2:g}"
    )


def _phases(history: History, axes: Axes) -> Iterator[str]:
    m, last = history.method, last_allocation(history.method)
    beat = "ranks are allocated at every step" if m.deltaT == 1 else f"ranks are allocated every {m.deltaT} steps"
    for start, end, colour, told in (
        (axes.first, m.tinit, WARM, "warm-up"),
        (m.tinit, last, PAPER, beat),
        (last, axes.last, FROZEN, "the pattern is frozen"),
    ):
        left, right = (axes.x(min(max(step, axes.first), axes.last)) for step in (start, end))
        if right > left:
            yield f'<rect x="{left:.1f}" y="{TOP - 22}" width="{right - left:.1f}" height="{BOTTOM - TOP + 22}" fill="{colour}"/>'
            fitting = next((t for t in (told, told.split()[-1]) if 6.4 * len(t) < right - left), "")
            yield text((left + right) / 2, TOP - 7, fitting, size=12, colour=SOFT, anchor="middle")


def _grid(axes: Axes) -> Iterator[str]:
    for rank in range(0, axes.top + 1, nice(axes.top, 12)):
        y = axes.y(rank)
        yield f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="{GRID}"/>'
        yield text(LEFT - 10, y + 5, str(rank), anchor="end", colour=SOFT)
    tick = nice(axes.last - axes.first, 10)
    for step in range(-(-axes.first // tick) * tick, axes.last + 1, tick):
        yield f'<path d="M{axes.x(step):.1f} {BOTTOM}v6" stroke="{SOFT}"/>'
        yield text(axes.x(step), BOTTOM + 22, str(step), anchor="middle", colour=SOFT)
    yield f'<path d="M{LEFT} {BOTTOM}H{RIGHT}" stroke="{SOFT}"/>'
    yield text((LEFT + RIGHT) / 2, BOTTOM + 48, "step of the training", anchor="middle")
    middle = (TOP + BOTTOM) / 2
    yield f'<g transform="rotate(-90 24 {middle})">{text(24, middle, "rank of a module: triplets that stay", anchor="middle")}</g>'


def _line(mark: Mark, steps: Sequence[int], axes: Axes) -> str:
    """A rank holds from its step until the next one."""
    path = f"M{axes.x(steps[0]):.1f} {axes.y(mark.values[0]) + mark.offset:.1f}"
    for step, before, value in zip(steps[1:], mark.values, mark.values[1:], strict=False):
        if value != before:
            path += f"H{axes.x(step):.1f}V{axes.y(value) + mark.offset:.1f}"
    dash = f' stroke-dasharray="{mark.dash}"' if mark.dash else ""
    path += f"H{axes.x(steps[-1]):.1f}"
    return f'<path d="{path}" fill="none" stroke="{mark.colour}" stroke-width="{mark.width}" stroke-linejoin="round"{dash}/>'


def _names(marks: Sequence[Mark], axes: Axes) -> Iterator[str]:
    """Every name at the end of its line, moved apart where they would cover each other, and a thin line between the two."""
    order = sorted(range(len(marks)), key=lambda i: axes.y(marks[i].values[-1]) + marks[i].offset)
    ends = [axes.y(marks[i].values[-1]) + marks[i].offset for i in order]
    for i, end, place in zip(order, ends, _apart(ends), strict=True):
        mark = marks[i]
        name = mark.name if len(mark.name) <= LONGEST else f"...{mark.name[3 - LONGEST :]}"
        yield f'<path d="M{RIGHT} {end:.1f}L{RIGHT + 16} {place:.1f}" stroke="{mark.colour}" stroke-width="1" fill="none"/>'
        yield text(RIGHT + 20, place + 5, f"{mark.values[-1]:g}  {name}", colour=mark.colour, weight="bold" if i else "normal")


def _apart(wanted: Sequence[float]) -> list[float]:
    """The sorted places, each at least a row below the one before it, and moved up together as far as that pushed them down."""
    groups: list[list[float]] = []  # runs of names that touch, each centred where its members want to be
    for place in wanted:
        groups.append([place])
        while len(groups) > 1 and _bottom(groups[-2]) + ROW > _top(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_top(group) + ROW * i for group in groups for i in range(len(group))]


def _top(group: Sequence[float]) -> float:
    return sum(group) / len(group) - ROW * (len(group) - 1) / 2


def _bottom(group: Sequence[float]) -> float:
    return _top(group) + ROW * (len(group) - 1)
