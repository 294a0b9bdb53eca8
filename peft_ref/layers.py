"""How a weight acts on an input.

Methods see every weight as one matrix W (out, in). A layer knows the rest: how its stored weight folds to that matrix,
how W and a bias b act on an input x, and the gradient of that.

    kind        stored weight             W                      x                   y
    linear      (out, in)                 as stored              (..., in)           (..., out)       y = x W^T + b
    transposed_linear (in, out)           transposed             (..., in)           (..., out)       HF's `Conv1D`
    embedding   (num, dim)                transposed: (dim, num) (...) integers      (..., dim)       y = W[:, x]
    conv{1,2,3}d (out, in/groups, *k)     (out, in/groups * k)   (N, in, *space)     (N, out, *space')

For an output gradient dy:  linear  dx = dy W,  dW = dy^T x,  db = sum dy;  embedding  dW = dy^T onehot(x);  a convolution is
the linear map of its patches, so its gradient is that of `linear` between gathering patches and adding them back.
Norms are in peft_ref/norms.py.

A low-rank path runs through the same layer twice: `down(r)` is this layer with r outputs and no groups (HF draws LoRA's A that way),
`up` mixes the r channels to `out` with B (out, r/groups), a pointwise grouped map.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self, final

from peft_ref.arrays import Array, as_rows, namespace, one_hot, pad, regroup, spread, take_columns, zeros_like
from peft_ref.errors import ConfigError, ShapeError

CONV_KINDS = frozenset({"conv1d", "conv2d", "conv3d"})


class LayerGradients(NamedTuple):
    x: Array | None  # None for an embedding: its input is integers
    W: Array
    b: Array | None


@dataclass(frozen=True, kw_only=True)
class Layer(ABC):
    """A frozen layer without its numbers: kind and geometry."""

    kernel_size: tuple[int, ...] = field(default=(), init=False, repr=False)
    groups: int = field(default=1, init=False, repr=False)
    bias: bool = field(default=True, init=False, repr=False)  # some methods have other parameters on a layer without one

    @property
    @abstractmethod
    def kind(self) -> str: ...

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of the weight as a matrix."""

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight as it is stored."""

    @property
    @abstractmethod
    def fan_in(self) -> int:
        """How many inputs one output of `down` sees; torch's fan-in of LoRA's A."""

    @property
    def channels(self) -> int:
        """How many numbers one place of the input holds; the in of the matrix but for a convolution."""
        return self.shape[1]

    def with_bias(self, bias: bool) -> Self:
        """This layer with a bias, or without one; an embedding has none."""
        return replace(self, bias=bias)

    @abstractmethod
    def fold(self, weight: Array) -> Array:
        """The stored weight as the matrix W (out, in)."""

    @abstractmethod
    def unfold(self, W: Array) -> Array:
        """The matrix W (out, in) in the stored layout; undoes `fold`."""

    @abstractmethod
    def apply(self, x: Array, W: Array, b: Array | None) -> Array: ...

    @abstractmethod
    def input_vjp(self, x: Array, W: Array, dy: Array) -> Array | None:
        """The gradient of `apply` for x; None for an embedding, whose input is integers."""

    @abstractmethod
    def weight_vjp(self, x: Array, dy: Array) -> Array:
        """The gradient of `apply` for W. It does not depend on W."""

    @final
    def apply_vjp(self, x: Array, W: Array, b: Array | None, dy: Array) -> LayerGradients:
        """The gradients of `apply` for an output gradient dy, in the shape of what `apply` returned."""
        db = None if b is None else self.bias_vjp(dy)
        return LayerGradients(x=self.input_vjp(x, W, dy), W=self.weight_vjp(x, dy), b=db)

    @final
    def add_bias(self, y: Array, b: Array | None) -> Array:
        if b is None:
            return y
        return y + (namespace(b).reshape(b, (1, -1) + (1,) * len(self.kernel_size)) if self.kernel_size else b)

    @final
    def bias_vjp(self, dy: Array) -> Array:
        """The gradient of `apply` for b: the sum over everything but the channels."""
        xp = namespace(dy)
        if self.kernel_size:
            return xp.sum(xp.sum(xp.reshape(dy, (*dy.shape[:2], -1)), axis=2), axis=0)
        return xp.sum(as_rows(dy), axis=0)

    @abstractmethod
    def down(self, r: int) -> Layer:
        """This layer with r outputs and no groups."""

    @final
    def up(self, h: Array, B: Array) -> Array:
        """h (.., r, ..) mixed to out channels by B (out, r/groups); channels are last, or axis 1 of a convolution."""
        xp, g = namespace(h, B), self.groups
        if not self.kernel_size:
            return h @ xp.permute_dims(B, (1, 0))
        n, r, *space = h.shape
        grouped = regroup(h, (n, g, r // g, math.prod(space)))
        mixed = xp.reshape(B, (g, B.shape[0] // g, B.shape[1])) @ grouped
        return regroup(mixed, (n, B.shape[0], *space))

    @final
    def up_vjp(self, h: Array, B: Array, dy: Array) -> tuple[Array, Array]:
        """The gradients (dh, dB) of `up`."""
        xp, g = namespace(h, B, dy), self.groups
        if not self.kernel_size:
            return dy @ B, xp.permute_dims(as_rows(dy), (1, 0)) @ as_rows(h)
        n, r, *space = h.shape
        out, length = B.shape[0], math.prod(space)
        grouped = regroup(h, (n, g, r // g, length))
        upper = regroup(dy, (n, g, out // g, length))
        dh = xp.matrix_transpose(xp.reshape(B, (g, out // g, r // g))) @ upper
        dB = xp.sum(upper @ xp.matrix_transpose(grouped), axis=0)
        return regroup(dh, h.shape), xp.reshape(dB, B.shape)


@final
@dataclass(frozen=True, kw_only=True)
class Linear(Layer):
    """y = x W^T + b. With `transposed` the weight is stored (in, out), as HF's GPT-2 `Conv1D` does."""

    in_features: int
    out_features: int
    transposed: bool = False
    bias: bool = True

    @property
    def kind(self) -> str:
        return "transposed_linear" if self.transposed else "linear"

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.in_features, self.out_features) if self.transposed else self.shape

    @property
    def fan_in(self) -> int:
        return self.in_features

    def fold(self, weight: Array) -> Array:
        return namespace(weight).permute_dims(weight, (1, 0)) if self.transposed else weight

    def unfold(self, W: Array) -> Array:
        return self.fold(W)

    def apply(self, x: Array, W: Array, b: Array | None) -> Array:
        return self.add_bias(x @ namespace(x, W).permute_dims(W, (1, 0)), b)

    def input_vjp(self, x: Array, W: Array, dy: Array) -> Array:
        return dy @ W

    def weight_vjp(self, x: Array, dy: Array) -> Array:
        return namespace(x, dy).permute_dims(as_rows(dy), (1, 0)) @ as_rows(x)

    def down(self, r: int) -> Linear:
        return Linear(in_features=self.in_features, out_features=r)


@final
@dataclass(frozen=True, kw_only=True)
class Embedding(Layer):
    """y = W[:, x]: the linear map of one-hot rows. The table is stored (num_embeddings, embedding_dim)."""

    num_embeddings: int
    embedding_dim: int
    bias: bool = field(default=False, init=False, repr=False)

    def with_bias(self, bias: bool) -> Embedding:
        return self

    @property
    def kind(self) -> str:
        return "embedding"

    @property
    def shape(self) -> tuple[int, int]:
        return self.embedding_dim, self.num_embeddings

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.num_embeddings, self.embedding_dim

    @property
    def fan_in(self) -> int:
        return self.num_embeddings

    def fold(self, weight: Array) -> Array:
        return namespace(weight).permute_dims(weight, (1, 0))

    def unfold(self, W: Array) -> Array:
        return self.fold(W)

    def apply(self, x: Array, W: Array, b: Array | None) -> Array:
        return self.add_bias(take_columns(W, x), b)

    def input_vjp(self, x: Array, W: Array, dy: Array) -> None:
        return None

    def weight_vjp(self, x: Array, dy: Array) -> Array:
        rows = as_rows(dy)
        return namespace(dy).permute_dims(rows, (1, 0)) @ one_hot(x, self.num_embeddings, dy)

    def down(self, r: int) -> Embedding:
        return Embedding(num_embeddings=self.num_embeddings, embedding_dim=r)


@final
@dataclass(frozen=True, kw_only=True)
class Conv(Layer):
    """A convolution (cross-correlation, as in torch) of 1 to 3 spatial dimensions with zero padding."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = True

    def __post_init__(self) -> None:
        dims = len(self.kernel_size)
        if not 1 <= dims <= 3:
            raise ConfigError(f"kernel_size={self.kernel_size}: a convolution has 1 to 3 spatial dimensions.")
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
            given = getattr(self, name) or (default,) * dims
            if len(given) != dims:
                raise ConfigError(f"{name}={given} does not fit kernel_size={self.kernel_size}: give {dims} numbers.")
            object.__setattr__(self, name, tuple(given))
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ConfigError(f"groups={self.groups} must divide in_channels={self.in_channels} and out_channels={self.out_channels}.")

    @property
    def kind(self) -> str:
        return f"conv{len(self.kernel_size)}d"

    @property
    def channels(self) -> int:
        return self.in_channels

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_channels, self.in_channels // self.groups * math.prod(self.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    @property
    def fan_in(self) -> int:
        return self.in_channels * math.prod(self.kernel_size)

    def fold(self, weight: Array) -> Array:
        return namespace(weight).reshape(weight, (weight.shape[0], -1))

    def unfold(self, W: Array) -> Array:
        return namespace(W).reshape(W, self.weight_shape)

    def apply(self, x: Array, W: Array, b: Array | None) -> Array:
        xp, g = namespace(x, W), self.groups
        patches = self._patches(x)
        y = xp.reshape(W, (g, W.shape[0] // g, W.shape[1])) @ patches
        return self.add_bias(regroup(y, (x.shape[0], W.shape[0], *self._out_space(x.shape[2:]))), b)

    def input_vjp(self, x: Array, W: Array, dy: Array) -> Array:
        xp, g = namespace(W, dy), self.groups
        out = W.shape[0]
        weights = xp.reshape(W, (g, out // g, W.shape[1]))
        return self._patches_vjp(x, xp.matrix_transpose(weights) @ regroup(dy, (x.shape[0], g, out // g, math.prod(dy.shape[2:]))))

    def weight_vjp(self, x: Array, dy: Array) -> Array:
        xp, g = namespace(x, dy), self.groups
        n, out = dy.shape[:2]
        dW = regroup(dy, (n, g, out // g, math.prod(dy.shape[2:]))) @ xp.matrix_transpose(self._patches(x))
        return xp.reshape(xp.sum(dW, axis=0), self.shape)

    def down(self, r: int) -> Conv:
        return Conv(
            in_channels=self.in_channels,
            out_channels=r,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )

    def _out_space(self, space: tuple[int, ...]) -> tuple[int, ...]:
        sizes = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(space, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        )
        if min(sizes) < 1:
            raise ShapeError(f"an input of spatial shape {tuple(space)} is smaller than the kernel of {self}.")
        return sizes

    def _windows(self, sizes: tuple[int, ...]) -> list[tuple[slice, ...]]:
        """For each kernel position, which entries of the padded input it meets."""
        return [
            tuple(slice(o * d, o * d + (n - 1) * s + 1, s) for o, n, s, d in zip(offsets, sizes, self.stride, self.dilation, strict=True))
            for offsets in itertools.product(*map(range, self.kernel_size))
        ]

    def _patches(self, x: Array) -> Array:
        """The inputs under each kernel position: (N, groups, in/groups * k, positions)."""
        xp, g = namespace(x), self.groups
        sizes = self._out_space(x.shape[2:])
        for axis, p in enumerate(self.padding, start=2):
            x = pad(x, axis, p, p)
        windows = [x[(slice(None), slice(None), *window)] for window in self._windows(sizes)]
        stacked = xp.stack(windows, axis=2)
        return regroup(stacked, (x.shape[0], g, self.in_channels // g * len(windows), math.prod(sizes)))

    def _patches_vjp(self, x: Array, dpatches: Array) -> Array:
        """Adds the gradient of every patch back where the patch was taken."""
        space = x.shape[2:]
        sizes = self._out_space(space)
        padded = [n + 2 * p for n, p in zip(space, self.padding, strict=True)]
        positions = list(itertools.product(*map(range, self.kernel_size)))
        parts = regroup(dpatches, (x.shape[0], self.in_channels, len(positions), *sizes))
        dx = zeros_like((x.shape[0], self.in_channels, *padded), dpatches)
        for j, offsets in enumerate(positions):
            part = parts[:, :, j, ...]
            for axis, (o, s, d, total) in enumerate(zip(offsets, self.stride, self.dilation, padded, strict=True), start=2):
                part = spread(part, axis, s)
                part = pad(part, axis, o * d, total - o * d - part.shape[axis])
            dx = dx + part
        inner = tuple(slice(p, p + n) for p, n in zip(self.padding, space, strict=True))
        return dx[(slice(None), slice(None), *inner)]
