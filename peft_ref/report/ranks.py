"""How AdaLoRA's allocator shares its budget out over a training: the ranks of the modules, step by step.

`trained` makes a training of its own, small enough to be followed. Every module has a frozen weight W and a goal W + D, where D is random
of a given rank, and the loss is half the sum of squares of what is missing:

    L = 1/2 sum over the modules |W' - (W + D)|^2  +  penalty        dL/dW' = W' - (W + D)

A module whose D has rank 3 has use for three triplets. The optimiser is Adam. `followed` takes a training from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np

from peft_ref import stack
from peft_ref.check.case import Case, NDArray, config_of, from_json
from peft_ref.check.oracle import float64
from peft_ref.check.protocol import violation
from peft_ref.check.training import KEYS, Step, method_of, steps_of
from peft_ref.errors import ConfigError, clean
from peft_ref.layers import Linear
from peft_ref.methods.adalora import AdaLoRA, Params
from peft_ref.methods.adalora_allocator import State, after_step, budget
from peft_ref.stack import Adapter

SIZES = ((24, 18), (18, 30), (30, 16), (16, 24), (24, 20), (20, 28))  # in, out of the modules, over and over
RATE, DECAYS = 0.005, (0.9, 0.99)  # Adam's


@final
@dataclass(frozen=True, kw_only=True)
class History:
    """`ranks[module][i]` triplets of a module stay after step `steps[i]`, by the last allocation; the budget is that of all modules."""

    method: AdaLoRA
    steps: tuple[int, ...]
    budget: tuple[int, ...]
    ranks: Mapping[str, tuple[int, ...]]

    def to_json(self) -> dict[str, Any]:
        return {
            "peft_ref_ranks": 1,
            "adapter_config": config_of(self.method),
            "steps": list(self.steps),
            "budget": list(self.budget),
            "ranks": {name: list(ranks) for name, ranks in self.ranks.items()},
        }


def table(history: History) -> str:
    """The modules' ranks at the first step, at every step at which one of them changed, and at the last."""
    rows = list(zip(history.steps, history.budget, zip(*history.ranks.values(), strict=True), strict=True))
    shown = [row for n, row in enumerate(rows) if n in (0, len(rows) - 1) or row[2] != rows[n - 1][2]]
    head = f"{'step':>7}{'budget':>8}{'kept':>7}  " + "".join(f"{f'[{n}]':>5}" for n in range(1, len(history.ranks) + 1))
    body = [f"{step:>7}{allowed:>8}{sum(ranks):>7}  " + "".join(f"{rank:>5}" for rank in ranks) for step, allowed, ranks in shown]
    return "\n".join([head, *body, "", *(f"  [{n}] {clean(name)}" for n, name in enumerate(history.ranks, start=1))])


def trained(method: AdaLoRA, wanted: Sequence[int], seed: int) -> History:
    """A training of one module for each rank in `wanted`, from a fresh start over all of the schedule's steps."""
    rng = np.random.default_rng(seed)
    modules = {f"module {n} (to learn: {rank})": _Module.drawn(method, n, rank, rng) for n, rank in enumerate(wanted, start=1)}
    params, state, adam = {name: m.start for name, m in modules.items()}, State(), _Adam()
    counts = _Counts(method, params)
    for step in range(1, (method.total_step or 0) + 1):
        penalty = method.orthogonality_vjp(params, 1.0)
        grads = {name: _plus(m.gradient(method, params[name]), penalty[name]) for name, m in modules.items()}
        params = adam.moved(params, grads)
        state, params = after_step(method, state, params, grads, step)
        counts.add(step, state)
    return counts.history()


def followed(trace: Any) -> History:
    """The allocator over a trace, as the operation `allocate` of spec/protocol.md asks it. Raises `ConfigError` where it is none."""
    case = _read(trace)
    try:
        steps = list(steps_of(case, float64))
    except KeyError as missing:
        raise ConfigError(f"a module of the trace has no {missing}: each has {', '.join(KEYS)}.") from None
    _check(steps)
    method, state = method_of(case), State()
    counts = _Counts(method, steps[0].params)
    for step in steps:
        state, _ = after_step(method, state, step.params, step.grads, step.number)
        counts.add(step.number, state)
    return counts.history()


class _Counts:
    """What there is to tell of every step."""

    def __init__(self, method: AdaLoRA, params: Mapping[str, Params]) -> None:
        self._method, self._params = method, params
        self._steps: list[tuple[int, int, dict[str, int]]] = []

    def add(self, step: int, state: State) -> None:
        full = {name: int(p.A.shape[0]) for name, p in self._params.items()}
        ranks = full if state.kept is None else {name: int(np.count_nonzero(keep)) for name, keep in state.kept.items()}
        self._steps.append((step, budget(self._method, self._params, step), ranks))

    def history(self) -> History:
        return History(
            method=self._method,
            steps=tuple(step for step, _, _ in self._steps),
            budget=tuple(allowed for _, allowed, _ in self._steps),
            ranks={name: tuple(ranks[name] for _, _, ranks in self._steps) for name in self._params},
        )


# ---- the training


class _Module(NamedTuple):
    layer: Linear
    W: NDArray
    goal: NDArray  # W + D, transposed
    start: Params

    @classmethod
    def drawn(cls, method: AdaLoRA, n: int, rank: int, rng: np.random.Generator) -> _Module:
        n_in, out = SIZES[(n - 1) % len(SIZES)]
        if not 0 <= rank <= min(n_in, out):
            raise ConfigError(f"module {n} of {out} by {n_in} cannot learn a matrix of rank {rank}.\n  Give 0 to {min(n_in, out)}.")
        layer, W = Linear(in_features=n_in, out_features=out), rng.normal(size=(out, n_in)) / n_in**0.5
        left, _ = np.linalg.qr(rng.normal(size=(out, rank)))
        right, _ = np.linalg.qr(rng.normal(size=(n_in, rank)))
        D = left * np.linspace(1.5, 1.0, rank) @ right.T
        return cls(layer, W, (W + D).T, method.init(layer, W, rng).params)

    def gradient(self, method: AdaLoRA, p: Params) -> Params:
        """On inputs that are the rows of the identity the outputs are those of W', so that a difference of outputs is one of weights."""
        adapters, x = [Adapter(method, p)], np.eye(self.layer.in_features)
        y, pull = stack.forward_and_vjp(self.layer, self.W, None, adapters, x)
        grads: Params = pull(y - self.goal).params[0]
        return grads


class _Adam:
    def __init__(self) -> None:
        self._moments: dict[str, tuple[Params, Params]] = {}
        self._t = 0

    def moved(self, params: Mapping[str, Params], grads: Mapping[str, Params]) -> dict[str, Params]:
        self._t += 1
        return {name: Params(*self._of_module(name, p, grads[name])) for name, p in params.items()}

    def _of_module(self, name: str, p: Params, g: Params) -> Iterable[NDArray]:
        zeros = Params(*map(np.zeros_like, p))
        m, v = self._moments.get(name, (zeros, zeros))
        first, second = DECAYS
        m = Params(*(first * old + (1 - first) * new for old, new in zip(m, g, strict=True)))
        v = Params(*(second * old + (1 - second) * new * new for old, new in zip(v, g, strict=True)))
        self._moments[name] = m, v
        rate = RATE * (1 - second**self._t) ** 0.5 / (1 - first**self._t)
        return (value - rate * up / (np.sqrt(down) + 1e-8) for value, up, down in zip(p, m, v, strict=True))


def _plus(g: Params, h: Params) -> Params:
    return Params(*(a + b for a, b in zip(g, h, strict=True)))


# ---- a trace from elsewhere


def _read(trace: Any) -> Case:
    if not isinstance(trace, dict) or not {"adapter_config", "steps"} <= trace.keys():
        raise ConfigError('a trace is a JSON object with "adapter_config" and "steps", as the operation allocate has in spec/protocol.md.')
    question = {k: trace[k] for k in ("adapter_config", "steps")}
    asked = {"id": "trace", "method": "adalora", "operation": "allocate", "clause": "", **question}
    if problem := violation(asked, "case"):
        raise ConfigError(f"this is no trace: {problem}.\n  See the operation allocate in spec/protocol.md.")
    try:
        return from_json(asked)
    except ValueError as error:
        raise ConfigError(f"this is no trace: {error}.") from None


def _check(steps: Sequence[Step]) -> None:
    """That the steps follow each other, and every one has the modules of the first, each with A (r, in), E (r, 1) and B (out, r)."""
    for name, p in steps[0].params.items():
        r = p.A.shape[0]
        if p.A.ndim != 2 or p.B.ndim != 2 or p.E.shape != (r, 1) or p.B.shape[1] != r:
            shapes = ", ".join(f"{key} {v.shape}" for key, v in zip(KEYS, p, strict=True))
            raise ConfigError(f"{name}: {shapes}; expected (r, in), (r, 1) and (out, r).")
    wanted = _shapes(steps[0].params)
    for n, step in enumerate(steps):
        if step.number != steps[0].number + n:
            raise ConfigError(f"step {step.number} comes after step {steps[n - 1].number}.\n  Give every step once, in order.")
        for what, modules in (("parameters", step.params), ("gradients", step.grads)):
            for name in wanted.keys() | modules.keys():
                if wanted.get(name) != (got := _shapes(modules).get(name)):
                    raise ConfigError(f"step {step.number}: the {what} of {name} are {got}, those of the first step {wanted.get(name)}.")


def _shapes(modules: Mapping[str, Params]) -> dict[str, tuple[tuple[int, ...], ...]]:
    return {name: tuple(v.shape for v in p) for name, p in modules.items()}
