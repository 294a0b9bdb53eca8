"""DoRA as somebody might write it, and the same with one mistake made. See lora.py beside this file.

W' = (m / n) (W + s B A)       n the row norms of W0 + s B A, held constant in the gradient
with dropout   y = x W^T + b + drop(x) (W' - W)^T
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.check.planted.lora import Host, Json, LoRA


class DoRA(LoRA):
    """One weight after the other; `gain` and `combine` are where the mistakes go."""

    def hold(self, case: Json) -> None:
        self.held: list[Host] | None = None
        self.held = self.norms(case)

    held: list[Host] | None = None

    def magnitude(self, adapter: Json) -> Host:
        return self.array(adapter["tensors"]["lora_magnitude_vector"]).reshape(-1, 1)

    def norm(self, V0: Host, adapter: Json, case: Json, W: Host) -> Host:
        """Of V0 = W0 + s B A; W is what the earlier adapters made of the weight."""
        return np.sqrt(np.sum(V0 * V0, axis=1, keepdims=True))

    def norms(self, case: Json) -> list[Host]:
        if self.held is not None:
            return self.held
        W0 = self.matrix(case["layer"]["weight"], case["layer"])
        W, found = W0, []
        for adapter in case["adapters"]:
            d = self.delta_of(adapter, case)
            found.append(self.norm(W0 + d, adapter, case, W))
            W = self.combine(self.gain(adapter, found[-1]), W, d)
        return found

    def gain(self, adapter: Json, n: Host) -> Host:
        return np.asarray(self.magnitude(adapter) / n)

    def combine(self, g: Host, W: Host, d: Host) -> Host:
        return np.asarray(g * (W + d))

    def take_apart(self, g: Host, W: Host, d: Host) -> Host:
        return np.asarray(W / g - d)

    def shift_bias(self, g: Host, b: Host) -> Host:
        """What the forward pass adds; merging keeps the bias."""
        return b

    def effective(self, case: Json) -> Host:
        W = self.matrix(case["layer"]["weight"], case["layer"])
        for adapter, n in zip(case["adapters"], self.norms(case), strict=True):
            W = self.combine(self.gain(adapter, n), W, self.delta_of(adapter, case))
        return W

    def forward_rows(self, x: Host, case: Json) -> Host:
        W0, first = self.matrix(case["layer"]["weight"], case["layer"]), case["adapters"][0]
        y = x @ W0.T + self.drop(x, first) @ (self.effective(case) - W0).T if first["dropout"] else x @ self.effective(case).T
        b = self.bias(case)
        if b is None:
            return np.asarray(y)
        for adapter, n in zip(case["adapters"], self.norms(case), strict=True):
            b = self.shift_bias(self.gain(adapter, n), b)
        return np.asarray(y + b)

    def merge(self, case: Json) -> Json:
        return {"weight": self.stored(self.effective(case), case["layer"]).tolist(), "bias": case["layer"]["bias"]}

    def unmerge(self, case: Json) -> Json:
        W = self.matrix(case["merged"]["weight"], case["layer"])
        for adapter, n in reversed(list(zip(case["adapters"], self.norms(case), strict=True))):
            W = self.take_apart(self.gain(adapter, n), W, self.delta_of(adapter, case))
        return {"weight": self.stored(W, case["layer"]).tolist(), "bias": case["merged"]["bias"]}


class NormWrongAxis(DoRA):
    def norm(self, V0: Host, adapter: Json, case: Json, W: Host) -> Host:
        return np.sqrt(np.sum(V0 * V0, axis=0, keepdims=True))


class NormOfBaseOnly(DoRA):
    def norm(self, V0: Host, adapter: Json, case: Json, W: Host) -> Host:
        W0 = self.matrix(case["layer"]["weight"], case["layer"])
        return np.sqrt(np.sum(W0 * W0, axis=1, keepdims=True))


class NormScaleForgotten(DoRA):
    """The norm of W + B A."""

    def norm(self, V0: Host, adapter: Json, case: Json, W: Host) -> Host:
        A, B = self.factors(adapter)
        V = self.matrix(case["layer"]["weight"], case["layer"]) + B @ A
        return np.sqrt(np.sum(V * V, axis=1, keepdims=True))


class NormNotRooted(DoRA):
    def norm(self, V0: Host, adapter: Json, case: Json, W: Host) -> Host:
        return np.asarray(np.sum(V0 * V0, axis=1, keepdims=True))


class NormGlobal(DoRA):
    def norm(self, V0: Host, adapter: Json, case: Json, W: Host) -> Host:
        return np.asarray(np.linalg.norm(V0))


class NormL1(DoRA):
    def norm(self, V0: Host, adapter: Json, case: Json, W: Host) -> Host:
        return np.asarray(np.sum(np.abs(V0), axis=1, keepdims=True))


class NormOfMerged(DoRA):
    """The norm is measured on what the earlier adapters made of the weight."""

    def norm(self, V0: Host, adapter: Json, case: Json, W: Host) -> Host:
        V = W + self.delta_of(adapter, case)
        return np.sqrt(np.sum(V * V, axis=1, keepdims=True))


class MagnitudeIgnored(DoRA):
    def gain(self, adapter: Json, n: Host) -> Host:
        return np.ones_like(n)


class NormIgnored(DoRA):
    def gain(self, adapter: Json, n: Host) -> Host:
        return self.magnitude(adapter)


class DeltaNotNormalised(DoRA):
    """m / n multiplies the frozen weight only."""

    def combine(self, g: Host, W: Host, d: Host) -> Host:
        return np.asarray(g * W + d)

    def take_apart(self, g: Host, W: Host, d: Host) -> Host:
        return np.asarray((W - d) / g)


class BaseNotNormalised(DoRA):
    """m / n multiplies s B A only."""

    def combine(self, g: Host, W: Host, d: Host) -> Host:
        return np.asarray(W + g * d)

    def take_apart(self, g: Host, W: Host, d: Host) -> Host:
        return np.asarray(W - g * d)


class BiasScaled(DoRA):
    """The forward pass multiplies the bias by m / n too."""

    def shift_bias(self, g: Host, b: Host) -> Host:
        return np.asarray(g.reshape(-1) * b)


class GradThroughNorm(DoRA):
    """With u the row of V over its norm, dV = (m / n) (dW - (dW . u) u) instead of (m / n) dW."""

    several = False

    def changed_gradients(self, case: Json, gradients: Json) -> Json:
        wide = type(self)(np.float64)
        adapter, x = case["adapters"][0], wide.rows(case)
        dW = np.asarray(case["dy"]).reshape(x.shape[0], -1).T @ wide.drop(x, adapter)
        V = wide.matrix(case["layer"]["weight"], case["layer"]) + wide.delta_of(adapter, case)
        n = np.sqrt(np.sum(V * V, axis=1, keepdims=True))
        unit = V / n
        dV = wide.magnitude(adapter) / n * (dW - np.sum(dW * unit, axis=1, keepdims=True) * unit)
        (A, B), s = wide.factors(adapter), wide.scale(adapter["config"], case)
        own = dict(gradients["adapters"][0])
        for key in own:
            if "_A" in key:
                own[key] = s * B.T @ dV
            elif "_B" in key:
                own[key] = s * dV @ A.T
        return {**gradients, "adapters": [own]}


class UnmergeWithMergedNorm(DoRA):
    """Unmerge divides by m / n with the norm of the merged weight."""

    def unmerge(self, case: Json) -> Json:
        W = self.matrix(case["merged"]["weight"], case["layer"])
        for adapter in reversed(case["adapters"]):
            n = np.sqrt(np.sum(W * W, axis=1, keepdims=True))
            W = W / (self.magnitude(adapter) / n) - self.delta_of(adapter, case)
        return {"weight": self.stored(W, case["layer"]).tolist(), "bias": case["merged"]["bias"]}


class DropoutOnLowRankOnly(DoRA):
    """Dropout reaches B A x only: (m / n - 1) W x sees all of x."""

    def forward_rows(self, x: Host, case: Json) -> Host:
        first = case["adapters"][0]
        if not first["dropout"]:
            return super().forward_rows(x, case)
        W0, g = self.matrix(case["layer"]["weight"], case["layer"]), self.gain(first, self.norms(case)[0])
        y = x @ (g * W0).T + self.drop(x, first) @ (g * self.delta_of(first, case)).T
        b = self.bias(case)
        return np.asarray(y if b is None else y + b)


class ScaleIsOne(DoRA):
    def scale(self, config: Json, case: Json) -> float:
        return 1.0


class ScaleIsAlpha(DoRA):
    def scale(self, config: Json, case: Json) -> float:
        return float(config["lora_alpha"])


class DropoutMissing(DoRA):
    def drop(self, x: Host, adapter: Json) -> Host:
        return x


class DoubleMerge(DoRA):
    """Merged once more, into the merged weight: the norm is still the frozen one's."""

    def effective(self, case: Json) -> Host:
        W = super().effective(case)
        if case["operation"] == "merge":
            for adapter, n in zip(case["adapters"], self.norms(case), strict=True):
                W = self.combine(self.gain(adapter, n), W, self.delta_of(adapter, case))
        return W


PLANTED: dict[str, Any] = {
    "norm-wrong-axis": NormWrongAxis,
    "norm-of-base-only": NormOfBaseOnly,
    "norm-scale-forgotten": NormScaleForgotten,
    "norm-not-rooted": NormNotRooted,
    "norm-global": NormGlobal,
    "norm-l1": NormL1,
    "norm-of-merged": NormOfMerged,
    "magnitude-ignored": MagnitudeIgnored,
    "norm-ignored": NormIgnored,
    "delta-not-normalised": DeltaNotNormalised,
    "base-not-normalised": BaseNotNormalised,
    "bias-scaled": BiasScaled,
    "grad-through-norm": GradThroughNorm,
    "unmerge-with-merged-norm": UnmergeWithMergedNorm,
    "dropout-on-low-rank-only": DropoutOnLowRankOnly,
    "scale-is-one": ScaleIsOne,
    "scale-is-alpha": ScaleIsAlpha,
    "dropout-missing": DropoutMissing,
    "double-merge": DoubleMerge,
}
