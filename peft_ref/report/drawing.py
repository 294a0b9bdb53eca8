"""What the pictures share: their colours, text, and the steps of an axis."""

from __future__ import annotations

import html

from peft_ref.errors import clean

INK, SOFT, GRID, PAPER = "#1f2933", "#616e7c", "#dde1e6", "#ffffff"
# Okabe and Ito's colours, which the colour-blind can tell apart; the yellow is darker, so that white paper does not swallow it.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d1f")


def nice(length: int, ticks: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that divides `length` into at most so many parts."""
    return next(int(f"{f}{k * '0'}") for k in range(20) for f in (1, 2, 5) if length <= ticks * f * 10**k)


def text(x: float, y: float, said: str, *, size: int = 14, colour: str = INK, weight: str = "normal", anchor: str = "start") -> str:
    style = f'font-size="{size}" fill="{colour}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style} xml:space="preserve">{escaped(said)}</text>' if said else ""


def escaped(said: str) -> str:
    return html.escape(clean(said))
