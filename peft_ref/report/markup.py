"""Text and matrices as HTML: what every part of the page is made of."""

from __future__ import annotations

import html

import numpy as np

from peft_ref.check.case import NDArray
from peft_ref.check.protocol import flatten
from peft_ref.check.result import Counterexample
from peft_ref.errors import clean
from peft_ref.report import arrays, one_line, settings

DRAWN = 64  # an array of more numbers is told, not drawn


def e(text: str) -> str:
    """Text from anywhere, safe in an element and in an attribute."""
    return html.escape(clean(text))


def example(shown: Counterexample) -> str:
    """The smallest counterexample as matrices, and both answers side by side."""
    given = "".join(_named(name, array) for name, array in arrays(shown.case))
    chips = "".join(f'<span class="chip">{e(text)}</span>' for text in settings(shown.case))
    got, want = flatten(shown.got), flatten(shown.want)
    differing = [name for name in want if not _same(got[name], want[name])]
    alike = [name for name in want if name not in differing]
    answers = "".join(
        f'<div class="versus"><div class="got">{_named(name, got[name], "you: ", off)}</div>'
        f'<div class="want">{_named(name, want[name], "right: ", off)}</div></div>'
        for name in differing
        for off in [_off(got[name], want[name])]
    )
    also = f'<p class="soft">{e(", ".join(alike))} {"is" if len(alike) == 1 else "are"} right.</p>' if alike else ""
    operation = e(str(shown.case.get("operation", "")))
    return (
        f'<h4>The smallest question found</h4><div class="sum">{given}</div><p>{chips}</p>'
        f"<h4>Asked for {operation}</h4>{answers}{also}"
        f"<details><summary>in one line, after {shown.round_trips} questions</summary><pre>{e(one_line(shown))}</pre></details>"
    )


def _same(got: NDArray, want: NDArray) -> bool:
    return got.shape == want.shape and not _off(got, want).any()


def _off(got: NDArray, want: NDArray) -> NDArray:
    """Where two answers differ by more than what the smallest formats round."""
    with np.errstate(over="ignore", invalid="ignore"):
        near = np.abs(got - want) <= 1e-2 * np.max(np.abs(want), initial=0.0) * (got != want)
    return np.asarray(~(near | (got == want)))


def _named(name: str, array: NDArray, before: str = "", off: NDArray | None = None) -> str:
    shape = " x ".join(map(str, array.shape))
    return f'<div class="named"><span>{before}<b>{e(name)}</b> {shape}</span>{_drawn(array, off)}</div>'


def _drawn(array: NDArray, off: NDArray | None) -> str:
    if array.size > DRAWN or (array.size > 9 and not array.any()):
        at = [f"{float(array[tuple(i)]):.6g} at {i}" for i in np.argwhere(array != 0).tolist()]
        told = "zeros" if not at else f"zeros but for {', '.join(at)}" if len(at) <= 6 else f"{array.size} numbers"
        return f"<code>{e(told)}</code>"
    marks = np.zeros(array.shape, bool) if off is None else off
    if array.ndim <= 2:
        return _matrix(np.atleast_2d(array), np.atleast_2d(marks))
    slices = zip(array.reshape(-1, *array.shape[-2:]), marks.reshape(-1, *array.shape[-2:]), strict=True)
    return f'<div class="sum">{"".join(_matrix(a, m) for a, m in slices)}</div>'


def _matrix(array: NDArray, off: NDArray) -> str:
    rows = []
    for values, marks in zip(array.tolist(), off.tolist(), strict=True):
        cells = [f"<td{_cell_class(v, m)}>{v:.6g}</td>".replace(">-", ">\N{MINUS SIGN}") for v, m in zip(values, marks, strict=True)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<table class="m">{"".join(rows)}</table>'


def _cell_class(value: float, off: bool) -> str:
    return ' class="off"' if off else ' class="zero"' if value == 0 else ""
