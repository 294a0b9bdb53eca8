"""LN tuning: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check.asked import Draw, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.mistake import Formula, Mistake, Replay, Suite, as_if, autograd, one_by_one, only, stored
from peft_ref.check.oracle import Problem, answer, null_answer, pose
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer
from peft_ref.norms import Norm
from peft_ref.stack import Adapter

WEIGHT, BIAS = "0.ln_tuning_layers.weight", "0.ln_tuning_layers.bias"
STEPS = ("forward", "backward", "merge", "unmerge")
OTHERS = ("linear", "transposed_linear", "embedding", "conv1d", "conv2d-groups", "conv3d")

VARIANTS = (
    Variant(name="plain", clause="LNTUNING-C1", configs=({},), layers=("layer-norm",), operations=STEPS),
    Variant(name="rms", clause="LNTUNING-C2", configs=({},), layers=("rms-norm",), operations=STEPS, bias=False),
    Variant(name="vector", clause="LNTUNING-C1", configs=({},), layers=("layer-norm",), operations=RUN, rows=()),
    Variant(name="rounded", clause="LNTUNING-C1", configs=({},), layers=("layer-norm",), operations=RUN, numbers="rounded"),
    Variant(name="no-bias", clause="LNTUNING-C3", configs=({},), layers=("layer-norm",), operations=STEPS, bias=False),
    Variant(name="others", clause="LNTUNING-C4", configs=({},), layers=OTHERS, operations=STEPS),
    Variant(name="others-no-bias", clause="LNTUNING-C4", configs=({},), layers=("linear",), operations=STEPS, bias=False),
)

Weighs = Callable[[Array, Array], Array]  # what acts, of the frozen one and the trained one


def takes(weight: Weighs, bias: Weighs) -> Formula:
    """Another weight and bias than the trained ones."""

    def step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        trained, c = a.method.weight(layer, a.params, W, b, W0)
        return weight(W, trained), None if b is None or c is None else bias(b, c)

    return Formula(weight=one_by_one(step))


def frozen(old: Array, new: Array) -> Array:
    return old


def trained(old: Array, new: Array) -> Array:
    return new


def other_norm(change: Callable[[Norm], Norm | None]) -> Replay:
    """The right answer on another norm."""

    def changed(case: Case) -> Case | None:
        norm = change(case.layer) if isinstance(case.layer, Norm) and case.operation in RUN else None
        return None if norm is None else replace(case, layer=norm)

    return as_if(changed)


def normalised(how: Callable[[Norm, Array, Array, Array | None], Array]) -> Replay:
    """Another formula of a norm, given x, the trained weight (features,) and bias."""

    def forward(p: Problem) -> Array:
        assert isinstance(p.layer, Norm)
        W, b = p.adapters[0].method.weight(p.layer, p.adapters[0].params, p.W, p.b, p.W)
        return how(p.layer, p.x, W[:, 0], b)

    def replay(case: Case) -> Answer | None:
        if not isinstance(case.layer, Norm) or case.operation not in RUN:
            return None
        return {"y": forward(pose(case))} if case.operation == "forward" else autograd(case, forward)

    return replay


def _centred(norm: Norm, x: Array) -> Array:
    return x - np.mean(x, axis=-1, keepdims=True) if norm.centred else x


def _shifted(y: Array, b: Array | None) -> Array:
    return y if b is None else y + b


def _eps_outside(norm: Norm, x: Array, w: Array, b: Array | None) -> Array:
    seen = _centred(norm, x)
    return _shifted(w * (seen / (np.sqrt(np.mean(seen * seen, axis=-1, keepdims=True)) + norm.eps)), b)


def _sample_variance(norm: Norm, x: Array, w: Array, b: Array | None) -> Array:
    seen, n = _centred(norm, x), norm.features
    return _shifted(w * (seen / np.sqrt(np.sum(seen * seen, axis=-1, keepdims=True) / (n - 1) + norm.eps)), b)


def _weight_first(norm: Norm, x: Array, w: Array, b: Array | None) -> Array:
    seen = _centred(norm, w * x)
    return _shifted(seen / np.sqrt(np.mean(seen * seen, axis=-1, keepdims=True) + norm.eps), b)


def _one_more(norm: Norm, x: Array, w: Array, b: Array | None) -> Array:
    seen = _centred(norm, x)
    return _shifted((w + 1) * (seen / np.sqrt(np.mean(seen * seen, axis=-1, keepdims=True) + norm.eps)), b)


def _of_norms(wrong: Callable[[Case, Norm, NDArray, NDArray], dict[str, NDArray]]) -> Replay:
    """Wrong gradients on a norm, given x and dy as rows."""

    def backward(case: Case) -> Answer | None:
        if not isinstance(case.layer, Norm):
            return None
        assert case.x is not None
        assert case.dy is not None
        x, dy = (np.asarray(v, dtype=np.float64).reshape(-1, case.layer.features) for v in (case.x, case.dy))
        return {**answer(case), **wrong(case, case.layer, x, dy)}

    return only(backward=backward)


def _not_normalised(case: Case, norm: Norm, x: NDArray, dy: NDArray) -> dict[str, NDArray]:
    return {WEIGHT: np.sum(dy * x, axis=0)}


def _statistics_held(case: Case, norm: Norm, x: NDArray, dy: NDArray) -> dict[str, NDArray]:
    assert case.x is not None
    seen = _centred(norm, x)
    w = np.asarray(case.adapters[0].tensors["ln_tuning_layers.weight"], dtype=np.float64)
    return {"x": (w * dy / np.sqrt(np.mean(seen * seen, axis=-1, keepdims=True) + norm.eps)).reshape(case.x.shape)}


def _frozen_weight_in_dx(case: Case) -> Answer | None:
    p = pose(case)
    dx = p.layer.input_vjp(p.x, p.W, p.dy)
    return None if dx is None else {**answer(case), "x": dx}


def _last_row(case: Case) -> Answer | None:
    right = answer(case)
    if case.dy is None or BIAS not in right or (case.layer is not None and case.layer.kernel_size):
        return None
    return {**right, BIAS: np.asarray(case.dy, dtype=np.float64).reshape(-1, case.dy.shape[-1])[-1]}


def _unmerge_keeps(case: Case) -> Answer:
    p = pose(case)
    return stored(p.layer, p.merged_W, p.merged_b)


def _unmerge_subtracts(case: Case) -> Answer:
    p = pose(case)
    W, b = p.adapters[0].method.weight(p.layer, p.adapters[0].params, p.W, p.b, p.W)
    return stored(p.layer, p.merged_W - W, None if p.merged_b is None or b is None else p.merged_b - b)


def _unmerge_leaves_bias(case: Case) -> Answer:
    p = pose(case)
    return stored(p.layer, p.W, p.merged_b)


def _unmerge_trained(case: Case) -> Answer:
    p = pose(case)
    return stored(p.layer, *p.adapters[0].method.weight(p.layer, p.adapters[0].params, p.W, p.b, p.W))


def _merge_leaves_bias(case: Case) -> Answer:
    p = pose(case)
    return stored(p.layer, p.adapters[0].method.weight(p.layer, p.adapters[0].params, p.W, p.b, p.W)[0], p.b)


def identity(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    """All numbers of a case have few bits: a copy is a copy in every format."""
    given = {"ln_tuning_layers.weight": case.weight, "ln_tuning_layers.bias": case.bias}
    for key, want in given.items():
        if want is not None and np.any(draw[key].reshape(-1) != want.reshape(-1)):
            return f"init-not-identity: {key} starts as the frozen one, not as of a new layer"
    return ""


def _formula(name: str, clause: str, sentence: str, weight: Weighs, bias: Weighs) -> Mistake:
    return Mistake(name=name, clause=clause, sentence=sentence, replay=takes(weight, bias))


def _norm(name: str, clause: str, sentence: str, replay: Replay) -> Mistake:
    return Mistake(name=name, clause=clause, sentence=sentence, replay=replay)


SUITE = Suite(
    variants=VARIANTS,
    fresh=Fresh(
        clause="LNTUNING-C10",
        starts={"default": Start({}, ("layer-norm", "linear"), draws=1)},
        laws=lambda config, layer: {},
        identity=identity,
    ),
    files=Files(
        configs_clause="LNTUNING-C11",
        keys_clause="LNTUNING-C12",
        configs={"plain": {}},
        told={},
        saved_on={
            "model.layers.0.input_layernorm": Norm(features=5),
            "model.layers.1.post_attention_layernorm": Norm(features=7),
        },
    ),
    mistakes=(
        Mistake(
            name="ln-tuning-ignored",
            clause="LNTUNING-C1",
            sentence="the trained weight and bias are not used at all: this is the frozen layer",
            replay=null_answer,
        ),
        _formula(
            "ln-weight-added",
            "LNTUNING-C1",
            "the trained weight and bias are added to the frozen ones instead of taking their place",
            lambda old, new: old + new,
            lambda old, new: old + new,
        ),
        _formula(
            "ln-weight-multiplied",
            "LNTUNING-C1",
            "the trained weight scales the frozen one instead of taking its place",
            lambda old, new: old * new,
            trained,
        ),
        _formula(
            "ln-weight-averaged",
            "LNTUNING-C1",
            "the mean of the frozen and the trained weight and bias acts",
            lambda old, new: (old + new) / 2,
            lambda old, new: (old + new) / 2,
        ),
        _formula("ln-bias-frozen", "LNTUNING-C3", "the trained weight acts, and the frozen bias with it", trained, frozen),
        _formula("ln-bias-alone", "LNTUNING-C3", "the trained bias acts, and the frozen weight with it", frozen, trained),
        _formula("ln-bias-added", "LNTUNING-C3", "the trained bias is added to the frozen one", trained, lambda old, new: old + new),
        _formula("ln-bias-lost", "LNTUNING-C3", "the trained bias is not used, nor the frozen one", trained, lambda old, new: 0 * old),
        _norm(
            "ln-mean-kept",
            "LNTUNING-C5",
            "a layer norm does not subtract the mean, like an RMS norm",
            other_norm(lambda norm: replace(norm, centred=False) if norm.centred else None),
        ),
        _norm(
            "rms-mean-subtracted",
            "LNTUNING-C2",
            "an RMS norm subtracts the mean, like a layer norm",
            other_norm(lambda norm: None if norm.centred else replace(norm, centred=True)),
        ),
        _norm("ln-eps-ignored", "LNTUNING-C5", "eps is left out", other_norm(lambda norm: replace(norm, eps=0.0))),
        _norm("ln-eps-outside", "LNTUNING-C5", "eps is added to the root instead of under it", normalised(_eps_outside)),
        _norm("ln-sample-variance", "LNTUNING-C5", "the mean square divides by n - 1", normalised(_sample_variance)),
        _norm("ln-weight-first", "LNTUNING-C5", "the weight acts on x before it is normalised", normalised(_weight_first)),
        _norm("ln-unit-offset", "LNTUNING-C6", "1 is added to the weight, as Gemma's norms do", normalised(_one_more)),
        _norm(
            "ln-grad-not-normalised",
            "LNTUNING-C8",
            "the weight's gradient is the sum of dy x, with x not normalised",
            _of_norms(_not_normalised),
        ),
        _norm("ln-statistics-held", "LNTUNING-C8", "dx takes the mean and the size of x for constants", _of_norms(_statistics_held)),
        Mistake(
            name="ln-dx-frozen",
            clause="LNTUNING-C8",
            sentence="dx goes through the frozen weight instead of the trained one",
            replay=only(backward=_frozen_weight_in_dx),
        ),
        Mistake(
            name="ln-bias-grad-one-row",
            clause="LNTUNING-C8",
            sentence="the bias's gradient is the last row of dy instead of the sum over the rows",
            replay=only(backward=_last_row),
        ),
        Mistake(
            name="ln-bias-not-merged",
            clause="LNTUNING-C7",
            sentence="merging takes the trained weight and leaves the frozen bias",
            replay=only(merge=_merge_leaves_bias),
        ),
        Mistake(
            name="ln-unmerge-nothing",
            clause="LNTUNING-C7",
            sentence="unmerge does nothing: what was merged stays",
            replay=only(unmerge=_unmerge_keeps),
        ),
        Mistake(
            name="ln-unmerge-subtracts",
            clause="LNTUNING-C7",
            sentence="unmerge subtracts the trained numbers, as if they had been added",
            replay=only(unmerge=_unmerge_subtracts),
        ),
        Mistake(
            name="ln-unmerge-bias-stays",
            clause="LNTUNING-C7",
            sentence="unmerge puts the frozen weight back and leaves the merged bias",
            replay=only(unmerge=_unmerge_leaves_bias),
        ),
        Mistake(
            name="ln-unmerge-trained",
            clause="LNTUNING-C7",
            sentence="unmerge leaves the trained weight and bias in place",
            replay=only(unmerge=_unmerge_trained),
        ),
    ),
)
