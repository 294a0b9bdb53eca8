"""What a method may say of the change it makes to a weight, as one value.

Factors    B A, added
Delta      a matrix, added
Scaled     rows scaled, after B A was added
Turned     blocks of columns turned
"""

from __future__ import annotations

from typing import NamedTuple

from peft_ref.arrays import Array


class Factors(NamedTuple):
    B: Array  # (out, r/groups)
    A: Array  # (r, in)
    b: Array | None = None  # (out,), added to the bias


class Delta(NamedTuple):
    W: Array  # (out, in)
    b: Array | None = None  # (out,)


class Scaled(NamedTuple):
    """W' = r k (W + B A), row i times r_i k_i, where k is held constant in the gradient; b' = b, or r k b, plus that of the factors."""

    rows: Array | None = None  # r (out,); None: all are 1
    factors: Factors | None = None
    bias: bool = False  # whether the bias is scaled too
    unit: bool = False  # whether k is 1 / the lengths of the rows of W + B A; else all are 1
    held: Array | None = None  # k (out,), which folding the weight finds


class Turned(NamedTuple):
    """W' = W F with the blocks of F (n, b, b) on a diagonal, n b = in; b' = b."""

    blocks: Array
