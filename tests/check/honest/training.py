"""AdaLoRA's penalty and its allocator as an honest port may compute them, written from spec/methods/adalora.md."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from peft_ref.check.case import Answer, Case
from tests.check.honest.arithmetic import Arithmetic, Host

Tensors = dict[str, dict[str, Host]]
KEYS = ("lora_A", "lora_E", "lora_B")


def answer(case: Case, a: Arithmetic) -> Answer:
    return (aux_loss if case.operation == "aux_loss" else allocate)(case.question, a)


# ---- the penalty


def aux_loss(question: Any, a: Arithmetic) -> Answer:
    tensors, weight = _read(question["parameters"], a), question["adapter_config"]["orth_reg_weight"]
    n = 2 * len(tensors)
    norms, out = [], {}
    for name, own in tensors.items():
        A, E, B = (own[key] for key in KEYS)
        norm_A, dA = factor(a, A, weight / n)
        norm_B, dB = factor(a, B.T, weight / n)
        norms += [norm_A, norm_B]
        out |= {f"gradients.{name}.lora_A": dA, f"gradients.{name}.lora_E": np.zeros_like(E), f"gradients.{name}.lora_B": dB.T}
    every = np.stack(norms)
    ways: tuple[Callable[[], Host], ...] = (
        lambda: a.scaled(a.sum(every), weight / n),
        lambda: a.scaled(a.over(a.sum(every), a.number(n)), weight),
        lambda: a.sum(a.scaled(every, weight / n)),
        lambda: a.over(a.sum(a.scaled(every, weight)), a.number(n)),
    )
    return {"loss": np.asarray(a.pick(*ways)()), **out}


def factor(a: Arithmetic, F: Host, share: float) -> tuple[Host, Host]:
    """|M| with M = F F^T - 1, and share 2 M F / |M|."""
    one = a.array(np.eye(F.shape[0]))
    M = a.matmul(F, F.T, start=-one) if a.pick(True, False) else a.matmul(F, F.T) - one
    size = a.norm(M.reshape(1, -1))[0]
    if size == 0:
        return size, np.zeros_like(F)
    ways: tuple[Callable[[], Host], ...] = (
        lambda: a.scaled(a.over(a.matmul(M, F), size), 2 * share),
        lambda: a.scaled(a.matmul(a.over(M, size), F), 2 * share),
        lambda: a.matmul(a.scaled(a.over(M, size), 2 * share), F),
        lambda: a.over(a.scaled(a.matmul(M + M, F), share), size),
        lambda: a.add(*2 * [a.scaled(a.matmul(a.over(M, size), F), share)]),  # both places in which F stands
    )
    return size, a.pick(*ways)()


# ---- the allocator


def allocate(question: Any, a: Arithmetic) -> Answer:
    config = question["adapter_config"]
    last = config["total_step"] - config["tfinal"]
    S: dict[tuple[str, str], Host] = {}
    U: dict[tuple[str, str], Host] = {}
    kept: dict[str, Host] = {}
    out: Answer = {}
    for step in question["steps"]:
        t, params, grads = step["step"], _read(step["parameters"], a), _read(step["gradients"], a)
        if t < last:
            for at in ((name, key) for name in params for key in KEYS):
                p, g = params[at[0]][at[1]], grads[at[0]][at[1]]
                now = np.abs(p * g) if a.pick(True, False) else np.abs(p) * np.abs(g)
                S[at] = smooth(a, config["beta1"], S.get(at, np.zeros_like(now)), now)
                U[at] = smooth(a, config["beta2"], U.get(at, np.zeros_like(now)), np.abs(now - S[at]))
        if t == last or (config["tinit"] < t < last and t % config["deltaT"] == 0):
            kept = allocation(a, config, S, U, list(params), t)
        masked = kept if t >= last or (t > config["tinit"] and t % config["deltaT"] == 0) else {}
        for name, own in params.items():
            E = np.where(masked[name][:, None], own["lora_E"], np.zeros_like(own["lora_E"])) if name in masked else own["lora_E"]
            out |= {f"steps.{t}.{name}.{key}": E if key == "lora_E" else own[key] for key in KEYS}
    out |= {f"sensitivity.{name}.{key}": v for (name, key), v in S.items()}
    return out | {f"uncertainty.{name}.{key}": v for (name, key), v in U.items()}


def smooth(a: Arithmetic, beta: float, old: Host, new: Host) -> Host:
    """beta old + (1 - beta) new, with 1 - beta in the format or from outside, or as a step from the old one towards the new one."""
    rest = a.number(1 - beta) if a.pick(True, False) else a.number(1.0) - a.number(beta)
    return a.pick(lambda: a.add(a.scaled(old, beta), rest * new), lambda: old + rest * (new - old))()


def allocation(a: Arithmetic, config: Any, S: Any, U: Any, names: list[str], t: int) -> dict[str, Host]:
    init, target, last = len(names) * config["init_r"], len(names) * config["target_r"], config["total_step"] - config["tfinal"]
    rest = 1 - Fraction(t - config["tinit"], last - config["tinit"])
    pruned = init - int((init - target) * rest**3 + target)
    scores = {}
    for name in names:
        parts = [S[name, key] * U[name, key] for key in KEYS]
        scores[name] = a.add(mean(a, parts[0].T), parts[1][:, 0], mean(a, parts[2]))
    threshold = np.sort(np.concatenate(list(scores.values())))[pruned - 1] if pruned else None
    return {name: s > threshold if pruned else np.ones(s.shape, dtype=bool) for name, s in scores.items()}


def mean(a: Arithmetic, rows: Host) -> Host:
    """Of every column."""
    n = rows.shape[0]
    return a.over(a.sum(rows), a.number(n)) if a.pick(True, False) else a.sum(a.scaled(rows, 1 / n))


def _read(modules: Any, a: Arithmetic) -> Tensors:
    return {name: {key: a.array(tensors[key]) for key in KEYS} for name, tensors in modules.items()}
