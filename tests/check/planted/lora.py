"""LoRA with one mistake made. NumPy and the case's JSON.

Every class is one sentence of peft_ref/check/mistakes/lora.py turned into code. Nothing here imports peft_ref: it is a
second opinion on what those sentences mean. Gradients are differences of the forward pass, which is linear in every single number, so
that a step of one is no approximation.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.check.planted.right import Host, Json, LoRA

# ---- the scale


class ScaleIsAlpha(LoRA):
    def scale(self, config: Json, case: Json) -> float:
        return float(config["lora_alpha"])


class ScaleIsOne(LoRA):
    def scale(self, config: Json, case: Json) -> float:
        return 1.0


class ScaleInverted(LoRA):
    """r / alpha."""

    def scale(self, config: Json, case: Json) -> float:
        return float(config["r"] / config["lora_alpha"])


class ScaleTwice(LoRA):
    """Once to each factor."""

    def delta_of(self, adapter: Json, case: Json) -> Host:
        A, B = self.factors(adapter)
        s = self.dtype(self.scale(adapter["config"], case))
        return np.asarray((s * B) @ (s * A))

    kinds = ("linear", "transposed_linear", "embedding")


class RsloraIgnored(LoRA):
    def scale(self, config: Json, case: Json) -> float:
        return float(config["lora_alpha"] / config["r"])


class RsloraAlways(LoRA):
    def scale(self, config: Json, case: Json) -> float:
        return float(config["lora_alpha"] / math.sqrt(config["r"]))


class RsloraWrongRoot(LoRA):
    """With use_rslora sqrt(alpha / r)."""

    def scale(self, config: Json, case: Json) -> float:
        plain = config["lora_alpha"] / config["r"]
        return float(math.sqrt(plain) if config["use_rslora"] else plain)


class FirstScaleForAll(LoRA):
    def scale(self, config: Json, case: Json) -> float:
        return super().scale(case["adapters"][0]["config"], case)


# ---- the layout


class ATransposed(LoRA):
    """The numbers of A read as (in, r)."""

    def read_A(self, stored: Host) -> Host:
        return stored.reshape(-1).reshape(stored.shape[1], stored.shape[0]).T


class BTransposed(LoRA):
    """The numbers of B read as (r, out)."""

    def read_B(self, stored: Host) -> Host:
        return stored.reshape(-1).reshape(stored.shape[1], stored.shape[0]).T


class DeltaTransposed(LoRA):
    """Merging: the delta's numbers written as (in, out) and added to (out, in) as they come."""

    kinds = ("linear",)
    merging = False

    def delta_of(self, adapter: Json, case: Json) -> Host:
        right = super().delta_of(adapter, case)
        return np.ascontiguousarray(right.T).reshape(right.shape) if case["operation"] in ("merge", "delta") else right


class FanInFanOutIgnored(LoRA):
    """A stored (in, out) read as (out, in), and written back as it was read."""

    def matrix(self, stored: Any, layer: Json) -> Host:
        if layer["kind"] == "transposed_linear":
            return self.array(stored).reshape(layer["out_features"], layer["in_features"])
        return super().matrix(stored, layer)

    def stored(self, W: Host, layer: Json) -> Host:
        return W.reshape(layer["in_features"], layer["out_features"]) if layer["kind"] == "transposed_linear" else super().stored(W, layer)


# ---- the forward pass


class BaseScaledToo(LoRA):
    """The scale multiplies the frozen weight too."""

    several = False

    def matrix(self, stored: Any, layer: Json) -> Host:
        return super().matrix(stored, layer) * self.dtype(self.current)

    current = 1.0

    def answer(self, case: Json) -> Json | None:
        if case["operation"] in ("forward", "merge", "backward") and len(case["adapters"]) == 1:
            type(self).current = self.scale(case["adapters"][0]["config"], case)
        try:
            return super().answer(case)
        finally:
            type(self).current = 1.0


class BiasLost(LoRA):
    """The forward pass does not add the frozen layer's bias."""

    def frozen(self, x: Host, case: Json) -> Host:
        return x @ self.matrix(case["layer"]["weight"], case["layer"]).T


class LoraBiasUnscaled(LoRA):
    def bias_of(self, adapter: Json, case: Json) -> Host | None:
        c = adapter["tensors"].get("lora_B.bias")
        return None if c is None else self.array(c)


class LoraBiasUnscaledInMerge(LoRA):
    def bias_of(self, adapter: Json, case: Json) -> Host | None:
        c = adapter["tensors"].get("lora_B.bias")
        return self.array(c) if c is not None and case["operation"] == "merge" else super().bias_of(adapter, case)


class LoraBiasLost(LoRA):
    def bias_of(self, adapter: Json, case: Json) -> Host | None:
        return None


class OnlyFirstAdapter(LoRA):
    def adapters(self, case: Json) -> list[Json]:
        return list(case["adapters"][:1])


class CrossTerms(LoRA):
    """(s1 B1 + s2 B2)(A1 + A2), the smaller rank filled up with zeros."""

    several_masks = False

    def delta_of(self, adapter: Json, case: Json) -> Host:
        if adapter is not case["adapters"][0]:
            return np.zeros_like(super().delta_of(adapter, case))
        pairs = [self.factors(a) for a in case["adapters"]]
        r = max(A.shape[0] for A, _ in pairs)
        A = sum(np.pad(A, ((0, r - A.shape[0]), (0, 0))) for A, _ in pairs)
        scales = [self.dtype(self.scale(a["config"], case)) for a in case["adapters"]]
        B = sum(s * np.pad(B, ((0, 0), (0, r - B.shape[1]))) for s, (_, B) in zip(scales, pairs, strict=True))
        return np.asarray(B @ A)


# ---- dropout


class DropoutMissing(LoRA):
    def drop(self, x: Host, adapter: Json) -> Host:
        return x


class DropoutNotRescaled(LoRA):
    def drop(self, x: Host, adapter: Json) -> Host:
        return x if adapter["dropout"] is None else x * self.array(adapter["dropout"]["mask"]).reshape(x.shape)


class DropoutOnBaseToo(LoRA):
    def frozen(self, x: Host, case: Json) -> Host:
        return super().frozen(self.drop(x, case["adapters"][0]), case)


# ---- merging


class DoubleMerge(LoRA):
    def merge(self, case: Json) -> Json:
        once = super().merge(case)
        return super().merge({**case, "layer": {**case["layer"], "weight": once["weight"], "bias": once["bias"]}})


class UnmergeAdds(LoRA):
    def shifted(self, case: Json, weight: Any, b: Host | None, sign: int) -> Json:
        return super().shifted(case, weight, b, +1)


class MergeWithoutScale(LoRA):
    """The forward pass scales the delta, merging does not."""

    def scale(self, config: Json, case: Json) -> float:
        return 1.0 if case["operation"] in ("merge", "delta") else super().scale(config, case)


# ---- gradients


class InputGradMissing(LoRA):
    """dx is the frozen weight's part alone."""

    def changed_gradients(self, case: Json, gradients: Json) -> Json:
        if "x" not in gradients:
            return gradients
        W = np.asarray(case["layer"]["weight"])
        dx = np.asarray(case["dy"]) @ (W if case["layer"]["kind"] == "linear" else W.T)
        return {**gradients, "x": dx}


class GradScaleMissing(LoRA):
    power = -1

    def changed_gradients(self, case: Json, gradients: Json) -> Json:
        scales = [self.scale(a["config"], case) ** self.power for a in case["adapters"]]
        pairs = zip(gradients["adapters"], scales, strict=True)
        return {**gradients, "adapters": [{k: g * s for k, g in tensors.items()} for tensors, s in pairs]}


class GradScaleTwice(GradScaleMissing):
    power = 1


PLANTED: dict[str, type[LoRA]] = {
    "scale-is-alpha": ScaleIsAlpha,
    "scale-is-one": ScaleIsOne,
    "scale-inverted": ScaleInverted,
    "scale-twice": ScaleTwice,
    "rslora-ignored": RsloraIgnored,
    "rslora-always": RsloraAlways,
    "rslora-wrong-root": RsloraWrongRoot,
    "first-scale-for-all": FirstScaleForAll,
    "A-transposed": ATransposed,
    "B-transposed": BTransposed,
    "delta-transposed": DeltaTransposed,
    "fan-in-fan-out-ignored": FanInFanOutIgnored,
    "base-scaled-too": BaseScaledToo,
    "bias-lost": BiasLost,
    "lora-bias-unscaled": LoraBiasUnscaled,
    "lora-bias-unscaled-in-merge": LoraBiasUnscaledInMerge,
    "lora-bias-lost": LoraBiasLost,
    "only-first-adapter": OnlyFirstAdapter,
    "cross-terms": CrossTerms,
    "dropout-missing": DropoutMissing,
    "dropout-not-rescaled": DropoutNotRescaled,
    "dropout-on-base-too": DropoutOnBaseToo,
    "double-merge": DoubleMerge,
    "unmerge-adds": UnmergeAdds,
    "merge-without-scale": MergeWithoutScale,
    "input-grad-missing": InputGradMissing,
    "grad-scale-missing": GradScaleMissing,
    "grad-scale-twice": GradScaleTwice,
}
