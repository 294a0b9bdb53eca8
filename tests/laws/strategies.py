"""What the laws are tried on: a method, a layer it supports, a shape of input, and a seed for the numbers.

Methods and kinds of layer come from METHODS. A method's hyper-parameters are drawn from its own fields: booleans by type, the usual names
from BY_NAME, everything else keeps its default. A method whose defaults fit no small layer says its own in tests/methods.
What the method or the layer refuses (ConfigError, UnsupportedLayerError) is drawn again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

import numpy as np
from hypothesis import HealthCheck, reject, settings
from hypothesis import strategies as st

from peft_ref.contracts import EVERY_KIND, WeightMethod
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Conv, Embedding, Layer, Linear
from peft_ref.methods import METHODS
from peft_ref.norms import NORM, Norm
from peft_ref.stack import Adapter
from tests.methods import facts

Host = np.ndarray[Any, Any]

PAIRS = [(name, kind) for name, cls in METHODS.weights.items() for kind in sorted(cls.kinds)]
STRANGERS = [(name, kind) for name, cls in METHODS.weights.items() for kind in sorted(EVERY_KIND - cls.kinds)]

BY_NAME: dict[str, st.SearchStrategy[Any]] = {
    "r": st.sampled_from((2, 1, 3, 4)),
    "alpha": st.sampled_from((2, 1, 3.5, 0.25)),
    "lora_alpha": st.sampled_from((2, 1, 3.5, 0.25)),
}
_HEALTH = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
LAW = settings(deadline=None, max_examples=10, suppress_health_check=_HEALTH)
LAW_ON_BACKEND = settings(deadline=None, max_examples=2, suppress_health_check=_HEALTH)


@dataclass(frozen=True)
class Case:
    """A method on a layer, and the numbers that `seed` stands for. Every array has a stream of its own."""

    method: WeightMethod[Any]
    layer: Layer
    bias: bool
    shape: tuple[int, ...]  # of x
    seed: int
    dyadic: bool = False  # all numbers are small multiples of 1/4, so that sums and products are exact

    def numbers(self, stream: int, shape: tuple[int, ...]) -> Host:
        rng = np.random.default_rng([self.seed, stream])
        return rng.integers(-6, 7, shape) / 4 if self.dyadic else rng.normal(size=shape)

    @property
    def W(self) -> Host:
        return self.numbers(1, self.layer.shape)

    @property
    def b(self) -> Host | None:
        return self.numbers(2, (self.layer.shape[0],)) if self.bias else None

    @property
    def x(self) -> Host:
        if isinstance(self.layer, Embedding):
            return np.random.default_rng([self.seed, 3]).integers(0, self.layer.num_embeddings, self.shape)
        return self.numbers(3, self.shape)

    @property
    def dy(self) -> Host:
        y = self.layer.apply(self.x, self.W, None)
        return self.numbers(4, y.shape)

    def start(self, stream: int = 30) -> Any:
        """A fresh adapter on the frozen weight and bias."""
        start = self.method.init(self.layer, self.W, np.random.default_rng([self.seed, stream]))
        return start._replace(params=self.method.with_frozen_bias(start.params, self.b))

    def params(self, stream: int = 5) -> Any:
        """A trained adapter: a fresh one, every number moved. Near its start, where every method is well conditioned."""
        start = self.start(stream).params
        moved = iter(range(1000 * stream, 2000 * stream))

        def move(value: Host) -> Host:
            noise = self.numbers(next(moved), value.shape) / 2
            return np.round(value * 8) / 8 + noise if self.dyadic else value + noise

        return map_params(move, start)

    @property
    def trained(self) -> list[str]:
        """The fields that have a gradient; those of integers have none either."""
        return [s.field for s in self.method.spec(self.layer) if s.trained]

    def moved(self, params: Any, t: float, direction: Any) -> Any:
        """`params`, those that are trained gone on by `t` along a direction."""
        return params._replace(**{f: getattr(params, f) + t * getattr(direction, f) for f in self.trained})

    def direction(self, params: Any, stream: int) -> Any:
        """Numbers in the shape of `params`, drawn apart from them."""
        streams = iter(range(1000 * stream, 2000 * stream))
        return map_params(lambda value: self.numbers(next(streams), value.shape), params)


def map_params(f: Callable[..., Any], params: Any, *more: Any) -> Any:
    """`f` over the floating point arrays of a Params; the others stay."""
    rows = zip(params, *more, strict=True)
    return type(params)(*(f(*row) if isinstance(row[0], np.ndarray) and row[0].dtype.kind == "f" else row[0] for row in rows))


@st.composite
def cases(draw: st.DrawFn, name: str, kind: str, fresh: bool = False, few: bool = False, dyadic: bool = False) -> Case:
    layer = draw(_few_layers(name, kind) if few else facts(name).layers.get(kind, layers(kind)))
    bias = kind != "embedding" and draw(st.booleans())
    layer = layer.with_bias(bias)
    try:
        method = draw(methods(name, fresh, few))
        method.check_layer(layer)
    except (ConfigError, UnsupportedLayerError):
        reject()
    return Case(method, layer, bias, _few_inputs(layer) if few else draw(inputs(layer)), draw(st.integers(0, 2**20)), dyadic)


@st.composite
def methods(draw: st.DrawFn, name: str, fresh: bool = False, few: bool = False) -> WeightMethod[Any]:
    cls = METHODS.weights[name]
    hints = get_type_hints(cls)
    options = {}
    for f in fields(cls):  # type: ignore[arg-type]  # every method is a dataclass; the table's type cannot say so
        own = facts(name)
        rows = (own.fresh if fresh else {}, {**_FEW_BY_NAME, **own.few} if few else {}, own.fields, BY_NAME)
        if row := next((row for row in rows if f.name in row), None):
            options[f.name] = draw(row[f.name])
        elif hints[f.name] is bool and not f.name.startswith("init"):
            options[f.name] = draw(st.booleans())
    return cls(**options)


def companion(data: st.DataObject, case: Case, stream: int) -> Adapter:
    """A second adapter on the same layer, of any method that takes it."""
    takers = [name for name, kind in PAIRS if kind == case.layer.kind]
    name = data.draw(st.sampled_from(takers))
    method = data.draw(methods(name).filter(lambda m: _takes(m, case)))
    return Adapter(method, replace(case, method=method).params(stream))


def _takes(method: Any, case: Case) -> bool:
    try:
        method.check_layer(case.layer)
    except (ConfigError, TypeError):
        return False
    return True


@st.composite
def layers(draw: st.DrawFn, kind: str) -> Layer:
    size = st.integers(1, 6)
    if kind in ("linear", "transposed_linear"):
        return Linear(in_features=draw(size), out_features=draw(size), transposed=kind != "linear")
    if kind == "embedding":
        return Embedding(num_embeddings=draw(size), embedding_dim=draw(size))
    if kind == NORM:
        return Norm(features=draw(st.integers(2, 6)), eps=draw(st.sampled_from((0.25, 1.0))), centred=draw(st.booleans()))
    dims = int(kind[4])
    groups = draw(st.integers(1, 3))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    return Conv(
        in_channels=groups * draw(st.integers(1, 2)),
        out_channels=groups * draw(st.integers(1, 3)),
        kernel_size=sizes(1, 3 if dims < 3 else 2),
        stride=sizes(1, 3),
        padding=sizes(0, 2 if dims < 3 else 1),
        dilation=sizes(1, 2),
        groups=groups,
    )


@st.composite
def inputs(draw: st.DrawFn, layer: Layer) -> tuple[int, ...]:
    """A shape for x: leading axes or none, and for a convolution a batch and any space its kernel fits into."""
    if isinstance(layer, Conv):
        need = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(layer.kernel_size, layer.padding, layer.dilation, strict=True)]
        return draw(st.integers(1, 3)), layer.in_channels, *(n + draw(st.integers(0, 3)) for n in need)
    leading = draw(st.sampled_from(((3,), (), (2, 2), (1,))))
    return leading if isinstance(layer, Embedding) else (*leading, layer.channels)


# One awkward layer of each kind and one shape of input: a backend that compiles for every shape it meets has seen these before.
_FEW_BY_NAME: dict[str, st.SearchStrategy[Any]] = {"r": st.just(2)}
_FEW: dict[str, st.SearchStrategy[Layer]] = {
    "linear": st.just(Linear(in_features=5, out_features=4)),
    "transposed_linear": st.just(Linear(in_features=5, out_features=4, transposed=True)),
    "embedding": st.just(Embedding(num_embeddings=5, embedding_dim=4)),
    NORM: st.sampled_from((True, False)).map(lambda centred: Norm(features=4, eps=0.25, centred=centred)),
    **{
        f"conv{d}d": st.sampled_from((2, 1)).map(
            lambda groups, d=d: Conv(
                in_channels=2,
                out_channels=4,
                kernel_size=(2, 1, 1)[:d],
                stride=(1, 2, 1)[:d],
                padding=(1, 0, 1)[:d],
                dilation=(2, 1, 1)[:d],
                groups=groups,
            )
        )
        for d in (1, 2, 3)
    },
}
_FEW_LEADING: dict[str, tuple[int, ...]] = {"linear": (2, 3), "transposed_linear": (2, 3), "embedding": (2, 3), NORM: (2, 3)}


def _few_layers(name: str, kind: str) -> st.SearchStrategy[Layer]:
    own = facts(name).few_layers.get(kind)
    return _FEW[kind] if own is None else st.just(own)


def _few_inputs(layer: Layer) -> tuple[int, ...]:
    if isinstance(layer, Conv):
        return (2, layer.in_channels, *(3, 3, 1)[: len(layer.kernel_size)])
    leading = _FEW_LEADING[layer.kind]
    return leading if isinstance(layer, Embedding) else (*leading, layer.channels)
