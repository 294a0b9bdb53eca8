"""What ports get wrong about AdaLoRA's penalty. A wrong penalty's gradient is what autograd returns for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check import tape, training
from peft_ref.check.case import Answer, Case
from peft_ref.check.mistake import AsIf, Mistake, Replay, only
from peft_ref.check.oracle import answer
from peft_ref.methods.adalora import Params

Penalty: TypeAlias = Callable[[float, Mapping[str, Params]], Array]  # given orth_reg_weight and every module's tensors


def wrong_penalty(penalty: Penalty) -> Replay:
    """The wrong loss, and its gradients."""

    def aux_loss(case: Case) -> Answer:
        params = training.parameters_of(case, tape.tape_array)
        loss = np.asarray(penalty(training.method_of(case).orth_reg_weight, params))
        tape.backward(loss, np.ones(()))
        grads = {name: Params(*map(tape.gradients, p)) for name, p in params.items()}
        return {"loss": np.asarray(float(loss[()])), **training.named("gradients", grads)}

    return only(aux_loss=aux_loss)


def wrong_gradient(factor: float) -> Replay:
    """The right loss, and its gradients times a factor."""

    def aux_loss(case: Case) -> Answer:
        return {name: v if name == "loss" else factor * v for name, v in answer(case).items()}

    return only(aux_loss=aux_loss)


def with_adapter_config(change: Callable[[dict[str, Any]], dict[str, Any]], operation: str) -> Replay:
    """The right answer to the question with another configuration."""

    def changed(case: Case) -> Case | None:
        if case.operation != operation:
            return None
        config = change(dict(case.question["adapter_config"]))
        other = replace(case, question={**case.question, "adapter_config": config})
        return None if config == case.question["adapter_config"] else other

    return AsIf(changed)


def norms(*excesses: Callable[[Params], Array]) -> Callable[[Mapping[str, Params]], list[Any]]:
    """Frobenius's norm of each of these matrices, of every module."""
    return lambda params: [_norm(excess(p)) for p in params.values() for excess in excesses]


def _norm(M: Array) -> Any:
    """Where it is zero it has no gradient, as in every autograd engine that people train with."""
    square = np.sum(M * M)
    return square.sqrt() if float(square) > 0 else square * 0.0


def _one(M: Array) -> Array:
    return M - np.eye(M.shape[0])


def _left(M: Array) -> Array:
    return _one(M @ M.T)


def _right(M: Array) -> Array:
    return _one(M.T @ M)


def of_A(p: Params) -> Array:
    return _left(p.A)


def of_B(p: Params) -> Array:
    return _right(p.B)


BOTH = norms(of_A, of_B)


def mean(found: Callable[[Mapping[str, Params]], list[Any]]) -> Penalty:
    return lambda weight, params: weight * sum(found(params)) * (1 / len(found(params)))


PENALTY = (
    Mistake(
        name="penalty-summed",
        clause="ADALORA-C19",
        sentence="the penalty's norms are summed, and not divided by their number",
        replay=wrong_penalty(lambda weight, params: weight * sum(BOTH(params))),
    ),
    Mistake(
        name="penalty-mean-over-modules",
        clause="ADALORA-C19",
        sentence="the sum of the penalty's norms is divided by the number of modules instead of that of factors",
        replay=wrong_penalty(lambda weight, params: weight * sum(BOTH(params)) * (1 / len(params))),
    ),
    Mistake(
        name="penalty-squared",
        clause="ADALORA-C19",
        sentence="the penalty's norms are squared, as in the paper",
        replay=wrong_penalty(lambda weight, params: weight * sum(n * n for n in BOTH(params)) * (1 / len(BOTH(params)))),
    ),
    Mistake(
        name="penalty-weight-ignored",
        clause="ADALORA-C19",
        sentence="orth_reg_weight is not read: the penalty has the weight 1",
        replay=with_adapter_config(lambda config: {**config, "orth_reg_weight": 1.0}, "aux_loss"),
    ),
    Mistake(
        name="penalty-default-weight",
        clause="ADALORA-C19",
        sentence="orth_reg_weight is not read: the penalty has the weight 0.5, the default",
        replay=with_adapter_config(lambda config: {**config, "orth_reg_weight": 0.5}, "aux_loss"),
    ),
    Mistake(
        name="penalty-B-left-out",
        clause="ADALORA-C19",
        sentence="only A has a penalty, and n counts A alone",
        replay=wrong_penalty(mean(norms(of_A))),
    ),
    Mistake(
        name="penalty-A-left-out",
        clause="ADALORA-C19",
        sentence="only B has a penalty, and n counts B alone",
        replay=wrong_penalty(mean(norms(of_B))),
    ),
    Mistake(
        name="penalty-E-included",
        clause="ADALORA-C19",
        sentence="lora_E is a third factor, with E E^T - 1, and n counts it",
        replay=wrong_penalty(mean(norms(of_A, lambda p: _left(p.E), of_B))),
    ),
    Mistake(
        name="penalty-of-E-times-A",
        clause="ADALORA-C19",
        sentence="E * A takes the place of A in the penalty",
        replay=wrong_penalty(mean(norms(lambda p: _left(p.E * p.A), of_B))),
    ),
    Mistake(
        name="penalty-without-identity",
        clause="ADALORA-C19",
        sentence="the penalty's norms are those of A A^T and B^T B, with no identity taken off",
        replay=wrong_penalty(mean(norms(lambda p: p.A @ p.A.T, lambda p: p.B.T @ p.B))),
    ),
    Mistake(
        name="penalty-B-wrong-side",
        clause="ADALORA-C19",
        sentence="B has B B^T - 1 instead of B^T B - 1 in the penalty",
        replay=wrong_penalty(mean(norms(of_A, lambda p: _left(p.B)))),
    ),
    Mistake(
        name="penalty-A-wrong-side",
        clause="ADALORA-C19",
        sentence="A has A^T A - 1 instead of A A^T - 1 in the penalty",
        replay=wrong_penalty(mean(norms(lambda p: _right(p.A), of_B))),
    ),
    Mistake(
        name="penalty-gradient-missing",
        clause="ADALORA-C20",
        sentence="the penalty is in the loss, and nothing of it in the tensors' gradients",
        replay=wrong_gradient(0.0),
    ),
    Mistake(
        name="penalty-gradient-halved",
        clause="ADALORA-C20",
        sentence="the penalty's gradients lack the factor 2: M is A A^T - 1, and A stands in it twice",
        replay=wrong_gradient(0.5),
    ),
)
