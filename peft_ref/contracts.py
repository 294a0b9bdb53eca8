"""What a method promises, and everything that follows from it.

A method is a map of the frozen weight:   (W, b)  --T_theta-->  (W', b').   It never sees the input.

    contract    a method writes                           derived here, once and final
    LowRank     factors(p) -> B, A and its vjp            delta, weight, merge, unmerge, a forward that never forms B A
    Additive    delta(p) -> dW, db and its vjp             weight, merge, unmerge, forward
    Conditioned change(p, W0, b0) -> dW, db and its vjp    weight, merge, unmerge, forward       (peft_ref/conditioned.py)
    Reweight    weight(p, W, b, W0) and its vjp           merge, forward; unmerge through `inverse` where one exists

Several active adapters act one after the other on the weight: T_2 receives what T_1 returned. A reweighting method also receives
W0, the weight under the whole stack, because DoRA measures its norm there. Additive methods commute, so for them this is a sum.
A conditioned one computes what it adds from the frozen W0 and b0 alone, whatever stands below it: also a sum.

Dropout reaches only what an adapter adds:  y = layer(x; W, b') + layer(drop(x); T(W0) - W0).  The mask is an argument.

Gradients come in the type of the parameters, and `f_vjp` takes the arguments of `f` and the gradient of what it returned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeAlias, TypeVar, cast, final

import numpy as np

from peft_ref.arrays import Array, namespace
from peft_ref.changes import Delta as Delta
from peft_ref.changes import Factors as Factors
from peft_ref.changes import Scaled as Scaled
from peft_ref.changes import Turned as Turned
from peft_ref.errors import ConfigError, KeyMismatchError, NotMergeableError, ShapeError, UnsupportedLayerError
from peft_ref.layers import Layer
from peft_ref.parameters import EVERY_KIND as EVERY_KIND
from peft_ref.parameters import KINDS as KINDS
from peft_ref.parameters import Key as Key
from peft_ref.parameters import ParamSpec as ParamSpec
from peft_ref.parameters import conv_key as conv_key
from peft_ref.parameters import declared as declared
from peft_ref.parameters import shape_of as shape_of

P = TypeVar("P", bound=tuple[Any, ...])

WeightMap: TypeAlias = Callable[[P, Array, Array | None], tuple[Array, Array | None]]


class Start(NamedTuple, Generic[P]):
    """A fresh adapter: its parameters, and the frozen weight, which some inits change."""

    params: P
    W: Array


class WeightGradients(NamedTuple, Generic[P]):
    params: P
    W: Array
    b: Array | None
    b0: Array | None = None  # of the frozen bias, where a conditioned method read it beside b


class Method(ABC):
    """Hyper-parameters and mathematics as one frozen value: a frozen dataclass whose fields are those of adapter_config.json.

    Most methods map a layer's weight: `WeightMethod`. Those that put learned vectors before a model's own are `peft_ref.prompts.Prompt`,
    those that add to what an attention block returns `peft_ref.attending.AttentionMethod`.
    """

    peft_type: ClassVar[str]
    flag: ClassVar[str | None] = None  # the config key that selects this class among those of one peft_type
    flag_value: ClassVar[bool | str | type] = True  # and what it says: any true value, this text, or a map that is this dataclass
    tuner_prefix: ClassVar[str]

    @final
    @classmethod
    def switch(cls) -> str | None:
        """How a configuration selects it, as text: "use_dora", "init_weights='bat'"; None for the plain method of its type."""
        return f"{cls.flag}={cls.flag_value!r}" if cls.flag is not None and isinstance(cls.flag_value, str) else cls.flag

    @final
    @classmethod
    def is_selected(cls, config: Mapping[str, Any]) -> bool:
        """Whether a configuration switches this class on; never for a plain method."""
        value = None if cls.flag is None else config.get(cls.flag)
        if isinstance(cls.flag_value, type):
            return value is not None and value is not False  # an empty map has every default
        return bool(value) if cls.flag_value is True else bool(value == cls.flag_value)

    @final
    @classmethod
    def switched_on(cls) -> dict[str, Any]:
        """The word that selects it, and the least it says."""
        return {} if cls.flag is None else {cls.flag: {} if isinstance(cls.flag_value, type) else cls.flag_value}


class WeightMethod(Method, Generic[P]):
    """A map of a layer's frozen weight and bias."""

    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]]
    replaces: ClassVar[bool] = False  # parts of the weight are lost in it: to unmerge, W0 is the weight that was there before
    swaps: ClassVar[bool] = False  # a copy of the layer takes its place, weight, bias, dtype and all: one acts at a time
    held: ClassVar[frozenset[str]] = frozenset()  # fields that are not trained and are parameters in HF all the same
    counts_layers: ClassVar[bool] = False  # a layer gets its part of what all share by its place among them
    by_rows: ClassVar[bool] = False  # on a linear layer row i of W' is made of row i of W, W0 and what has `out` rows, and of the rest
    cuts_weight: ClassVar[bool] = False  # every start of it changes the frozen weight, also that of an adapter that is then loaded
    dropout: ClassVar[str | None] = None  # the hyper-parameter that says how much of the input of what it adds PEFT drops in training

    @abstractmethod
    def dims(self, layer: Layer) -> Mapping[str, int]:
        """The letters its shapes are written in, beside out, in, channels and groups."""

    @abstractmethod
    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[P]:
        """A fresh adapter as HF PEFT makes one, in W's library and dtype."""

    @abstractmethod
    def weight(self, layer: Layer, p: P, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        """(W', b'), the weight and bias that `layer` uses when this adapter is active."""

    @abstractmethod
    def weight_vjp(self, layer: Layer, p: P, W: Array, b: Array | None, W0: Array, dW: Array, db: Array | None) -> WeightGradients[P]:
        """The gradient of `differentiated(layer, p, W0)` for gradients dW (out, in) and db (out,) of what it returned."""

    @abstractmethod
    def unmerge(self, layer: Layer, p: P, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        """The weight and bias that `weight` maps to (W, b). W0 is the frozen weight."""

    def spanning(self, layers: Mapping[str, Layer]) -> Self:
        """The method with the sizes of what all layers share, where those depend on the layers; by module, in the model's order."""
        return self

    def spanned_by(self, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """The same, told by the shapes of what a file shares, by key."""
        return self

    def common(self, layers: Mapping[str, Layer], weights: Mapping[str, Array], rng: np.random.Generator) -> Mapping[str, P]:
        """What is made for all layers together, by module, the other fields None: what they share as one array, and what is drawn in turn.

        Whatever a file may leave out comes from the configuration's own seed, and is the same again. `weights` are the frozen matrices.
        """
        return {}

    def shared_keys(self, modules: Sequence[str]) -> Mapping[str, Mapping[str, str]]:
        """For every module, which key of a file each shared field refers to: one for all, unless they share in groups."""
        keys = {name: key.key for name, (_, given) in declared(self.params_type).items() for key in given if key.shared}
        return dict.fromkeys(modules, keys) if keys else {}

    def start(self, layer: Layer, W: Array, rng: np.random.Generator, common: P | None) -> Start[P]:
        """`init` of one layer among others, given what was made for all of them."""
        return self.init(layer, W, rng)

    def with_frozen_bias(self, params: P, b: Array | None) -> P:
        """A fresh adapter that starts from the frozen bias too, which `init` does not see."""
        return params

    @final
    def start_alone(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[P]:
        """`init` of a method whose layers share something: here by a layer that has nobody to share it with."""
        return self.start(layer, W, rng, self.common({"": layer}, {"": W}, rng)[""])

    @final
    def check_layer(self, layer: Layer, where: str = "") -> None:
        if layer.kind not in self.kinds:
            raise UnsupportedLayerError(
                f"{type(self).__name__}{where and f' at {where!r}'}: a {layer.kind} layer is not supported"
                f" (HF PEFT refuses it too).\n  Supported: {', '.join(sorted(self.kinds))}."
            )
        self.check_geometry(layer)

    def check_geometry(self, layer: Layer) -> None:
        """Raise `UnsupportedLayerError` where the method refuses a layer of a kind it supports."""

    def on_module(self, name: str) -> Self:
        """The method as it is on the module of this name, where its configuration names modules."""
        return self

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        """The layer that stored tensors of these shapes tell; None where their sizes are plainly those of the layer."""
        return None

    @final
    def spec(self, layer: Layer) -> tuple[ParamSpec, ...]:
        """Every parameter this adapter has on `layer`: field, checkpoint key, shape as a matrix, shape as stored.

        Raises `UnsupportedLayerError` where the method does not work on such a layer.
        """
        self.check_layer(layer)
        out, n_in = layer.shape
        letters = {"out": out, "in": n_in, "groups": layer.groups, "channels": layer.channels, **self.dims(layer)}
        specs = []
        for name, (shape, keys) in declared(self.params_type).items():
            key = next((k for k in keys if layer.kind in k.kinds and self._is_on(k.when, letters)), None)
            if key is None:
                continue
            size = shape_of(shape, letters, ())
            stored = size if key.stored is None else shape_of(key.stored, letters, layer.kernel_size)
            saved = not key.derived and (key.saved is None or bool(getattr(self, key.saved)))
            specs.append(ParamSpec(name, key.key, size, stored, key.trained, key.shared, saved, key.repeated, key.derived))
        return tuple(specs)

    def _is_on(self, when: str | None, letters: Mapping[str, int]) -> bool:
        return when is None or bool(letters[when] if when in letters else getattr(self, when))

    @final
    def pack(self, layer: Layer, params: P) -> dict[str, Array]:
        """Parameters (or their gradients, which what is not trained has none of) under their checkpoint keys, in their stored shapes."""
        given = [(s, getattr(params, s.field)) for s in self.spec(layer)]
        return {s.key: namespace(v).reshape(v, s.stored_shape) for s, v in given if v is not None or (s.trained and not s.shared)}

    def thinned(self, params: P, keep: Array) -> P:
        """Parameters whose blocks (factors, blocks) do nothing where `keep` is 0: how BOFT drops out. Linear, and its own transpose."""
        raise ConfigError(f"{type(self).__name__} has no blocks that could drop out.\n  Give a Dropout, or none.")

    def kept_blocks(self, layer: Layer, rng: np.random.Generator) -> np.ndarray[Any, Any] | None:
        """`keep` for a step of training; None where no block drops out."""
        return None

    def apart(self, params: P) -> tuple[P, P] | None:
        """What of it dropout leaves alone, and what it reaches; None where it reaches all. `together` undoes it for their gradients."""
        return None

    def together(self, kept: P, dropped: P) -> P:
        return dropped

    @property
    def saves_another_form(self) -> bool:
        """Whether `in_file` changes anything."""
        return False

    def in_file(self, tensors: Mapping[str, Array]) -> Mapping[str, Array]:
        """What a file holds beside a layer, given its parameters by key: the same, unless the configuration saves another form of them."""
        return tensors

    def from_file(self, tensors: Mapping[str, Array]) -> Mapping[str, Array]:
        """Undoes `in_file`, as far as that form tells."""
        return tensors

    @final
    def untrained(self, layer: Layer) -> dict[str, np.ndarray[Any, Any]]:
        """What of a fresh adapter is not trained, under its checkpoint key."""
        keys = [s.key for s in self.spec(layer) if not s.trained]
        if not keys:
            return {}
        fresh = self.pack(layer, self.init(layer, np.zeros(layer.shape), np.random.default_rng(0)).params)
        return {key: fresh[key] for key in keys}

    @final
    def unpack(self, layer: Layer, tensors: Mapping[str, Array], where: str = "", *, own: bool = False) -> P:
        """Parameters from `tensors` under their checkpoint keys; undoes `pack`. Every key must be there, and no other.

        With `own` they are what a file holds beside a layer: what is shared, or not saved, may be missing and is None then.
        """
        specs = self.spec(layer)
        at = f"{type(self).__name__}{where and f' at {where!r}'}"
        expected = {s.key for s in specs}
        free = {s.key for s in specs if s.shared or not s.saved} if own else set[str]()
        if missing := sorted(expected - free - tensors.keys()):
            raise KeyMismatchError(f"{at}: {', '.join(missing)} missing.\n  Came: {', '.join(sorted(tensors)) or 'nothing'}.")
        if extra := sorted(tensors.keys() - expected):
            raise KeyMismatchError(f"{at}: unexpected {', '.join(extra)}.\n  Expected: {', '.join(sorted(expected))}.")
        values: dict[str, Array | None] = dict.fromkeys(declared(self.params_type))
        for s in specs:
            if s.key in free and s.key not in tensors:
                continue
            tensor = tensors[s.key]
            if tuple(tensor.shape) != s.stored_shape:
                letters, sizes = declared(self.params_type)[s.field][0], s.stored_shape
                raise ShapeError(f"{at}: {s.key} is {tuple(tensor.shape)}, expected {sizes} ({letters}).\n  {self} on {layer}.")
            values[s.field] = namespace(tensor).reshape(tensor, s.shape)
        return cast(P, self.params_type(**values))

    @final
    def to_params(self, **arrays: Array | None) -> P:
        """Params with the given fields and None elsewhere."""
        values: dict[str, Array | None] = dict.fromkeys(declared(self.params_type))
        return cast(P, self.params_type(**{**values, **arrays}))

    def product(self, layer: Layer, p: P) -> Scaled | Turned | None:
        """`weight` on a linear layer as a product, where it is one for W = W0.

        y and dx hold what the gradient of a product needs, so that on a large layer no dW is formed. `weight` and its gradient say the
        same, on every layer and for numbers of any library.
        """
        return None

    def product_vjp(self, layer: Layer, p: P, d: Scaled | Turned) -> P:
        """The gradient of p, given that of what `product` returned; what it holds constant has none."""
        raise NotImplementedError(f"{type(self).__name__} has a product and no product_vjp.")

    def differentiated(self, layer: Layer, p: P, W0: Array) -> WeightMap[P]:
        """The map (p, W, b) -> (W', b') whose derivative at `p` `weight_vjp` is: `weight`, unless a part is held constant on purpose."""
        return lambda q, W, b: self.weight(layer, q, W, b, W0)


class LowRank(WeightMethod[P]):
    """W' = W + B A. The factors carry every scale."""

    @abstractmethod
    def factors(self, p: P) -> Factors: ...

    @abstractmethod
    def factors_vjp(self, p: P, d: Factors) -> P: ...

    @final
    def product(self, layer: Layer, p: P) -> Scaled:
        """`weight` on a linear layer as a product."""
        return Scaled(factors=self.factors(p))

    @final
    def product_vjp(self, layer: Layer, p: P, d: Scaled | Turned) -> P:
        """The gradient of p, given that of what `product` returned."""
        assert isinstance(d, Scaled)
        assert d.factors is not None
        return self.factors_vjp(p, d.factors)

    @final
    def delta(self, layer: Layer, p: P) -> Delta:
        f = self.factors(p)
        if layer.groups > 1:
            raise NotMergeableError(
                f"{type(self).__name__}: A sees all {layer.fan_in} inputs of a convolution whose {layer.groups} groups"
                f" each see {layer.shape[1]},\n  so its delta does not fit into the frozen weight (HF PEFT refuses it too)."
                " Keep the adapter unmerged."
            )
        return Delta(f.B @ f.A, f.b)

    @final
    def weight(self, layer: Layer, p: P, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return added(self, Delta(W, b), self.delta(layer, p))

    @final
    def weight_vjp(self, layer: Layer, p: P, W: Array, b: Array | None, W0: Array, dW: Array, db: Array | None) -> WeightGradients[P]:
        f = self.factors(p)
        mT = namespace(dW).matrix_transpose
        d = Factors(B=dW @ mT(f.A), A=mT(f.B) @ dW, b=None if f.b is None else db)
        return WeightGradients(self.factors_vjp(p, d), dW, db)

    @final
    def unmerge(self, layer: Layer, p: P, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return taken_out(self, Delta(W, b), self.delta(layer, p))


class Additive(WeightMethod[P]):
    """W' = W + dW, b' = b + db."""

    adds_bias: ClassVar[bool] = False  # whether it has a db: then a layer without a bias acts as one whose bias is zero

    @abstractmethod
    def delta(self, layer: Layer, p: P) -> Delta: ...

    @abstractmethod
    def delta_vjp(self, layer: Layer, p: P, d: Delta) -> P: ...

    @final
    def weight(self, layer: Layer, p: P, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return added(self, Delta(W, b), self.delta(layer, p))

    @final
    def weight_vjp(self, layer: Layer, p: P, W: Array, b: Array | None, W0: Array, dW: Array, db: Array | None) -> WeightGradients[P]:
        return WeightGradients(self.delta_vjp(layer, p, Delta(dW, db)), dW, db)

    @final
    def unmerge(self, layer: Layer, p: P, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return taken_out(self, Delta(W, b), self.delta(layer, p))


class Reweight(WeightMethod[P]):
    """(W', b') = T(W, b). A subclass writes `weight`, `weight_vjp` and `unmerge`, its inverse."""


def added(method: WeightMethod[Any], base: Delta, delta: Delta) -> tuple[Array, Array | None]:
    return base.W + delta.W, shift_bias(method, base.b, delta.b, 1.0)


def taken_out(method: WeightMethod[Any], base: Delta, delta: Delta) -> tuple[Array, Array | None]:
    return base.W - delta.W, shift_bias(method, base.b, delta.b, -1.0)


def shift_bias(method: WeightMethod[Any], b: Array | None, change: Array | None, sign: float) -> Array | None:
    if change is None:
        return b
    if b is None:
        raise NotMergeableError(
            f"{type(method).__name__} adds to the bias, and this layer has none (HF PEFT refuses this merge too).\n"
            "  Keep the adapter unmerged, or give the layer a bias of zeros."
        )
    return b + sign * change
