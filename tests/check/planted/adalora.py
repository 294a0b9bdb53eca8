"""AdaLoRA's training as somebody might write it from spec/methods/adalora.md, and the same with one mistake made.

Every class is one sentence of the judge turned into code; nothing here imports peft_ref. The penalty's gradient is a difference along the
imaginary axis, which cancels nothing. Parameters are plain dictionaries: module -> key -> array.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Json = dict[str, Any]
Host = Any
KEYS = ("lora_A", "lora_E", "lora_B")


class AdaLoRA:
    operations = ("aux_loss", "allocate")

    def __init__(self, dtype: Any = np.float64) -> None:
        self.dtype = dtype

    def read(self, modules: Json) -> Json:
        return {name: {key: np.asarray(v, dtype=self.dtype) for key, v in own.items()} for name, own in modules.items()}

    def answer(self, case: Json) -> Json | None:
        if case["operation"] not in self.operations:
            return None
        return self.aux_loss(case) if case["operation"] == "aux_loss" else self.allocate(case)

    # ---- the penalty

    def penalty(self, config: Json, tensors: Json) -> Any:
        norms = [norm for own in tensors.values() for norm in self.norms(own)]
        return self.weight(config) * self.combined(norms, len(tensors))

    def weight(self, config: Json) -> Any:
        return self.dtype(config["orth_reg_weight"])

    def norms(self, own: Json) -> list[Any]:
        return [self.size(own["lora_A"] @ own["lora_A"].T), self.size(own["lora_B"].T @ own["lora_B"])]

    def size(self, square: Host) -> Any:
        M = square - np.eye(len(square), dtype=square.dtype)
        total = (M * M).sum()
        return np.sqrt(total) if total.real > 0 else 0 * total

    def combined(self, norms: list[Any], modules: int) -> Any:
        return sum(norms) / len(norms)

    def aux_loss(self, case: Json) -> Json:
        config, step = case["adapter_config"], 1e-40
        wide = type(self)(np.clongdouble)
        tensors, gradients = wide.read(case["parameters"]), {}
        for name, own in tensors.items():
            gradients[name] = {key: np.zeros(v.shape) for key, v in own.items()}
            for key, array in own.items():
                for at in np.ndindex(array.shape):
                    array[at] += step * 1j
                    gradients[name][key][at] = wide.penalty(config, tensors).imag / step
                    array[at] -= step * 1j
        loss = self.penalty(config, self.read(case["parameters"]))
        return {"loss": float(loss), "gradients": {n: {k: g.tolist() for k, g in own.items()} for n, own in gradients.items()}}

    # ---- the allocator

    def allocate(self, case: Json) -> Json:
        config, steps = case["adapter_config"], {}
        self.S: Json = {}
        self.U: Json = {}
        self.kept: Json | None = None
        for step in case["steps"]:
            params = self.after_step(config, step["step"], self.read(step["parameters"]), self.read(step["gradients"]))
            steps[str(step["step"])] = {n: {k: v.tolist() for k, v in own.items()} for n, own in params.items()}
        told = {"sensitivity": self.S, "uncertainty": self.U}
        return {"steps": steps, **{w: {n: {k: v.tolist() for k, v in own.items()} for n, own in s.items()} for w, s in told.items()}}

    def after_step(self, config: Json, t: int, params: Json, grads: Json) -> Json:
        last = self.last(config)
        if t > last:
            return self.frozen(params)
        if t < last:
            self.update(config, params, grads)
        if t == last or self.due(config, t):
            self.choose(config, t, params)
            return self.masked(params)
        return params

    def last(self, config: Json) -> int:
        return int(config["total_step"] - config["tfinal"])

    def due(self, config: Json, t: int) -> bool:
        return bool(t > config["tinit"] and t % config["deltaT"] == 0)

    def update(self, config: Json, params: Json, grads: Json) -> None:
        beta1, beta2 = self.dtype(config["beta1"]), self.dtype(config["beta2"])
        for name, own in params.items():
            S, U = self.S.setdefault(name, {}), self.U.setdefault(name, {})
            for key, p in own.items():
                now, zero = self.importance(p, grads[name][key]), np.zeros_like(p)
                old_S, old_U = S.get(key, zero), U.get(key, zero)
                S[key] = beta1 * old_S + (1 - beta1) * now
                U[key] = beta2 * old_U + (1 - beta2) * self.spread(now, S[key], old_S)

    def importance(self, p: Host, g: Host) -> Host:
        return np.abs(p * g)

    def spread(self, now: Host, S: Host, old_S: Host) -> Host:
        return np.abs(now - S)

    def entry(self, name: str, key: str) -> Host:
        return self.S[name][key] * self.U[name][key]

    def score(self, name: str, own: Json) -> Host:
        return self.entry(name, "lora_E")[:, 0] + self.entry(name, "lora_A").mean(axis=1) + self.entry(name, "lora_B").mean(axis=0)

    def budget(self, config: Json, t: int, modules: int) -> int:
        init, target = modules * config["init_r"], modules * config["target_r"]
        return self.whole((init - target) * (1 - (t - config["tinit"]) / (self.last(config) - config["tinit"])) ** self.power + target)

    power = 3

    def whole(self, budget: float) -> int:
        return math.floor(budget)

    def choose(self, config: Json, t: int, params: Json) -> None:
        scores = {name: self.score(name, own) for name, own in params.items()}
        every = np.concatenate(list(scores.values()))
        gone = every.size - self.budget(config, t, len(params))
        self.kept = self.picked(scores, every, gone)

    def picked(self, scores: Json, every: Host, gone: int) -> Json:
        threshold = np.sort(every)[gone - 1] if gone else -np.inf
        return {name: s > threshold for name, s in scores.items()}

    def masked(self, params: Json) -> Json:
        assert self.kept is not None
        return {name: {**own, "lora_E": own["lora_E"] * self.kept[name][:, None]} for name, own in params.items()}

    def frozen(self, params: Json) -> Json:
        return self.masked(params)


class PenaltySummed(AdaLoRA):
    def combined(self, norms: list[Any], modules: int) -> Any:
        return sum(norms)


class PenaltyMeanOverModules(AdaLoRA):
    def combined(self, norms: list[Any], modules: int) -> Any:
        return sum(norms) / modules


class PenaltySquared(AdaLoRA):
    def combined(self, norms: list[Any], modules: int) -> Any:
        return sum(n * n for n in norms) / len(norms)


class PenaltyBLeftOut(AdaLoRA):
    def norms(self, own: Json) -> list[Any]:
        return super().norms(own)[:1]


class PenaltyBWrongSide(AdaLoRA):
    def norms(self, own: Json) -> list[Any]:
        return [super().norms(own)[0], self.size(own["lora_B"] @ own["lora_B"].T)]


class GradientOnly(AdaLoRA):
    def importance(self, p: Host, g: Host) -> Host:
        return np.abs(g)


class UncertaintyFromOldAverage(AdaLoRA):
    def spread(self, now: Host, S: Host, old_S: Host) -> Host:
        return np.abs(now - old_S)


class ScoreWithoutUncertainty(AdaLoRA):
    def entry(self, name: str, key: str) -> Host:
        return self.S[name][key]


class ScoreOfEAlone(AdaLoRA):
    def score(self, name: str, own: Json) -> Host:
        return self.entry(name, "lora_E")[:, 0]


class ScoreSummed(AdaLoRA):
    def score(self, name: str, own: Json) -> Host:
        return self.entry(name, "lora_E")[:, 0] + self.entry(name, "lora_A").sum(axis=1) + self.entry(name, "lora_B").sum(axis=0)


class KeptBySizeOfE(AdaLoRA):
    def score(self, name: str, own: Json) -> Host:
        return np.abs(own["lora_E"][:, 0])


class BudgetLinear(AdaLoRA):
    power = 1


class BudgetRoundedUp(AdaLoRA):
    def whole(self, budget: float) -> int:
        return math.ceil(budget)


class BudgetRoundedToNearest(AdaLoRA):
    def whole(self, budget: float) -> int:
        return math.floor(budget + 0.5)


class WarmUpIgnored(AdaLoRA):
    def after_step(self, config: Json, t: int, params: Json, grads: Json) -> Json:
        return super().after_step({**config, "tinit": 0}, t, params, grads)


class DeltaTIgnored(AdaLoRA):
    def due(self, config: Json, t: int) -> bool:
        return bool(t > config["tinit"])


class TfinalIgnored(AdaLoRA):
    def last(self, config: Json) -> int:
        return int(config["total_step"])


class StepsCountedFromZero(AdaLoRA):
    """An own counter."""

    def allocate(self, case: Json) -> Json:
        self.count = -1
        return super().allocate(case)

    def after_step(self, config: Json, t: int, params: Json, grads: Json) -> Json:
        self.count += 1
        return super().after_step(config, self.count, params, grads)


class ThresholdInEveryModule(AdaLoRA):
    def picked(self, scores: Json, every: Host, gone: int) -> Json:
        stay = (every.size - gone) // len(scores)
        return {name: super(ThresholdInEveryModule, self).picked({name: s}, s, s.size - stay)[name] for name, s in scores.items()}


class ThresholdStays(AdaLoRA):
    def picked(self, scores: Json, every: Host, gone: int) -> Json:
        threshold = np.sort(every)[gone - 1] if gone else -np.inf
        return {name: s >= threshold for name, s in scores.items()}


class TiesKept(AdaLoRA):
    """The indices of a stable sort; the first `gone` of them go."""

    def picked(self, scores: Json, every: Host, gone: int) -> Json:
        stays = np.ones(every.size, dtype=bool)
        stays[np.argsort(every, kind="stable")[:gone]] = False
        ends = np.cumsum([s.size for s in scores.values()])[:-1]
        return dict(zip(scores, np.split(stays, ends), strict=True))


class PrunedForGood(AdaLoRA):
    def choose(self, config: Json, t: int, params: Json) -> None:
        before = self.kept
        super().choose(config, t, params)
        if before is not None and self.kept is not None:
            self.kept = {name: keep & before[name] for name, keep in self.kept.items()}


class FreezeNotMasked(AdaLoRA):
    def frozen(self, params: Json) -> Json:
        return params


class AAndBMasked(AdaLoRA):
    def masked(self, params: Json) -> Json:
        out = super().masked(params)
        assert self.kept is not None
        for name, keep in self.kept.items():
            out[name] |= {"lora_A": out[name]["lora_A"] * keep[:, None], "lora_B": out[name]["lora_B"] * keep}
        return out


PLANTED: dict[str, Any] = {
    "penalty-summed": PenaltySummed,
    "penalty-mean-over-modules": PenaltyMeanOverModules,
    "penalty-squared": PenaltySquared,
    "penalty-B-left-out": PenaltyBLeftOut,
    "penalty-B-wrong-side": PenaltyBWrongSide,
    "gradient-only": GradientOnly,
    "uncertainty-from-old-average": UncertaintyFromOldAverage,
    "score-without-uncertainty": ScoreWithoutUncertainty,
    "score-of-E-alone": ScoreOfEAlone,
    "score-summed": ScoreSummed,
    "kept-by-size-of-E": KeptBySizeOfE,
    "budget-linear": BudgetLinear,
    "budget-rounded-up": BudgetRoundedUp,
    "budget-rounded-to-nearest": BudgetRoundedToNearest,
    "warm-up-ignored": WarmUpIgnored,
    "deltaT-ignored": DeltaTIgnored,
    "tfinal-ignored": TfinalIgnored,
    "steps-counted-from-zero": StepsCountedFromZero,
    "threshold-in-every-module": ThresholdInEveryModule,
    "threshold-stays": ThresholdStays,
    "ties-kept": TiesKept,
    "pruned-for-good": PrunedForGood,
    "freeze-not-masked": FreezeNotMasked,
    "A-and-B-masked": AAndBMasked,
}
