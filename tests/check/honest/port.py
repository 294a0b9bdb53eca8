"""An honest port: right in every case, in a narrow format, in evaluation orders of its own.

`HonestPort(dtype, seed)` decides anew for every case, by the seed: which formula, where the scale goes, in which order sums run. What
it answers is what a real port sends: numbers of its dtype.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import TypeAlias, final

import numpy as np

from peft_ref.check.case import ARRAY_OPERATIONS, ATTENTION_OPERATIONS, LAYER_OPERATIONS, PROMPT_OPERATIONS, Answer, Case
from peft_ref.check.port import Answered, Port, Reply, Skipped
from peft_ref.check.result import PortInfo
from tests.check.honest import attention, prompts, rotations, training
from tests.check.honest.arithmetic import Arithmetic, Host
from tests.check.honest.blocks import Blocks
from tests.check.honest.layers import as_matrix, as_output, as_stored, input_gradient, output_rows, own_group, rows_of, spread_groups
from tests.check.honest.low_rank import Hadamard, LowRank
from tests.check.honest.reflections import Reflections
from tests.check.honest.turns import Turns

Step: TypeAlias = "Callable[[int, Host, Host | None], tuple[Host, Host | None]]"


@final
class HonestPort(Port):
    def __init__(self, dtype: str, seed: int, order: str | None = None) -> None:
        self._dtype, self._seed, self._order = dtype, seed, order

    def start(self) -> PortInfo:
        return PortInfo(name=f"honest in {self._dtype}, seed {self._seed}", dtype=self._dtype)

    def ask(self, case: Case) -> Reply:
        if case.method == "frozen" or case.operation not in ARRAY_OPERATIONS:
            return Skipped("no adapter's arithmetic: nothing to be honest about")
        rng = np.random.default_rng([zlib.crc32(case.id.encode()), self._seed])
        a = Arithmetic(self._dtype, rng, self._order)
        if case.operation in LAYER_OPERATIONS:
            out = Honest(case, a).answer()
        else:
            asked = attention if case.operation in ATTENTION_OPERATIONS else prompts if case.operation in PROMPT_OPERATIONS else training
            out = asked.answer(case, a)
        return Answered({name: value.astype(np.float64) for name, value in out.items()})

    def forget(self) -> None:
        pass

    def close(self) -> None:
        pass


class Honest:
    """One case in one arithmetic."""

    def __init__(self, case: Case, a: Arithmetic) -> None:
        assert case.layer is not None
        assert case.weight is not None
        self.case, self.a, self.layer = case, a, case.layer
        self.g = self.layer.groups
        self.b = None if case.bias is None else a.array(case.bias)
        self.W = a.array(as_matrix(self.layer, case.weight))
        self.masks = [None if d.dropout is None else d.dropout for d in case.adapters]
        if case.x is not None:
            x = case.x if self.layer.kind == "embedding" else a.array(case.x)
            self.x_shape = case.x.shape
            self.X = rows_of(self.layer, x, a)
        if case.dy is not None:
            self.dY = a.array(output_rows(self.layer, case.dy))

    def answer(self) -> Answer:
        operation = self.case.operation
        if operation == "forward":
            return {"y": as_output(self.layer, self.x_shape, self.forward())}
        if operation == "backward":
            return self.backward()
        if operation == "delta":
            return {"weight": as_stored(self.layer, self.plain_delta(0))}
        start, bias, step = (self.W, self.b, self.merge_step) if operation == "merge" else self._merged()
        indices = range(len(self.case.adapters))
        W, b = start, bias
        for i in indices if operation == "merge" else reversed(indices):
            W, b = step(i, W, b)
        out = {"weight": as_stored(self.layer, W)}
        return out if b is None else {**out, "bias": b}

    def _merged(self) -> tuple[Host, Host | None, Step]:
        case = self.case
        assert case.merged_weight is not None
        b = None if case.merged_bias is None else self.a.array(case.merged_bias)
        return self.a.array(as_matrix(self.layer, case.merged_weight)), b, self.unmerge_step

    # ---- adapters as matrices

    def low_rank(self, i: int) -> LowRank:
        adapter = self.case.adapters[i]
        parts = {key.removeprefix("lora_embedding_").removeprefix("lora_"): self.a.array(v) for key, v in adapter.tensors.items()}
        A = next(v for k, v in parts.items() if k.startswith("A"))
        B = next(v for k, v in parts.items() if k in ("B", "B.weight"))
        c, m = parts.get("B.bias"), parts.get("magnitude_vector")
        if self.case.method == "adalora":
            r, alpha = adapter.config["init_r"], adapter.config["lora_alpha"]
            return LowRank(parts["E"] * A, B, (alpha if alpha > 0 else r) / (r + 1e-5), diagonal=(A, parts["E"]))
        r, alpha = adapter.config["r"], adapter.config["lora_alpha"]
        s = alpha / math.sqrt(r) if adapter.config["use_rslora"] else alpha / r
        wide_B = spread_groups(B.reshape(B.shape[0], -1), self.g)
        return LowRank(A.reshape(A.shape[0], -1), wide_B, s, c, None if m is None else m.reshape(-1))

    def hadamard(self, i: int) -> Hadamard:
        adapter = self.case.adapters[i]
        factors = {k.removeprefix("hada_"): self.a.array(v) for k, v in adapter.tensors.items()}
        return Hadamard(**factors, s=adapter.config["alpha"] / adapter.config["r"])

    def l_columns(self, i: int) -> Host | None:
        """IA3's l as a factor of every column of W (out, in/groups * k), or None if it scales rows."""
        adapter = self.case.adapters[i]
        if not adapter.config["is_feedforward"]:
            return None
        per_channel = np.repeat(self.l(i), int(np.prod(self.layer.kernel_size)))
        return own_group(np.broadcast_to(per_channel, (self.layer.shape[0], per_channel.size)), self.g)

    def l(self, i: int) -> Host:  # noqa: E743 - the paper's letter
        return self.a.array(self.case.adapters[i].tensors["ia3_l"]).reshape(-1)

    def reflections(self, i: int) -> Reflections:
        adapter = self.case.adapters[i]
        return Reflections(self.a.array(adapter.tensors["hra_u"]), self.a, bool(adapter.config["apply_GS"]))

    def blocks(self, i: int) -> Blocks:
        adapter = self.case.adapters[i]
        (numbers,) = adapter.tensors.values()
        size = self.layer.shape[0] if self.layer.kind == "embedding" else self.layer.shape[1]
        return Blocks(self.a.array(numbers), adapter.config, size, self.a)

    def rows(self, W: Host) -> Host:
        """What OFT turns, as rows; undoes itself."""
        return W.T if self.layer.kind == "embedding" else W

    def blocked(self, i: int, W: Host, undo: bool) -> Host:
        blocks, V = self.blocks(i), self.rows(W)
        if self.layer.kind == "embedding":  # E M instead of W M^T
            for k, R in enumerate(blocks.R):
                blocks.R[k] = R.T
        return self.rows(blocks.undone(V) if undo else blocks.turned(V))

    def turns(self, i: int) -> Turns:
        adapter = self.case.adapters[i]
        theta, alpha = (self.a.array(adapter.tensors[f"road_{name}"]) for name in ("theta", "alpha"))
        return Turns(theta, alpha, adapter.config, self.layer.shape[0], self.a)

    def plain_delta(self, i: int) -> Host:
        return self.low_rank(i).delta(self.a) if self.case.method in ("lora", "adalora") else self.hadamard(i).delta(self.a)

    # ---- weights

    def merge_step(self, i: int, W: Host, b: Host | None) -> tuple[Host, Host | None]:
        a, method = self.a, self.case.method
        if method == "loha":
            return a.add(W, self.hadamard(i).delta(a)), b
        if method == "oft":
            return self.blocked(i, W, undo=False), b
        if method == "road":
            turns = self.turns(i)
            return turns.turned(W), None if b is None else turns.turned(b[:, None])[:, 0]
        if method == "hra":
            return self.reflections(i).merged(W), b
        if method == "ia3":
            if (columns := self.l_columns(i)) is not None:
                return W * columns, b
            return self.l(i)[:, None] * W, None if b is None else b * self.l(i)
        low = self.low_rank(i)
        if method == "dora":
            return low.dora_merged(a, W, self.W), b
        shift = low.shift(a)
        return low.merged(a, W), b if shift is None or b is None else a.add(b, shift)

    def unmerge_step(self, i: int, W: Host, b: Host | None) -> tuple[Host, Host | None]:
        a, method = self.a, self.case.method
        if method == "loha":
            return a.add(W, -self.hadamard(i).delta(a)), b
        if method == "oft":
            return self.blocked(i, W, undo=True), b
        if method == "road":
            turns = self.turns(i)
            return turns.undone(W), None if b is None else turns.undone(b[:, None])[:, 0]
        if method == "hra":
            return self.reflections(i).merged(W, back=True), b
        if method == "ia3":
            if (columns := self.l_columns(i)) is not None:
                return a.over(W, columns), b
            return a.over(W, self.l(i)[:, None]), None if b is None else a.over(b, self.l(i))
        low = self.low_rank(i)
        if method == "dora":
            return low.dora_unmerged(a, W, self.W), b
        shift = low.shift(a)
        return a.add(W, -low.delta(a)), b if shift is None or b is None else a.add(b, -shift)

    # ---- forward

    def apply(self, X: Host, W: Host, b: Host | None) -> Host:
        """X W^T + b, the bias as the first term of the sum or added last."""
        wide = spread_groups(W, self.g)
        if b is None:
            return self.a.matmul(X, wide.T)
        return self.a.matmul(X, wide.T, start=b) if self.a.pick(True, False) else self.a.add(self.a.matmul(X, wide.T), b)

    def dropped(self, i: int, X: Host) -> Host:
        """Dropout of adapter i on X's rows: what is kept, divided by 1 - p."""
        mask = self.masks[i]
        if mask is None:
            return X
        kept, rest = rows_of(self.layer, self.a.array(mask[0]), self.a), self.a.number(1.0 - mask[1])
        return X * self.a.over(kept, rest) if self.a.pick(True, False) else self.a.over(X * kept, rest)

    def forward(self) -> Host:
        how = {
            "adalora": self.forward_lora,
            "lora": self.forward_lora,
            "dora": self.forward_dora,
            "hra": self.forward_merged,
            "oft": self.forward_merged,
            "road": self.forward_road,
            "loha": self.forward_merged,
            "ia3": self.forward_ia3,
        }
        return how[self.case.method]()

    def forward_merged(self) -> Host:
        W, b = self.W, self.b
        if b is None and any("lora_B.bias" in a.tensors for a in self.case.adapters):
            b = self.a.array(np.zeros(W.shape[0]))
        for i in range(len(self.case.adapters)):
            W, b = self.merge_step(i, W, b)
        return self.apply(self.X, W, b)

    def forward_lora(self) -> Host:
        a = self.a
        if self.g == 1 and not any(self.masks) and a.pick(True, False, False):
            return self.forward_merged()
        terms = [self.apply(self.X, self.W, self.b)]
        for i in range(len(self.case.adapters)):
            low, X = self.low_rank(i), self.dropped(i, self.X)
            terms.append(low.path(a, X) if a.pick(True, True, False) else a.matmul(X, low.delta(a).T))
            terms += [] if (shift := low.shift(a)) is None else [shift]
        return a.add(*terms)

    def forward_dora(self) -> Host:
        a = self.a
        if any(self.masks):
            return self.forward_dora_with_dropout()
        how = a.pick("merged", "three terms", "output scaled")
        if how == "merged":
            return self.forward_merged()
        y = self.apply(self.X, self.W, self.b)
        for i in range(len(self.case.adapters)):
            low = self.low_rank(i)
            under = y if self.b is None else y - self.b  # HF takes the bias off again
            if how == "three terms":
                y = a.add(y, low.dora_added(a, self.X, under, self.W))
            else:
                y = low.gain(a, self.W) * a.add(under, low.path(a, self.X))
                y = y if self.b is None else a.add(y, self.b)
        return y

    def forward_dora_with_dropout(self) -> Host:
        a, low = self.a, self.low_rank(0)
        X = self.dropped(0, self.X)
        y = self.apply(self.X, self.W, self.b)
        if a.pick(True, False):
            return a.add(y, low.dora_added(a, X, a.matmul(X, self.W.T), self.W))
        return a.add(y, a.matmul(X, a.add(low.dora_merged(a, self.W, self.W), -self.W).T))

    def forward_ia3(self) -> Host:
        a = self.a
        if a.pick(True, False):
            return self.forward_merged()
        if self.case.adapters[0].config["is_feedforward"]:
            X = self.X
            for i in range(len(self.case.adapters)):
                X = X * np.repeat(self.l(i), int(np.prod(self.layer.kernel_size)))
            return self.apply(X, self.W, self.b)
        y = self.apply(self.X, self.W, self.b)
        for i in range(len(self.case.adapters)):
            y = y * self.l(i)
        return y

    def forward_road(self) -> Host:
        if self.a.pick(True, False):
            return self.forward_merged()
        y = self.apply(self.X, self.W, self.b)
        for i in range(len(self.case.adapters)):
            y = self.turns(i).turned(y.T).T
        return y

    # ---- backward

    def backward(self) -> Answer:
        fill = {
            "adalora": self.backward_lora,
            "lora": self.backward_lora,
            "dora": self.backward_dora,
            "hra": lambda: rotations.hra(self),
            "oft": lambda: rotations.oft(self),
            "road": lambda: rotations.road(self),
            "loha": self.backward_loha,
            "ia3": self.backward_ia3,
        }
        out, dX = fill[self.case.method]()
        if self.layer.kind == "embedding":
            return out
        return {"x": input_gradient(self.layer, self.x_shape, dX, self.a), **out}

    def weight_gradient(self, X: Host) -> Host:
        return own_group(self.a.matmul(self.dY.T, X), self.g)

    def named(self, i: int, key: str, value: Host) -> Answer:
        """A gradient under its key and in its stored shape."""
        adapter = self.case.adapters[i]
        full = next(k for k in adapter.tensors if key in k)
        return {f"{i}.{full}": value.reshape(adapter.tensors[full].shape)}

    def backward_lora(self) -> tuple[Answer, Host]:
        a = self.a
        out: Answer = {}
        terms = [a.matmul(self.dY, spread_groups(self.W, self.g))]
        for i in range(len(self.case.adapters)):
            low = self.low_rank(i)
            dA, dB = low.factor_gradients(a, self.dropped(i, self.X), self.dY)
            if low.diagonal is not None:
                A, E = low.diagonal
                out |= self.named(i, "_E", a.sum(A * dA, axis=1))
                dA = E * dA
            out |= {**self.named(i, "_A", dA), **self.named(i, "_B", own_group(dB, self.g))}
            if low.c is not None:
                summed = a.scaled(a.sum(self.dY), low.s) if a.pick(True, False) else a.sum(a.scaled(self.dY, low.s))
                out |= self.named(i, "B.bias", summed)
                out |= self.named(i, "B.weight", own_group(dB, self.g))
            terms.append(self.dropped(i, low.input_gradient(a, self.dY)))
        if len(terms) == 2 and self.g == 1 and not any(self.masks) and a.pick(True, False):
            return out, a.matmul(self.dY, self.merge_step(0, self.W, None)[0])
        return out, a.add(*terms)

    def backward_dora(self) -> tuple[Answer, Host]:
        a, masked = self.a, any(self.masks)
        X = self.dropped(0, self.X) if masked else self.X
        W = [self.W]
        for i in range(len(self.case.adapters)):
            W.append(self.low_rank(i).dora_merged(a, W[-1], self.W))
        dW = a.matmul(self.dY.T, X)
        out: Answer = {}
        for i in reversed(range(len(self.case.adapters))):
            dA, dB, dm, dW = self.low_rank(i).dora_gradients(a, dW, W[i], self.W)
            out |= {**self.named(i, "_A", dA), **self.named(i, "_B", dB), **self.named(i, "magnitude", dm)}
        if not masked:
            return out, a.matmul(self.dY, W[-1])
        through = self.dropped(0, a.matmul(self.dY, a.add(W[-1], -self.W)))
        return out, a.add(a.matmul(self.dY, self.W), through)

    def backward_loha(self) -> tuple[Answer, Host]:
        a = self.a
        dW, W = self.weight_gradient(self.X), self.W
        out: Answer = {}
        for i in range(len(self.case.adapters)):
            W, _ = self.merge_step(i, W, None)
            for key, grad in zip(("w1_a", "w1_b", "w2_a", "w2_b"), self.hadamard(i).gradients(a, dW), strict=True):
                out |= self.named(i, key, grad)
        return out, a.matmul(self.dY, spread_groups(W, self.g))

    def backward_ia3(self) -> tuple[Answer, Host]:
        """Adapter i sees what the earlier ones made of W and b, and a gradient that already carries the later ones."""
        a, n = self.a, len(self.case.adapters)
        Ws, bs = [self.W], [self.b]
        for i in range(n):
            W, b = self.merge_step(i, Ws[-1], bs[-1])
            Ws.append(W)
            bs.append(b)
        dW, db = self.weight_gradient(self.X), None if self.b is None else a.sum(self.dY)
        out: Answer = {}
        for i in reversed(range(n)):
            columns, l, b = self.l_columns(i), self.l(i), bs[i]
            if columns is not None:
                per_column = spread_groups(dW * Ws[i], self.g)
                dl = a.sum(a.sum(per_column).reshape(l.size, -1), axis=1)
                dW = dW * columns
            else:
                dl = a.sum(dW * Ws[i], axis=1)
                dl = dl if db is None or b is None else a.add(dl, db * b)
                dW, db = l[:, None] * dW, None if db is None else l * db
            out |= self.named(i, "ia3_l", dl)
        return out, a.matmul(self.dY, spread_groups(Ws[-1], self.g))
