"""How the learning rate goes over a training: step -> the factor that it is multiplied with. Step 0 is the first.

    w = warmup, n = total, f the part of the way from w to n that is behind:  f = (step - w) / (n - w)

    step < w                    step / w, of all but constant
    constant                    1
    linear                      1 - f, and 0 behind n
    cosine                      max(0, (1 + cos(2 pi cycles f)) / 2)
    restarts                    (1 + cos(pi (cycles f mod 1))) / 2, and 0 behind n
    polynomial                  ((lr - end) (1 - f)^power + end) / lr, and end / lr behind n
    inverse_sqrt                1 / sqrt((step + s) / timescale),   s = timescale - w

HF      transformers.get_*_schedule_with_warmup. A timescale of None, or 0, is w, and 10000 where w is 0.
"""

from __future__ import annotations

import math

from peft_ref.errors import ConfigError


def constant(step: int) -> float:
    return 1.0


def constant_with_warmup(step: int, *, warmup: int) -> float:
    return step / max(1, warmup) if step < warmup else 1.0


def linear(step: int, *, warmup: int, total: int) -> float:
    return step / max(1, warmup) if step < warmup else max(0.0, (total - step) / max(1, total - warmup))


def cosine(step: int, *, warmup: int, total: int, cycles: float = 0.5) -> float:
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, 0.5 * (1 + math.cos(2 * math.pi * cycles * _done(step, warmup, total))))


def restarts(step: int, *, warmup: int, total: int, cycles: int = 1) -> float:
    """The cosine that begins again `cycles` times."""
    if step < warmup:
        return step / max(1, warmup)
    done = _done(step, warmup, total)
    return 0.0 if done >= 1 else max(0.0, 0.5 * (1 + math.cos(math.pi * ((cycles * done) % 1))))


def polynomial(step: int, *, warmup: int, total: int, lr: float, end: float = 1e-7, power: float = 1.0) -> float:
    if lr <= end:
        raise ConfigError(f"end={end} is not below lr={lr} (transformers refuses it too).")
    if step < warmup:
        return step / max(1, warmup)
    if step > total or total <= warmup:
        return end / lr
    return float(((lr - end) * (1 - (step - warmup) / (total - warmup)) ** power + end) / lr)


def inverse_sqrt(step: int, *, warmup: int, timescale: int | None = None) -> float:
    if step < warmup:
        return step / max(1, warmup)
    scale = timescale or warmup or 10_000
    return 1 / math.sqrt((step + scale - warmup) / scale)


def _done(step: int, warmup: int, total: int) -> float:
    return (step - warmup) / max(1, total - warmup)
