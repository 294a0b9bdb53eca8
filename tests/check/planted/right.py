"""LoRA as somebody might write it from the spec alone, on linear layers and embeddings: what the planted ports make one mistake in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import numpy as np

Json = dict[str, Any]
Host: TypeAlias = Any  # an array of whichever float


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
