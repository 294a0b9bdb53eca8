"""FourierFT: what is asked, and what ports get wrong."""

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
from peft_ref.methods.fourierft import FourierFT
from peft_ref.methods.torch_draws import randperm
from peft_ref.stack import Adapter

LINEAR = ("linear", "transposed_linear")
PLAIN = {"n_frequency": 6, "scaling": 60.0}
OTHER = {"n_frequency": 4, "scaling": 35.0, "random_loc_seed": 5}
On: TypeAlias = Callable[[Case], bool]

VARIANTS = (
    Variant(name="plain", clause="FOURIERFT-C1", configs=(PLAIN,), layers=LINEAR),
    Variant(name="small", clause="FOURIERFT-C1", configs=({**PLAIN, "random_loc_seed": 3},), numbers="small"),
    Variant(name="rounded", clause="FOURIERFT-C2", configs=({"n_frequency": 9},), layers=("linear-large",), numbers="rounded"),
    Variant(name="vector", clause="FOURIERFT-C4", configs=(PLAIN,), layers=LINEAR, operations=RUN, rows=()),
    Variant(name="no-bias", clause="FOURIERFT-C3", configs=(PLAIN,), bias=False),
    Variant(
        name="two-adapters",
        clause="FOURIERFT-C9",
        configs=(PLAIN, {"n_frequency": 4, "scaling": 35.0, "random_loc_seed": 5}),
        layers=LINEAR,
    ),
)

Places: TypeAlias = tuple[NDArray, NDArray]
Wrong: TypeAlias = Callable[[Layer, FourierFT, Array], Array]  # the delta of the coefficients


def waves(layer: Layer, c: Array, at: Places, turn: Callable[[NDArray], NDArray] = np.cos) -> Array:
    """sum_k c_k turn(2 pi (u_k i / out + v_k j / in))"""
    (out, n_in), (u, v) = layer.shape, at
    phase = np.arange(out)[:, None, None] * u / out + np.arange(n_in)[None, :, None] * v / n_in
    return np.sum(turn(2 * np.pi * phase) * c, axis=2)


def scale(layer: Layer, m: FourierFT) -> float:
    return m.scaling / math.prod(layer.shape)


def drawn(layer: Layer, m: FourierFT) -> NDArray:
    return randperm(math.prod(layer.shape), m.random_loc_seed, m.n_frequency)


def other_delta(delta: Wrong, on: On = lambda case: True) -> Callable[[Case], Answer | None]:
    def of(layer: Layer, a: Adapter) -> Array:
        assert isinstance(a.method, FourierFT)
        return delta(layer, a.method, a.params.c)

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


def elsewhere(places: Callable[[Layer, FourierFT], Places], on: On = lambda case: True) -> Callable[[Case], Answer | None]:
    """The right transform of coefficients at other places."""
    return other_delta(lambda layer, m, c: scale(layer, m) * waves(layer, c, places(layer, m)), on)


def by_columns(layer: Layer, m: FourierFT) -> Places:
    v, u = np.divmod(drawn(layer, m), layer.shape[0])
    return u, v


def numpys_own(layer: Layer, m: FourierFT) -> Places:
    u, v = np.divmod(np.random.default_rng(m.random_loc_seed).permutation(math.prod(layer.shape))[: m.n_frequency], layer.shape[1])
    return u, v


def in_order(layer: Layer, m: FourierFT) -> Places:
    u, v = np.divmod(np.sort(drawn(layer, m)), layer.shape[1])
    return u, v


def along_rows(layer: Layer, m: FourierFT, c: Array) -> Array:
    """A transform of every row alone: row i holds the coefficients with u_k = i."""
    u, v = m.frequencies(layer)
    wave = np.cos(2 * np.pi * np.arange(layer.shape[1])[:, None] * v / layer.shape[1])
    own = np.arange(layer.shape[0])[:, None, None] == u
    return m.scaling / layer.shape[1] * np.sum(np.where(own, 1.0, 0.0) * wave * c, axis=2)


def lying(case: Case) -> bool:
    return case.layer is not None and case.layer.kind == "transposed_linear"


def unscaled_gradient(case: Case) -> Answer:
    assert case.layer is not None
    n = math.prod(case.layer.shape)
    return {name: g if name == "x" else g * (n / case.adapters[int(name[0])].config["scaling"]) for name, g in answer(case).items()}


def without_cancelling(case: Case) -> Answer:
    """The adapters' part of the answer with every wave at its height: a transform, or a cosine of many turns, is off by so much of it."""
    p = pose(case)
    layer, x, dy = p.layer, *(None if v is None else np.abs(v) for v in (p.x, p.dy))
    sizes = [(scale(layer, a.method), a.params.c) for a in p.adapters if isinstance(a.method, FourierFT)]
    D = np.full(layer.shape, sum(s * np.sum(np.abs(c)) for s, c in sizes))
    if case.operation == "forward":
        return {"y": layer.apply(x, D, None)}
    if case.operation == "backward":
        total = np.sum(layer.weight_vjp(x, dy))
        return {
            "x": np.asarray(layer.input_vjp(x, D, dy)),
            **{f"{i}.fourierft_spectrum": s * total * np.ones(len(c)) for i, (s, c) in enumerate(sizes)},
        }
    return stored(layer, D, None if case.bias is None or case.operation == "delta" else np.zeros(layer.shape[0]))


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    return {"fourierft_spectrum": constant(0.0, "init-not-identity") if config["init_weights"] else normal(1.0)}


FRESH = Fresh(
    clause="FOURIERFT-C15",
    starts={"default": Start({"n_frequency": 20}, LINEAR), "true": Start({"n_frequency": 20, "init_weights": True})},
    laws=laws,
)
FILES = Files(
    configs_clause="FOURIERFT-C16",
    keys_clause="FOURIERFT-C18",
    configs={
        "plain": {"n_frequency": 6, "scaling": 20.0},
        "missing": {},
        "frequency-pattern": {"n_frequency": 6, "n_frequency_pattern": {"v_proj": 3, "xq_proj": 4, r"layers\.10\.mlp\.up_proj": 8}},
    },
    told={"n_frequency": "n_frequency", "scaling": "scaling"},
)


SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    transformed=without_cancelling,
    mistakes=(
        Mistake(
            name="fourierft-ignored",
            clause="FOURIERFT-C1",
            sentence="the adapter is not there at all: this is the frozen layer",
            replay=null_answer,
        ),
        Mistake(
            name="fourierft-imaginary-part",
            clause="FOURIERFT-C1",
            sentence="the imaginary part of the transform is added instead of the real one: sines instead of cosines",
            replay=other_delta(lambda layer, m, c: scale(layer, m) * waves(layer, c, m.frequencies(layer), np.sin)),
        ),
        Mistake(
            name="fourierft-real-plus-imaginary",
            clause="FOURIERFT-C1",
            sentence="a Hartley transform is taken, cosines plus sines",
            replay=other_delta(
                lambda layer, m, c: scale(layer, m) * waves(layer, c, m.frequencies(layer), lambda phase: np.cos(phase) + np.sin(phase))
            ),
        ),
        Mistake(
            name="fourierft-rows-alone",
            clause="FOURIERFT-C1",
            sentence="every row is transformed alone: a transform of one dimension instead of two",
            replay=other_delta(along_rows),
        ),
        Mistake(
            name="fourierft-not-normalised",
            clause="FOURIERFT-C2",
            sentence="the sum is not divided by the number of entries: a forward transform's norm",
            replay=other_delta(lambda layer, m, c: m.scaling * waves(layer, c, m.frequencies(layer))),
        ),
        Mistake(
            name="fourierft-orthonormal",
            clause="FOURIERFT-C2",
            sentence="the sum is divided by the square root of the number of entries: an orthonormal transform",
            replay=other_delta(lambda layer, m, c: m.scaling / math.sqrt(math.prod(layer.shape)) * waves(layer, c, m.frequencies(layer))),
        ),
        Mistake(
            name="fourierft-scaling-ignored",
            clause="FOURIERFT-C2",
            sentence="scaling is not read: it is taken for one",
            replay=as_if(lambda case: with_config(case, lambda config: {**config, "scaling": 1.0})),
        ),
        Mistake(
            name="fourierft-column-major",
            clause="FOURIERFT-C6",
            sentence="the drawn numbers are counted down the columns of the spectrum instead of along its rows",
            replay=elsewhere(by_columns),
        ),
        Mistake(
            name="fourierft-places-sorted",
            clause="FOURIERFT-C6",
            sentence="the places are sorted, and the coefficients go to them in that order instead of that of the draw",
            replay=elsewhere(in_order),
        ),
        Mistake(
            name="fourierft-other-generator",
            clause="FOURIERFT-C7",
            sentence="the places are drawn by NumPy's generator instead of torch's",
            replay=elsewhere(numpys_own),
        ),
        Mistake(
            name="fourierft-conv1d-as-stored",
            clause="FOURIERFT-C8",
            sentence="on a Conv1D the spectrum is as the weight is stored, (in, out), instead of (out, in)",
            replay=elsewhere(lambda layer, m: by_columns(layer, m), lying),
        ),
        only_first_adapter("FOURIERFT-C9"),
        Mistake(
            name="double-merge",
            clause="FOURIERFT-C11",
            sentence="the adapter is merged twice",
            replay=only(merge=merged_twice),
        ),
        Mistake(
            name="unmerge-adds",
            clause="FOURIERFT-C12",
            sentence="unmerge adds the delta again instead of taking it out",
            replay=only(unmerge=unmerge_that_merges),
        ),
        Mistake(
            name="unmerge-from-frozen",
            clause="FOURIERFT-C12",
            sentence="unmerge starts from the frozen weight instead of the merged one it is given",
            replay=only(unmerge=unmerge_the_frozen),
        ),
        Mistake(
            name="fourierft-gradient-not-scaled",
            clause="FOURIERFT-C13",
            sentence="the gradient of fourierft_spectrum lacks the scale, scaling over the number of entries",
            replay=only(backward=unscaled_gradient),
        ),
    ),
)
