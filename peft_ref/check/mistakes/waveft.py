"""WaveFT: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.distributions import Law, constant, normal
from peft_ref.check.mistake import (
    Formula,
    Mistake,
    Replay,
    Suite,
    as_if,
    merged_twice,
    one_by_one,
    only,
    stored,
    unmerge_that_merges,
    unmerge_the_frozen,
    with_config,
)
from peft_ref.check.oracle import Problem, answer, null_answer, pose
from peft_ref.check.shared_mistakes import only_first_adapter
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer
from peft_ref.methods.torch_draws import randperm
from peft_ref.methods.waveft import WaveFT, pulses
from peft_ref.methods.wavelets import LOW_PASS
from peft_ref.stack import Adapter

LINEAR = ("linear", "transposed_linear")
PLAIN = {"n_frequency": 6, "scaling": 12.0}
LONG = {**PLAIN, "wavelet_family": "db2", "n_frequency": 9}
OTHER = {"n_frequency": 4, "scaling": 35.0, "random_loc_seed": 5}
On: TypeAlias = Callable[[Case], bool]

VARIANTS = (
    Variant(name="plain", clause="WAVEFT-C1", configs=(PLAIN,), layers=LINEAR),
    Variant(name="long", clause="WAVEFT-C3", configs=(LONG,), layers=LINEAR),
    Variant(name="places", clause="WAVEFT-C6", configs=({**PLAIN, "use_idwt": False},), layers=LINEAR),
    Variant(name="small", clause="WAVEFT-C1", configs=({**PLAIN, "random_loc_seed": 3},), numbers="small"),
    Variant(name="rounded", clause="WAVEFT-C2", configs=({"n_frequency": 9},), layers=("linear-large",), numbers="rounded"),
    Variant(name="vector", clause="WAVEFT-C1", configs=(PLAIN,), layers=LINEAR, operations=RUN, rows=()),
    Variant(name="no-bias", clause="WAVEFT-C1", configs=(PLAIN,), bias=False),
    Variant(
        name="two-adapters",
        clause="WAVEFT-C11",
        configs=(PLAIN, {"n_frequency": 4, "scaling": 35.0, "random_loc_seed": 5}),
        layers=LINEAR,
    ),
)

Places: TypeAlias = tuple[NDArray, NDArray]
Tables: TypeAlias = tuple[NDArray, NDArray]  # r_k and q_k
Wrong: TypeAlias = Callable[[Layer, WaveFT], Tables]


def right(layer: Layer, m: WaveFT) -> Tables:
    return m.tables(layer, m.places(layer))


def drawn(layer: Layer, m: WaveFT) -> NDArray:
    return randperm(math.prod(layer.shape), m.random_loc_seed, m.n_frequency)


def other_tables(tables: Wrong, factor: Callable[[WaveFT], float] = lambda m: m.scaling, on: On = lambda case: True) -> Replay:
    """D of other shapes of the coefficients, or times something else."""

    def of(layer: Layer, a: Adapter) -> Array:
        assert isinstance(a.method, WaveFT)
        rows, columns = tables(layer, a.method)
        return factor(a.method) * ((rows * a.params.c) @ columns.T)

    def step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return W + of(layer, a), b

    def unmerge(p: Problem) -> tuple[Array, Array | None]:
        assert p.merged_W is not None
        return p.merged_W - sum(of(p.layer, a) for a in p.adapters), p.merged_b

    formula = Formula(weight=one_by_one(step), unmerge=unmerge)

    def replay(case: Case) -> Answer | None:
        if not on(case):
            return None
        if case.operation != "delta":
            return formula(case)
        p = pose(case)
        return stored(p.layer, of(p.layer, p.adapters[0]), None)

    return replay


def elsewhere(places: Callable[[Layer, WaveFT], Places], on: On = lambda case: True) -> Replay:
    """The right transform of coefficients at other places."""
    return other_tables(lambda layer, m: m.tables(layer, places(layer, m)), on=on)


def by_columns(layer: Layer, m: WaveFT) -> Places:
    j, i = np.divmod(drawn(layer, m), layer.shape[0])
    return i, j


def numpys_own(layer: Layer, m: WaveFT) -> Places:
    i, j = np.divmod(np.random.default_rng(m.random_loc_seed).permutation(math.prod(layer.shape))[: m.n_frequency], layer.shape[1])
    return i, j


def in_order(layer: Layer, m: WaveFT) -> Places:
    i, j = np.divmod(np.sort(drawn(layer, m)), layer.shape[1])
    return i, j


def synthesis(layer: Layer, m: WaveFT, *, crossed: bool = True, reversed_: bool = False, centred: bool = True, sign: float = 1.0) -> Tables:
    """The right tables, with one thing changed: which half chooses which filter, the filters' order, the place in the wide spectrum."""
    if not m.use_idwt:
        return right(layer, m)
    low = np.asarray(LOW_PASS[m.wavelet_family])
    low = low[::-1] if reversed_ else low
    halves = []
    for at, size in zip(m.places(layer), layer.shape, strict=True):
        wide = size + len(low) - 2 + (size + len(low)) % 2
        halves.append(np.divmod(at + (wide - size) // 2 * centred, wide // 2))
    (below, k), (beside, across) = halves
    rows, columns = (beside, below) if crossed else (below, beside)
    r, q = pulses(low, layer.shape[0], k, rows == 1) / 2, pulses(low, layer.shape[1], across, columns == 1)
    return r * np.where(rows == 1, sign, 1.0), q * np.where(columns == 1, sign, 1.0)


def transformed(case: Case) -> bool:
    return all(a.config.get("use_idwt", True) for a in case.adapters)


def direct(layer: Layer, m: WaveFT) -> Tables:
    i, j = m.places(layer)
    return np.eye(layer.shape[0])[:, i], np.eye(layer.shape[1])[:, j]


def lying(case: Case) -> bool:
    return case.layer is not None and case.layer.kind == "transposed_linear"


def unscaled_gradient(case: Case) -> Answer:
    return {name: g if name == "x" else g / case.adapters[int(name[0])].config["scaling"] for name, g in answer(case).items()}


def without_cancelling(case: Case) -> Answer:
    """The adapters' part of the answer with every wave at its height: a filter's number is irrational, and rounded before all else."""
    p = pose(case)
    layer, x, dy = p.layer, *(None if v is None else np.abs(v) for v in (p.x, p.dy))
    tables = [
        (a.method.scaling, *map(np.abs, right(layer, a.method)), np.abs(a.params.c)) for a in p.adapters if isinstance(a.method, WaveFT)
    ]
    D = np.asarray(sum(s * ((r * c) @ q.T) for s, r, q, c in tables))
    if case.operation == "forward":
        return {"y": layer.apply(x, D, None)}
    if case.operation == "backward":
        G = layer.weight_vjp(x, dy)
        own = {f"{i}.waveft_spectrum": s * np.sum(r * (G @ q), axis=0) for i, (s, r, q, _) in enumerate(tables)}
        return {"x": np.asarray(layer.input_vjp(x, D, dy)), **own}
    return stored(layer, D, None if case.bias is None or case.operation == "delta" else np.zeros(layer.shape[0]))


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    return {"waveft_spectrum": constant(0.0, "init-not-identity") if config["init_weights"] else normal(0.01)}


FRESH = Fresh(
    clause="WAVEFT-C17",
    starts={"default": Start({"n_frequency": 20}, LINEAR), "false": Start({"n_frequency": 20, "init_weights": False})},
    laws=laws,
)
FILES = Files(
    configs_clause="WAVEFT-C18",
    keys_clause="WAVEFT-C20",
    configs={
        "plain": {"n_frequency": 6, "scaling": 20.0, "wavelet_family": "sym4"},
        "missing": {},
        "places": {"n_frequency": 6, "use_idwt": False},
        "frequency-pattern": {"n_frequency": 6, "n_frequency_pattern": {"v_proj": 3, r"layers\.10\.mlp\.up_proj": 8}},
    },
    told={"n_frequency": "n_frequency", "scaling": "scaling", "wavelet_family": "wavelet_family", "use_idwt": "use_idwt"},
)


SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    transformed=without_cancelling,
    mistakes=(
        Mistake(
            name="waveft-ignored",
            clause="WAVEFT-C1",
            sentence="the adapter is not there at all: this is the frozen layer",
            replay=null_answer,
        ),
        Mistake(
            name="waveft-no-transform",
            clause="WAVEFT-C2",
            sentence="the coefficients are added at their places, as with use_idwt=False, and not transformed",
            replay=other_tables(direct, on=transformed),
        ),
        Mistake(
            name="waveft-always-transformed",
            clause="WAVEFT-C6",
            sentence="use_idwt=False is not read, and the coefficients are transformed",
            replay=as_if(lambda case: with_config(case, lambda config: {**config, "use_idwt": True})),
        ),
        Mistake(
            name="waveft-bands-exchanged",
            clause="WAVEFT-C5",
            sentence="the upper right part of the spectrum and the lower left one have each other's filters",
            replay=other_tables(lambda layer, m: synthesis(layer, m, crossed=False), on=transformed),
        ),
        Mistake(
            name="waveft-filter-backwards",
            clause="WAVEFT-C3",
            sentence="the filters of the analysis are taken, the synthesis's backwards",
            replay=other_tables(lambda layer, m: synthesis(layer, m, reversed_=True), on=transformed),
        ),
        Mistake(
            name="waveft-high-pass-negated",
            clause="WAVEFT-C3",
            sentence="the high-pass filter has the other sign",
            replay=other_tables(lambda layer, m: synthesis(layer, m, sign=-1.0), on=transformed),
        ),
        Mistake(
            name="waveft-family-ignored",
            clause="WAVEFT-C3",
            sentence="wavelet_family is not read: the filter is Haar's",
            replay=as_if(lambda case: with_config(case, lambda config: {**config, "wavelet_family": "db1"})),
        ),
        Mistake(
            name="waveft-not-centred",
            clause="WAVEFT-C4",
            sentence="the places begin in the corner of the widened spectrum instead of standing in its middle",
            replay=other_tables(lambda layer, m: synthesis(layer, m, centred=False), on=transformed),
        ),
        Mistake(
            name="waveft-scaling-ignored",
            clause="WAVEFT-C2",
            sentence="scaling is not read: it is taken for one",
            replay=as_if(lambda case: with_config(case, lambda config: {**config, "scaling": 1.0})),
        ),
        Mistake(
            name="waveft-divided-by-size",
            clause="WAVEFT-C2",
            sentence="the scale is divided by n_frequency, as LoRA's by its rank",
            replay=other_tables(right, lambda m: m.scaling / m.n_frequency),
        ),
        Mistake(
            name="waveft-column-major",
            clause="WAVEFT-C8",
            sentence="the drawn numbers are counted down the columns instead of along the rows",
            replay=elsewhere(by_columns),
        ),
        Mistake(
            name="waveft-places-sorted",
            clause="WAVEFT-C8",
            sentence="the places are sorted, and the coefficients go to them in that order instead of that of the draw",
            replay=elsewhere(in_order),
        ),
        Mistake(
            name="waveft-other-generator",
            clause="WAVEFT-C9",
            sentence="the places are drawn by NumPy's generator instead of torch's",
            replay=elsewhere(numpys_own),
        ),
        only_first_adapter("WAVEFT-C11"),
        Mistake(
            name="double-merge",
            clause="WAVEFT-C13",
            sentence="the adapter is merged twice",
            replay=only(merge=merged_twice),
        ),
        Mistake(
            name="unmerge-adds",
            clause="WAVEFT-C14",
            sentence="unmerge adds the delta again instead of taking it out",
            replay=only(unmerge=unmerge_that_merges),
        ),
        Mistake(
            name="unmerge-from-frozen",
            clause="WAVEFT-C14",
            sentence="unmerge starts from the frozen weight instead of the merged one it is given",
            replay=only(unmerge=unmerge_the_frozen),
        ),
        Mistake(
            name="waveft-gradient-not-scaled",
            clause="WAVEFT-C15",
            sentence="the gradient of waveft_spectrum lacks the scaling",
            replay=only(backward=unscaled_gradient),
        ),
    ),
)
