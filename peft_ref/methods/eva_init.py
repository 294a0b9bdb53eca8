"""EVA: A starts as the directions in which a layer's inputs vary most, and ranks go to the layers where they explain most.

    x - mean = U S V^T over all inputs seen    A = the first rows of V^T, over sqrt(S) with whiten    B = 0
    share of direction i at a layer = S_i^2 / sum of the squares of x - mean

The principal components are followed batch by batch, with the mean: `Components.seen` stacks S V^T of before, the new centred rows and
the shift of the mean. A layer looks for round(r rho) of them; the sum of all r is dealt out by share, largest first. Of layers that see the
same inputs (in the first batch) one is followed. A layer is done where every component it is to keep turned by less than tau in one batch;
batches come round again until all are. A layer may end with rank zero: then it has no adapter. alpha grows with the rank, so that the scale
stays, unless adjust_scaling_factors is off.

Paper   Paischer et al. 2024, arXiv:2410.07170; incremental components: Ross et al. 2008
HF      LoraConfig(init_lora_weights="eva", eva_config=...) and initialize_lora_eva_weights, in float32, by a randomised SVD of twice as
        many vectors. Each component's largest entry is positive. Followed: with whiten, components are divided once for every layer that
        has the same inputs. Where such layers tie for a rank, torch's sort says who gets it; here who comes first
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar, final

from peft_ref.arrays import Array, as_rows, column, namespace, thin_svd, zeros_like
from peft_ref.contracts import Start
from peft_ref.errors import ConfigError
from peft_ref.layers import Layer
from peft_ref.methods.dora import DoRA
from peft_ref.methods.lora import LoRA, Params
from peft_ref.methods.lora_init import Factored
from peft_ref.ranges import share

M = TypeVar("M", LoRA, DoRA)
ROUNDS = 1000  # through all batches, before it is said that nothing settles


@final
@dataclass(frozen=True, kw_only=True)
class Eva:
    """The keys of eva_config that the mathematics reads; which tokens count, use_label_mask says to who collects the inputs."""

    rho: float = 2.0
    tau: float = 0.99
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        share(self, "tau")
        if not self.rho >= 1:
            raise ConfigError(f"rho={self.rho}: a factor of 1 or more is needed.")


class Components(NamedTuple):
    """The principal components of the rows seen so far."""

    Vh: Array  # (n, in)
    S: Array  # (n,)
    shares: Array  # (n,), of the variance
    mean: Array  # (in,)
    squares: Array  # (in,), of x - mean, summed
    rows: int


def seen(before: Components | None, x: Array, n: int) -> Components:
    """The first n components of the rows of `before` and those of x (rows, in)."""
    xp, rows = namespace(x), x.shape[0]
    mean = xp.mean(x, axis=0)
    centred = x - mean
    squares, total, count, stacked = xp.sum(centred * centred, axis=0), mean, rows, centred
    if before is not None:
        count = before.rows + rows
        shift = before.mean - mean
        total = (before.rows * before.mean + rows * mean) / count
        squares = before.squares + squares + (before.rows * rows / count) * shift * shift
        step = (before.rows * rows / count) ** 0.5 * shift
        stacked = xp.concat([column(before.S) * before.Vh, centred, xp.expand_dims(step, axis=0)])
    _, S, Vh = thin_svd(stacked)
    S, Vh = S[:n], _upright(Vh[:n, :])
    return Components(Vh, S, S * S / xp.sum(squares), total, squares, count)


def eva(method: Factored, layer: Layer, W: Array, directions: Array) -> Start[Params]:
    """A fresh adapter that reads the directions (r, in) off its inputs."""
    if tuple(directions.shape) != (method.r, layer.fan_in):
        raise ConfigError(f"directions {tuple(directions.shape)} for r={method.r} and {layer.fan_in} inputs.\n  Change the rank to theirs.")
    return Start(Params(directions, zeros_like((layer.shape[0], method.r), W)), W)


def rescaled(method: M, r: int, config: Eva) -> M:
    """`method` with the rank that it was dealt."""
    alpha = method.lora_alpha * r / method.r if config.adjust_scaling_factors else method.lora_alpha
    return method if r == method.r else replace(method, r=r, lora_alpha=alpha)


def directions(batches: Sequence[Mapping[str, Array]], ranks: Mapping[str, int], config: Eva) -> dict[str, Array]:
    """A of every layer, (rank, in), the rank being what it was dealt: perhaps none. Each batch is the inputs (rows, in) of one call."""
    if not batches:
        raise ConfigError("there are no batches (HF PEFT refuses it too).")
    same = _same_inputs(batches[0], ranks)
    most = {name: round(r * config.rho) for name, r in ranks.items()}
    most = {name: max(most[other] for other in ranks if _first(same, other) == _first(same, name)) for name in ranks}
    followed = [name for name in ranks if name not in same]
    found: dict[str, Components] = {}
    settled: dict[str, list[bool]] = {name: [False] * most[name] for name in followed}
    dealt, budget, open_ = dict(most), sum(ranks.values()), followed
    for turn in range(ROUNDS * len(batches)):
        batch = batches[turn % len(batches)]
        open_ = [name for name in followed if not all(settled[name][: dealt[name]])]
        if not open_:
            return _kept(found, same, dealt, config)
        for name in open_:
            x = as_rows(batch[name])
            if most[name] > x.shape[1]:
                raise ConfigError(f"{name!r}: {most[name]} components of {x.shape[1]} inputs (HF PEFT refuses it too).\n  Make rho less.")
            if x.shape[0] < most[name]:
                continue  # too few rows for so many components: HF PEFT passes them over
            before = found.get(name)
            found[name] = seen(before, x, most[name])
            if before is not None:
                settled[name] = _alike(found[name].Vh, before.Vh, config.tau)
        if len(found) == len(followed):
            shares = {name: found[_first(same, name)].shares for name in [*followed, *same]}
            dealt = deal(shares, same, budget)
    raise ConfigError(f"no end after {ROUNDS} rounds: {', '.join(open_)}.\n  Give larger batches, of more rows than r rho, or less tau.")


def deal(shares: Mapping[str, Array], same: Mapping[str, str], budget: int) -> dict[str, int]:
    """How many of the `budget` largest shares are each layer's. Of those with the same inputs the first keeps the most."""
    ranked = sorted(((float(s[i]), name) for name, s in shares.items() for i in range(s.shape[0])), key=lambda pair: -pair[0])
    counts = dict.fromkeys(shares, 0)
    for _, name in ranked[:budget]:
        counts[name] += 1
    for name, first in same.items():
        counts[name], counts[first] = sorted((counts[name], counts[first]))
    return counts


def _kept(found: Mapping[str, Components], same: Mapping[str, str], dealt: Mapping[str, int], config: Eva) -> dict[str, Array]:
    rows = {name: components.Vh for name, components in found.items()}
    for name, r in dealt.items():
        if config.whiten and r:
            first = _first(same, name)
            xp, V = namespace(rows[first]), rows[first]
            rows[first] = xp.concat([V[:r, :] / column(xp.sqrt(found[first].S[:r])), V[r:, :]])
    return {name: rows[_first(same, name)][:r, :] for name, r in dealt.items()}


def _first(same: Mapping[str, str], name: str) -> str:
    return same.get(name, name)


def _same_inputs(batch: Mapping[str, Array], names: Mapping[str, Any]) -> dict[str, str]:
    """Layers whose inputs are those of a layer before them."""
    same: dict[str, str] = {}
    for name in names:
        x = batch[name]
        for other in names:
            if other == name:
                break
            y = batch[other]
            if other not in same and x.shape == y.shape and bool(namespace(x).all(x == y)):
                same[name] = other
                break
    return same


def _alike(V: Array, before: Array, tau: float) -> list[bool]:
    """Which rows' cosines with those of before are at least tau; all are of length 1."""
    cosines = namespace(V).sum(V * before, axis=1)
    return [float(cosines[i]) >= tau for i in range(V.shape[0])]


def _upright(Vh: Array) -> Array:
    """Every row with the sign that makes its largest entry positive."""
    xp = namespace(Vh)
    upright = xp.max(Vh, axis=1) >= -xp.min(Vh, axis=1)
    return xp.where(column(upright), Vh, -Vh)
