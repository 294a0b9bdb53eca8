"""One library's side of bench_layers.py, in a process of its own: it does what it is told, line by line, and sleeps in between.

make      (torch) PEFT's layer with numbers in its adapter, and everything of it into a file         (NumPy) the same from that file
answer    its outputs and gradients, into a file
time      seconds of a call, and of the matrix products no implementation can do without, in turns

python -m tests.bench.layer_worker torch|numpy FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_ref import stack
from peft_ref.contracts import WeightMethod
from peft_ref.layers import Linear
from peft_ref.methods import IA3, OFT, AdaLoRA, DoRA, FourierFT, LoHa, LoRA

Host = np.ndarray[Any, Any]
SIZE = 2048
LAYER = Linear(in_features=SIZE, out_features=SIZE, bias=False)
METHODS: dict[str, WeightMethod[Any]] = {
    "LoRA": LoRA(r=16, lora_alpha=32),
    "DoRA": DoRA(r=16, lora_alpha=32),
    "AdaLoRA": AdaLoRA(init_r=16, lora_alpha=32, total_step=10),
    "IA3": IA3(),
    "LoHa": LoHa(r=16, alpha=32),
    "OFT": OFT(oft_block_size=32),
    "FourierFT": FourierFT(n_frequency=1000, scaling=150.0),
}
LEAST = 0.25  # seconds that a sample takes
CALLS = 3  # and as many calls: of one alone, a tenth of its time can be the machine's


def products(what: str, method: str) -> int:
    """How many products of tokens x in x out numbers there are: y, dx, and dW where the method's gradient takes all of it."""
    return 1 if what == "forward" else 3 if method in ("LoHa", "FourierFT") else 2


def numbers(method: WeightMethod[Any], W: Host) -> Any:
    """An adapter some way from its start."""
    rng = np.random.default_rng(1)
    start = method.init(LAYER, W, rng).params
    return type(start)(*(None if v is None else (v + 0.02 * rng.normal(size=v.shape)).astype(np.float32) for v in start))


def inputs(tokens: int) -> tuple[Host, Host]:
    x, dy = (np.random.default_rng([tokens, i]).normal(size=(tokens, SIZE)).astype(np.float32) for i in range(2))
    return x, dy


class Library(ABC):
    """PEFT's layer on torch, or this library's on NumPy."""

    @abstractmethod
    def make(self, method: str, file: Path) -> None: ...

    @abstractmethod
    def calls(self, tokens: int) -> dict[str, Callable[[], Any]]:
        """By name: a forward pass, and one with its gradients, as (y, dx, gradients by key)."""

    @abstractmethod
    def matmuls(self, tokens: int) -> Sequence[Callable[[], Any]]:
        """y = x W^T, dx = dy W, dW = dy^T x"""


class OnNumPy(Library):
    def make(self, method: str, file: Path) -> None:
        with np.load(file) as saved:
            self.method, self.W = METHODS[method], saved["W"]
            self.params = self.method.unpack(LAYER, {key: value for key, value in saved.items() if key != "W"})

    def calls(self, tokens: int) -> dict[str, Callable[[], Any]]:
        x, dy = inputs(tokens)
        adapters = [stack.Adapter(self.method, self.params)]

        def both() -> tuple[Host, Host, dict[str, Host]]:
            y, pull = stack.forward_and_vjp(LAYER, self.W, None, adapters, x)
            d = pull(dy)
            return y, d.x, self.method.pack(LAYER, d.params[0])

        return {"forward": lambda: stack.forward(LAYER, self.W, None, adapters, x), "both": both}

    def matmuls(self, tokens: int) -> Sequence[Callable[[], Any]]:
        W, (x, dy) = self.W, inputs(tokens)
        return lambda: x @ W.T, lambda: dy @ W, lambda: dy.T @ x


class OnTorch(Library):
    def make(self, method: str, file: Path) -> None:
        import peft
        import torch

        from tests.hf.peft_layers import own_facts, pair

        ours = METHODS[method]
        config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[ours.peft_type]
        made = pair(
            LAYER, ours, [config(target_modules=["target"], **own_facts(ours).peft_options(ours))], np.random.default_rng(0), bias=False
        )
        self.layer, self.parameters = made.tuner, made.parameters[0]
        made.model.float().train()
        W = made.W.astype(np.float32)
        packed = ours.pack(LAYER, numbers(ours, W))
        for key, parameter in self.parameters.items():
            parameter.data = torch.tensor(packed[key]).reshape(parameter.shape)
        np.savez(file, W=W, **packed)

    def calls(self, tokens: int) -> dict[str, Callable[[], Any]]:
        import torch

        x, dy = map(torch.tensor, inputs(tokens))
        x.requires_grad_(True)
        keys, trained = zip(*((key, p) for key, p in self.parameters.items() if p.requires_grad), strict=True)

        def forward() -> Any:
            with torch.no_grad():
                return self.layer(x)

        def both() -> Any:
            y = self.layer(x)
            dx, *grads = torch.autograd.grad(y, [x, *trained], dy)
            return y.detach(), dx, dict(zip(keys, grads, strict=True))

        return {"forward": forward, "both": both}

    def matmuls(self, tokens: int) -> Sequence[Callable[[], Any]]:
        import torch

        W, (x, dy) = self.layer.base_layer.weight.detach(), map(torch.tensor, inputs(tokens))
        return lambda: x @ W.T, lambda: dy @ W, lambda: dy.T @ x


def answer(library: Library, tokens: int, file: Path, alone: bool) -> None:
    """`alone`: on one thread. torch's inverse FFT of exactly 2048 x 2048 divides twice with more (pytorch issue 169670)."""
    if alone:
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
    y, dx, grads = library.calls(tokens)["both"]()
    np.savez(file, y=np.asarray(y), dx=np.asarray(dx), **{key: np.asarray(value).reshape(-1) for key, value in grads.items()})
    if alone:
        torch.set_num_threads(threads)


def timed(call: Callable[[], Any], limits: Sequence[Callable[[], Any]]) -> dict[str, float]:
    """The fastest call of a sample with the products right after it: the machine's pace changes from second to second."""

    clock = time.process_time if os.environ["OMP_NUM_THREADS"] == "1" else time.perf_counter

    def once(f: Callable[[], Any]) -> float:
        start = clock()
        f()
        return clock() - start

    pairs: list[tuple[float, float]] = []
    busy, start = time.process_time(), time.perf_counter()
    while len(pairs) < CALLS or time.perf_counter() - start < LEAST:
        pairs.append((once(call), sum(map(once, limits))))
    wall = time.perf_counter() - start
    seconds, limit = min(pairs, key=sum)
    return {"seconds": seconds, "limit": limit, "wall": wall, "busy": time.process_time() - busy}


def main(name: str, folder: Path) -> None:
    library: Library = OnTorch() if name == "torch" else OnNumPy()
    ready: tuple[str, int, Any, Any] = ("", 0, {}, ())
    for line in sys.stdin:
        order = json.loads(line)
        method, tokens = order["method"], order.get("tokens", 0)
        result: dict[str, float] = {}
        if order["do"] == "make":
            library.make(method, folder / f"{method}.npz")
        elif order["do"] == "answer":
            answer(library, tokens, folder / order["file"], name == "torch" and method == "FourierFT")
        else:
            if ready[:2] != (method, tokens):
                ready = (method, tokens, library.calls(tokens), library.matmuls(tokens))
                ready[2][order["what"]]()
            result = timed(ready[2][order["what"]], ready[3][: products(order["what"], method)])
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
