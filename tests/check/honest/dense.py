"""Methods whose delta is a matrix in full, as an honest port may write them: entry by entry, or by Fourier transforms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, final

import numpy as np

from peft_ref.check.case import Case
from peft_ref.methods.torch_random import randperm
from tests.check.honest.arithmetic import Arithmetic, Host

TRAINED = {"c3a": ("c3a_kernel",), "loha": ("w1_a", "w1_b", "w2_a", "w2_b"), "shira": ("shira_weight",), "fourierft": ("spectrum",)}
DENSE = tuple(TRAINED)
TRANSFORMED = (np.float32, np.float64)  # NumPy transforms in these


class Dense(Protocol):
    def delta(self, a: Arithmetic) -> Host: ...

    def gradients(self, a: Arithmetic, dW: Host) -> tuple[Host, ...]: ...


def dense(case: Case, i: int, a: Arithmetic) -> Dense:
    assert case.layer is not None
    tensors = case.adapters[i].tensors
    if case.method == "fourierft":
        return Fourier(a.array(tensors["fourierft_spectrum"]), case.adapters[i].config, case.layer.shape)
    if case.method == "shira":
        return Sparse(a.array(tensors["shira_weight"]), tensors["shira_indices"], case.layer.shape)
    return Circulant(a.array(tensors["c3a_kernel"]), case.layer.shape)


@final
class Fourier:
    """The real part of an inverse transform, or a sum of cosines."""

    def __init__(self, c: Host, config: Mapping[str, Any], shape: tuple[int, int]) -> None:
        self.c, self.shape, self.s = c, shape, config["scaling"]
        self.u, self.v = np.divmod(randperm(shape[0] * shape[1], config["random_loc_seed"], len(c)), shape[1])

    def delta(self, a: Arithmetic) -> Host:
        if self.c.dtype in TRANSFORMED and a.pick(True, False):
            spectrum = np.zeros(self.shape, dtype=self.c.dtype)
            spectrum[self.u, self.v] = self.c
            return a.scaled(np.fft.ifft2(spectrum).real.astype(self.c.dtype), self.s)
        return a.scaled(a.sum(self.c[:, None, None] * self.waves(a)), self.s / (self.shape[0] * self.shape[1]))

    def gradients(self, a: Arithmetic, dW: Host) -> tuple[Host, ...]:
        if self.c.dtype in TRANSFORMED and a.pick(True, False):
            return (a.scaled(np.fft.ifft2(dW).real.astype(self.c.dtype)[self.u, self.v], self.s),)
        terms = (self.waves(a) * dW).reshape(len(self.c), -1)
        return (a.scaled(a.sum(terms, axis=1), self.s / (self.shape[0] * self.shape[1])),)

    def waves(self, a: Arithmetic) -> Host:
        i, j = np.indices(self.shape)
        phase = self.u[:, None, None] * i / self.shape[0] + self.v[:, None, None] * j / self.shape[1]
        return a.array(np.cos(2 * np.pi * phase))


@final
class Sparse:
    """Numbers at places."""

    def __init__(self, w: Host, indices: Host, shape: tuple[int, int]) -> None:
        self.w, self.at, self.shape = w, (indices[0], indices[1]), shape

    def delta(self, a: Arithmetic) -> Host:
        out = np.zeros(self.shape, dtype=self.w.dtype)
        out[self.at] = self.w
        return out

    def gradients(self, a: Arithmetic, dW: Host) -> tuple[Host, ...]:
        return (dW[self.at],)


@final
class Circulant:
    """Blocks whose row t is the kernel turned t places to the right, over in."""

    def __init__(self, K: Host, shape: tuple[int, int]) -> None:
        self.K, self.shape = K, shape

    def delta(self, a: Arithmetic) -> Host:
        m, n, b = self.K.shape
        if self.K.dtype in TRANSFORMED and a.pick(True, False):
            blocks = self._transformed(np.broadcast_to(np.eye(b, dtype=self.K.dtype), (m, n, b, b)), self.K[:, :, None, :])
        else:
            blocks = np.stack([np.roll(self.K, t, axis=-1) for t in range(b)], axis=2)
        return a.over(blocks.transpose(0, 2, 1, 3).reshape(self.shape), a.number(self.shape[1]))

    def gradients(self, a: Arithmetic, dW: Host) -> tuple[Host, ...]:
        m, n, b = self.K.shape
        blocks = dW.reshape(m, b, n, b).transpose(0, 2, 1, 3)
        if self.K.dtype in TRANSFORMED and a.pick(True, False):
            correlated = self._transformed(np.broadcast_to(np.eye(b, dtype=self.K.dtype), (m, n, b, b)), blocks, conjugate=True)
            return (a.over(a.sum(correlated, axis=2), a.number(self.shape[1])),)
        turned = np.stack([np.roll(blocks[:, :, t], -t, axis=-1) for t in range(b)], axis=0)
        return (a.over(a.sum(turned), a.number(self.shape[1])),)

    def _transformed(self, rows: Host, kernels: Host, conjugate: bool = False) -> Host:
        """Every kernel turned by the place of its row's one, to the right or, conjugated, to the left: a product of transforms."""
        spectrum = np.fft.fft(rows)
        return np.fft.ifft((spectrum.conj() if conjugate else spectrum) * np.fft.fft(kernels)).real.astype(self.K.dtype)
