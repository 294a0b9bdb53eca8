"""LoRA on linear layers and embeddings as somebody might write it, and the same with one mistake made. NumPy and the case's JSON.

Every class below the first is one sentence of peft_ref/check/mistakes/lora.py turned into code. Nothing here imports peft_ref: it is a
second opinion on what those sentences mean. Gradients are differences of the forward pass, which is linear in every single number, so
that a step of one is no approximation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

Json = dict[str, Any]
Host = np.ndarray[Any, Any]


class LoRA:
    """y = x W^T + b + sum over adapters of s (drop(x) A^T) B^T + s c. An embedding is the linear layer of one-hot rows."""

    several: ClassVar[bool] = True  # False: the sentence does not say what happens to several adapters, so they are not answered
    several_masks: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("linear", "transposed_linear", "embedding")

    def __init__(self, dtype: Any = np.float64) -> None:
        self.dtype = dtype

    # ---- what an adapter is

    def array(self, value: Any) -> Host:
        return np.asarray(value, dtype=self.dtype)

    def scale(self, config: Json, case: Json) -> float:
        return float(config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"]))

    def read_A(self, stored: Host) -> Host:
        return stored

    def read_B(self, stored: Host) -> Host:
        return stored

    def factors(self, adapter: Json) -> tuple[Host, Host]:
        tensors = adapter["tensors"]
        A = tensors["lora_A.weight"] if "lora_A.weight" in tensors else tensors["lora_embedding_A"]
        B = tensors["lora_B.weight"] if "lora_B.weight" in tensors else tensors["lora_embedding_B"]
        return self.read_A(self.array(A)), self.read_B(self.array(B))

    def delta_of(self, adapter: Json, case: Json) -> Host:
        """s B A (out, in)."""
        A, B = self.factors(adapter)
        return np.asarray(self.dtype(self.scale(adapter["config"], case)) * (B @ A))

    def bias_of(self, adapter: Json, case: Json) -> Host | None:
        c = adapter["tensors"].get("lora_B.bias")
        return None if c is None else np.asarray(self.dtype(self.scale(adapter["config"], case)) * self.array(c))

    def adapters(self, case: Json) -> list[Json]:
        return list(case["adapters"])

    # ---- what a layer is

    def matrix(self, stored: Any, layer: Json) -> Host:
        """The stored weight as (out, in)."""
        return self.array(stored) if layer["kind"] == "linear" else self.array(stored).T

    def stored(self, W: Host, layer: Json) -> Host:
        return W if layer["kind"] == "linear" else W.T

    def bias(self, case: Json) -> Host | None:
        b = case["layer"]["bias"]
        return None if b is None else self.array(b)

    def rows(self, case: Json) -> Host:
        """x as rows."""
        x = np.asarray(case["x"])
        if case["layer"]["kind"] == "embedding":
            return self.array(np.eye(case["layer"]["num_embeddings"])[x.reshape(-1)])
        return self.array(x.reshape(-1, x.shape[-1]))

    def shaped(self, y: Host, case: Json) -> Host:
        x = np.asarray(case["x"])
        lead = x.shape if case["layer"]["kind"] == "embedding" else x.shape[:-1]
        return y.reshape(*lead, -1)

    def drop(self, x: Host, adapter: Json) -> Host:
        if adapter["dropout"] is None:
            return x
        mask = self.array(adapter["dropout"]["mask"]).reshape(x.shape)
        return np.asarray(x * mask / self.dtype(1 - adapter["dropout"]["p"]))

    # ---- the operations

    def frozen(self, x: Host, case: Json) -> Host:
        y = x @ self.matrix(case["layer"]["weight"], case["layer"]).T
        b = self.bias(case)
        return y if b is None else y + b

    def forward_rows(self, x: Host, case: Json) -> Host:
        y = self.frozen(x, case)
        for adapter in self.adapters(case):
            y = y + self.drop(x, adapter) @ self.delta_of(adapter, case).T
            c = self.bias_of(adapter, case)
            y = y if c is None else y + c
        return y

    def forward(self, case: Json) -> Json:
        return {"y": self.shaped(self.forward_rows(self.rows(case), case), case).tolist()}

    def merge(self, case: Json) -> Json:
        return self.shifted(case, case["layer"]["weight"], self.bias(case), +1)

    def unmerge(self, case: Json) -> Json:
        b = case["merged"]["bias"]
        return self.shifted(case, case["merged"]["weight"], None if b is None else self.array(b), -1)

    def shifted(self, case: Json, weight: Any, b: Host | None, sign: int) -> Json:
        W = self.matrix(weight, case["layer"])
        for adapter in self.adapters(case):
            W = W + sign * self.delta_of(adapter, case)
            c = self.bias_of(adapter, case)
            b = b if c is None or b is None else b + sign * c
        return {"weight": self.stored(W, case["layer"]).tolist(), "bias": None if b is None else b.tolist()}

    def delta(self, case: Json) -> Json:
        return {"weight": self.stored(self.delta_of(case["adapters"][0], case), case["layer"]).tolist()}

    def backward(self, case: Json) -> Json:
        wide = type(self)(np.longdouble)  # a difference cancels: its error must stay far below float64's
        x, dy = wide.rows(case), np.asarray(case["dy"]).reshape(wide.rows(case).shape[0], -1)
        wide.hold(case)

        def total() -> Any:
            return np.sum(wide.forward_rows(x, case) * dy)

        out: Json = {"adapters": []}
        for adapter in case["adapters"]:
            gradients = {}
            for key, stored in adapter["tensors"].items():
                moving = np.asarray(stored, dtype=np.longdouble)
                adapter["tensors"][key] = moving
                gradients[key] = differences(total, moving)
                adapter["tensors"][key] = stored
            out["adapters"].append(gradients)
        if case["layer"]["kind"] != "embedding":
            out["x"] = differences(total, x).reshape(np.shape(case["x"]))
        out = self.changed_gradients(case, out)
        plain = [{k: np.asarray(g).tolist() for k, g in gradients.items()} for gradients in out["adapters"]]
        return {"adapters": plain, **({"x": np.asarray(out["x"]).tolist()} if "x" in out else {})}

    def hold(self, case: Json) -> None:
        """Called before the forward pass is differentiated: what is to be held constant is computed here."""

    def changed_gradients(self, case: Json, gradients: Json) -> Json:
        return gradients

    def answer(self, case: Json) -> Json | None:
        if case["layer"]["kind"] not in self.kinds or (len(case["adapters"]) > 1 and not self.several):
            return None
        if not self.several_masks and len(case["adapters"]) > 1 and any(a["dropout"] for a in case["adapters"]):
            return None
        operations: dict[str, Callable[[Json], Json]] = {
            "forward": self.forward,
            "backward": self.backward,
            "delta": self.delta,
            "merge": self.merge,
            "unmerge": self.unmerge,
        }
        return operations[case["operation"]](case)


def differences(f: Callable[[], Any], array: Host) -> Host:
    """(f(v + 1) - f(v - 1)) / 2 for every number v of `array`, which f reads."""
    out = np.empty(array.shape)
    for at in np.ndindex(array.shape):
        value = array[at]
        array[at] = value + 1
        above = f()
        array[at] = value - 1
        out[at] = (above - f()) / 2
        array[at] = value
    return out


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
