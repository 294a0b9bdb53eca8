"""Why a merged tensor is wrong: which known mistake gives its numbers.

    W   the frozen weight      R   what it should be merged      D = R - W      M   what is there      all float64, in the stored layout

First the judge's own mistakes of the method, each replayed on this very weight; then what only happens to files:

    not merged     M = W                    rounded on the way   M = round(R) or round(W) + D, through another dtype
    c times        M = W + c D              transposed           M = W + D^T
    another one    M - W has a small rank, and is not D: some other low-rank adapter

A tensor is explained where every element is within what rounding the suspect's own number allows. What explains the first wrong tensor is
tried first on the next; of several names those are left that explain all tensors of a group. Ambiguity is reported, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from peft_ref.backend import round_to
from peft_ref.check.case import Case
from peft_ref.check.mistakes import SUITES

NDArray = np.ndarray[Any, Any]
# Significant bits and the smallest spacing of each dtype that a checkpoint has.
FORMATS = {
    "F64": (53, 2.0**-1074),
    "F32": (24, 2.0**-149),
    "F16": (11, 2.0**-24),
    "BF16": (8, 2.0**-133),
    "F8_E4M3": (4, 2.0**-9),
    "F8_E5M2": (3, 2.0**-16),
}
COARSE = {"BF16": "bfloat16", "F16": "float16"}
U32 = 2.0**-24
CLAUSE = ""  # what happens to files breaks none of a method's


class Claim(NamedTuple):
    """One tensor of a merged checkpoint, and what it has to be."""

    name: str
    dtype: str  # that it has, as safetensors spells it
    W: NDArray
    right: NDArray
    got: NDArray
    slack: NDArray  # more that an honest merge may be off, where several changes were rounded one after the other
    case: Case | None = None  # the same as a question to a port: None where no method maps it (modules_to_save)
    part: str = "weight"  # and which of that question's answers it is


class Suspect(NamedTuple):
    name: str
    sentence: str  # completes "Its numbers are what you get when ..."
    clause: str
    values: NDArray
    links: tuple[str, ...] = ()


def spacing(x: NDArray, dtype: str) -> NDArray:
    """The distance of neighbouring numbers of `dtype` at x: one ulp."""
    bits, least = FORMATS[dtype]
    step: NDArray = np.ldexp(1.0, np.maximum(np.frexp(np.abs(x))[1] - bits, -1074))
    return np.maximum(step, least)


def tolerance(W: NDArray, merged: NDArray, dtype: str) -> NDArray:
    """How far one honest merge may be from `merged`: it rounds the sum once, the delta perhaps before it, and computes in float32."""
    D = merged - W
    allowed: NDArray = 0.5 * spacing(merged, dtype) + 0.5 * spacing(D, dtype)
    return allowed + 64 * U32 * (np.abs(W) + float(np.max(np.abs(D), initial=0.0)))


def fits(claim: Claim, values: NDArray) -> bool:
    """Whether what is there is `values`, up to one merge's rounding."""
    if values.shape != claim.got.shape:
        return False
    with np.errstate(invalid="ignore"):
        return bool(np.all(np.abs(claim.got - values) <= tolerance(claim.W, values, claim.dtype) + claim.slack))


def is_told(claim: Claim, values: NDArray) -> bool:
    """Whether `values` can be told from the right numbers at all in this dtype."""
    apart = np.abs(values - claim.right)
    both = tolerance(claim.W, claim.right, claim.dtype) + tolerance(claim.W, values, claim.dtype)
    return bool(np.any(apart > 2 * (both + claim.slack)))


def explaining(claim: Claim, only: frozenset[str] | None = None) -> list[Suspect]:
    """The suspects whose numbers these are; of those named in `only`, where it is given.

    The method's own mistakes before what only happens to files, of which the first is enough: the later ones are the more general.
    """
    found = [s for s in _mistakes(claim, only) if fits(claim, s.values)]
    return found or [s for s in _of_files(claim) if (only is None or s.name in only) and fits(claim, s.values)][:1]


def _mistakes(claim: Claim, only: frozenset[str] | None) -> Iterator[Suspect]:
    if claim.case is None:
        return
    for mistake in SUITES.of(claim.case.method).mistakes:
        if only is not None and mistake.name not in only:
            continue
        with np.errstate(all="ignore"):
            replayed = mistake.replay(claim.case)
        if replayed is None or claim.part not in replayed:
            continue
        values = np.asarray(replayed[claim.part], dtype=np.float64)
        if values.shape == claim.right.shape and np.all(np.isfinite(values)) and is_told(claim, values):
            yield Suspect(mistake.name, mistake.sentence, mistake.clause, values, mistake.links)


def _of_files(claim: Claim) -> Iterator[Suspect]:
    W, D = claim.W, claim.right - claim.W
    yield Suspect("not-merged", "the adapter is missing here: it is the frozen weight", CLAUSE, W)
    for dtype, name in COARSE.items():
        if FORMATS[dtype][0] < FORMATS[claim.dtype][0]:
            yield Suspect(f"rounded-through-{name}", f"the merged weight went through {name}", CLAUSE, round_to(claim.right, name))
        yield Suspect(f"base-rounded-to-{name}", f"the frozen weight was rounded to {name} before merging", CLAUSE, round_to(W, name) + D)
    square = D.ndim == 2 and D.shape[0] == D.shape[1]
    if square:
        yield Suspect("merged-transposed", "the delta is added transposed", CLAUSE, W + D.T)
    if (c := _share(claim, D)) is not None:
        yield Suspect("another-scale", f"the delta is added {c:.4g} times", CLAUSE, W + c * D)
        if square and (t := _share(claim, D.T)) is not None:
            yield Suspect("transposed-and-scaled", f"the delta is added transposed, {t:.4g} times", CLAUSE, W + t * D.T)
    if (rank := _rank(claim)) is not None:
        yield Suspect("another-adapter", f"another adapter is merged, whose delta has rank {rank}", CLAUSE, claim.got)


def _share(claim: Claim, D: NDArray) -> float | None:
    """How many times D is in what was added, by least squares."""
    size = float(np.sum(D * D))
    return float(np.sum((claim.got - claim.W) * D)) / size if size else None


def _rank(claim: Claim) -> int | None:
    """The rank of what was added above the noise of rounding, where it is small and something stands out."""
    E = (claim.got - claim.W).reshape(claim.got.shape[0], -1) if claim.got.ndim > 1 else np.zeros((0, 0))
    if min(E.shape, default=0) < 8 or not np.all(np.isfinite(E)) or max(E.shape) > 8192:
        return None
    values = np.linalg.svd(E, compute_uv=False)
    noise = float(np.sqrt(np.mean(spacing(claim.got, claim.dtype) ** 2) / 12)) * (np.sqrt(E.shape[0]) + np.sqrt(E.shape[1]))
    rank = int(np.sum(values > 1.5 * noise))
    return rank if 0 < rank <= min(E.shape) // 4 else None
