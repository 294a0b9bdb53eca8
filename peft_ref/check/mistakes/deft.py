"""DEFT: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from peft_ref import stack
from peft_ref.activations import relu
from peft_ref.arrays import Array, namespace
from peft_ref.check import tape
from peft_ref.check.asked import Config, Draw, Files, Fresh, Start
from peft_ref.check.case import Case
from peft_ref.check.distributions import Law, normal
from peft_ref.check.mistake import Formula, Mistake, Replay, Suite, as_if, autograd, only, reread, with_config
from peft_ref.check.oracle import Problem
from peft_ref.check.shared_mistakes import input_gradient_missing, merging, only_first_adapter, other_delta
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer
from peft_ref.methods.deft import DEFT, Params
from peft_ref.methods.normals import columns, orthonormal

PLAIN = {"r": 3}
SCALED = {"r": 4, "alpha": 6}
QR = {"r": 2, "decomposition_method": "qr", "alpha": 3}
PARA = {"r": 3, "para": True}
PARA_QR = {"r": 2, "para": True, "decomposition_method": "qr"}
CAPPED = {"r": 9, "alpha": 14}
KINDS = ("linear", "transposed_linear")

VARIANTS = (
    Variant(name="plain", clause="DEFT-C1", configs=(PLAIN,), layers=KINDS),
    Variant(name="scaled", clause="DEFT-C5", configs=(SCALED,)),
    Variant(name="qr", clause="DEFT-C3", configs=(QR,), layers=KINDS),
    Variant(name="para", clause="DEFT-C4", configs=(PARA,)),
    Variant(name="para-qr", clause="DEFT-C4", configs=(PARA_QR,)),
    Variant(name="capped", clause="DEFT-C6", configs=(CAPPED,)),
    Variant(name="small", clause="DEFT-C1", configs=({"r": 2},), numbers="small"),
    Variant(name="rounded", clause="DEFT-C5", configs=({"r": 3, "alpha": 5},), layers=("linear-large",), numbers="rounded"),
    Variant(name="vector", clause="DEFT-C1", configs=(PLAIN,), operations=RUN, rows=()),
    Variant(name="no-bias", clause="DEFT-C2", configs=(PLAIN,), bias=False),
    Variant(name="two-adapters", clause="DEFT-C10", configs=(SCALED, PARA), layers=KINDS),
)


def projection(method: DEFT, p: Params) -> tuple[Array, Array]:
    """Q and V."""
    return method._projection(p.P)


def injected(method: DEFT, p: Params) -> Array:
    return 0.0 if method.para else method.scale(p.P.shape[1]) * p.R


Asked = Callable[[DEFT], bool]


def delta(form: Callable[[DEFT, Params, Array], Array], asked: Asked = lambda method: True) -> Replay:
    """Another dW, given method, parameters and W, where one of the adapters is such that it shows."""

    def change(layer: Layer, method: Any, p: Any, W0: Array) -> Array:
        if asked(method):
            return form(method, p, W0)
        return method.change(layer, p, W0, None).W

    replay = other_delta(change)
    return lambda case: replay(case) if any(asked(_method(a.config)) for a in case.adapters) else None


def _method(config: Mapping[str, Any]) -> DEFT:
    return DEFT(**{k: v for k, v in config.items() if k != "peft_type"})


def by_relu(method: DEFT) -> bool:
    return method.decomposition_method == "relu"


def by_qr(method: DEFT) -> bool:
    return not by_relu(method)


def injects(method: DEFT) -> bool:
    return not method.para


def exchange(Q: Array, V: Array, method: DEFT, p: Params, W: Array) -> Array:
    return Q @ (injected(method, p) - V.T @ W)


def _positive(method: DEFT, p: Params, W: Array) -> Array:
    Q = namespace(W).stack(orthonormal(columns(p.P)), axis=1)
    return exchange(Q, Q, method, p, W)


def _through_p(method: DEFT, p: Params, W: Array) -> Array:
    Q, V = projection(method, p)
    return p.P @ injected(method, p) - Q @ (V.T @ W)


def _scaled_both(method: DEFT, p: Params, W: Array) -> Array:
    Q, V = projection(method, p)
    return method.scale(p.P.shape[1]) * (Q @ (p.R - V.T @ W))


def _asked_rank(method: DEFT, p: Params, W: Array) -> Array:
    Q, V = projection(method, p)
    return Q @ (method.scale(method.r) * p.R - V.T @ W)


def _held(p: Problem) -> Array:
    """The forward pass with V cut off from P."""
    W = p.W
    for a in p.adapters:
        method: Any = a.method
        Q, V = projection(method, a.params)
        W = W + exchange(Q, tape.constant(V), method, a.params, p.W)
    return p.layer.apply(p.x, W, p.b)


def _composed(p: Problem) -> tuple[Array, Array | None]:
    W, b = p.W, p.b
    for a in p.adapters:
        W, b = stack.merge(p.layer, W, b, [a])
    return W, b


def _several(replay: Formula) -> Replay:
    return lambda case: replay(case) if len(case.adapters) > 1 and case.operation != "unmerge" else None


def _scale(scale: Callable[[float, int], float]) -> Replay:
    def change(method: DEFT, p: Params, W: Array) -> Array:
        Q, V = projection(method, p)
        assert method.alpha is not None
        return Q @ (scale(method.alpha, p.P.shape[1]) * p.R - V.T @ W)

    return delta(change, lambda method: injects(method) and bool(method.alpha))


def laws(config: Config, layer: Layer) -> Mapping[str, Law]:
    found = {"deft_P": normal(0.02)}
    drawn = not config["para"] and not config["init_weights"]
    return {**found, "deft_R": normal(0.02 * config["init_scale"])} if drawn else found


def starts(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    """R is V^T W / s; Q's signs are those of the port's own QR, so with qr only what it adds up to is asked."""
    import numpy as np

    config = case.adapters[0].config
    if config["para"] or not config["init_weights"]:
        return ""
    assert case.weight is not None
    method, W = _method(config), layer.fold(np.asarray(case.weight, dtype=np.float64))
    change = method.change(layer, Params(draw["deft_P"], draw["deft_R"]), W, None).W
    far = float(np.max(np.abs(change)))
    return (
        ""
        if far <= 1e-4
        else f"init-not-identity: deft_R must be what deft_P takes out, and the fresh adapter moves the weight by {far:.3g}"
    )


FRESH = Fresh(
    clause="DEFT-C16",
    starts={
        "default": Start({"r": 4, "alpha": 6}),
        "false": Start({"r": 4, "init_weights": False, "init_scale": 0.5}),
        "para": Start({"r": 4, "para": True}),
    },
    laws=laws,
    identity=starts,
)
FILES = Files(
    configs_clause="DEFT-C18",
    keys_clause="DEFT-C19",
    configs={
        "plain": {"r": 4},
        "rank-missing": {},
        "qr": {"r": 3, "alpha": 6, "decomposition_method": "qr"},
        "para": {"r": 2, "para": True},
    },
    told={"decomposition_method": "decomposition_method", "para": "para"},
)


def _mistake(name: str, clause: str, sentence: str, replay: Replay) -> Mistake:
    return Mistake(name=name, clause=clause, sentence=sentence, replay=replay)


SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        _mistake(
            "relu-on-the-left",
            "DEFT-C3",
            "the projector is relu(P) P^T instead of P relu(P)^T, and relu(P) injects",
            delta(lambda m, p, W: exchange(relu(p.P), p.P, m, p, W), by_relu),
        ),
        _mistake(
            "relu-on-both",
            "DEFT-C3",
            "relu acts on P wherever it stands",
            delta(lambda m, p, W: exchange(relu(p.P), relu(p.P), m, p, W), by_relu),
        ),
        _mistake(
            "relu-missing", "DEFT-C3", "the projector is P P^T, without relu", delta(lambda m, p, W: exchange(p.P, p.P, m, p, W), by_relu)
        ),
        _mistake(
            "qr-ignored",
            "DEFT-C3",
            "decomposition_method is not read: it is always relu",
            as_if(lambda case: with_config(case, lambda c: {**c, "decomposition_method": "relu"})),
        ),
        _mistake(
            "qr-signs-positive",
            "DEFT-C7",
            "the columns of Q have the signs of Gram and Schmidt, not those of LAPACK's QR",
            delta(_positive, lambda m: by_qr(m) and injects(m)),
        ),
        _mistake(
            "injected-through-p",
            "DEFT-C7",
            "with qr what is put in goes through P instead of through Q",
            delta(_through_p, lambda m: by_qr(m) and injects(m)),
        ),
        _mistake(
            "injection-missing",
            "DEFT-C1",
            "nothing is put in: W' = W - Q V^T W, as with para",
            delta(lambda m, p, W: -(projection(m, p)[0] @ (projection(m, p)[1].T @ W)), injects),
        ),
        _mistake(
            "removal-missing",
            "DEFT-C1",
            "nothing is taken out: W' = W + s Q R",
            delta(lambda m, p, W: projection(m, p)[0] @ injected(m, p), injects),
        ),
        _mistake(
            "removal-added",
            "DEFT-C1",
            "what should be taken out is added once more",
            delta(lambda m, p, W: projection(m, p)[0] @ (injected(m, p) + projection(m, p)[1].T @ W)),
        ),
        _mistake("scale-is-alpha", "DEFT-C5", "the scale is alpha instead of alpha / r", _scale(lambda alpha, r: alpha)),
        _mistake("scale-is-one", "DEFT-C5", "alpha is ignored", _scale(lambda alpha, r: 1.0)),
        _mistake(
            "scale-rooted", "DEFT-C5", "the scale is alpha / sqrt(r) instead of alpha / r", _scale(lambda alpha, r: alpha / math.sqrt(r))
        ),
        _mistake(
            "scale-on-removal",
            "DEFT-C5",
            "the scale multiplies what is taken out as well",
            delta(_scaled_both, lambda m: injects(m) and bool(m.alpha)),
        ),
        _mistake(
            "scale-of-asked-rank",
            "DEFT-C6",
            "alpha is divided by the rank that was asked for, where a layer has fewer outputs",
            delta(_asked_rank, lambda m: injects(m) and m.r > 7),
        ),
        _mistake("p-transposed", "DEFT-C8", "the numbers of P are read as (r, out) instead of (out, r)", reread("deft_P")),
        _mistake("r-transposed", "DEFT-C8", "the numbers of R are read as (in, r) instead of (r, in)", reread("deft_R")),
        only_first_adapter("DEFT-C10"),
        _mistake(
            "adapters-composed",
            "DEFT-C10",
            "each adapter takes out of what the one before made of the weight, not of the frozen one",
            _several(Formula(weight=_composed)),
        ),
        *merging("DEFT-C11", "DEFT-C12"),
        _mistake(
            "grad-projector-held",
            "DEFT-C14",
            "V is held constant in the gradient: P receives that of Q alone",
            only(backward=lambda case: autograd(case, _held)),
        ),
        input_gradient_missing("DEFT-C15"),
    ),
)
