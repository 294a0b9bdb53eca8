"""The form of what the tests need to know about a method. Everything has a default; torch and PEFT are imported inside functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from hypothesis import strategies as st

from peft_ref.contracts import WeightMethod
from peft_ref.files.config import DERIVED
from peft_ref.layers import Layer

Strategies: TypeAlias = Mapping[str, st.SearchStrategy[Any]]
Options: TypeAlias = Mapping[str, Any]
Make: TypeAlias = Callable[[], Any]


class Difference(NamedTuple):
    """What somebody refuses alone."""

    who: str  # "we" or "PEFT"
    message: str  # a regex
    why: str


class Tour(NamedTuple):
    """PEFT's quick tour: the configuration's class in both, its options, and the models on which PEFT cannot do it."""

    config: str
    options: Options = MappingProxyType({})
    unable: frozenset[str] = frozenset()


def as_configured(method: WeightMethod[Any]) -> Options:
    """PEFT's configuration has the same words."""
    words = dataclasses.asdict(method)  # type: ignore[call-overload]  # every method is a dataclass
    listed = {word: list(value) if isinstance(value, tuple) else value for word, value in words.items() if word not in DERIVED}
    return {**method.switched_on(), **listed}


def ranked(module: Any, method: Any) -> bool:
    """PEFT's layer has the rank and the scale of our method."""
    return bool(module.r["default"] == method.r and abs(module.scaling["default"] - method.scale) <= 1e-6 * abs(method.scale))


@dataclass(frozen=True, kw_only=True)
class Facts:
    # Beside live PEFT (tests/hf/test_layers.py): by name, what is compared on every layer it takes.
    settings: Mapping[str, WeightMethod[Any]] = field(default_factory=dict)
    compared: str = ""  # the test that compares it instead, where PEFT makes it on no layer that can be had
    peft_options: Callable[[Any], Options] = as_configured  # of PEFT's configuration, beside target_modules
    as_made_by: Callable[[Any, str, Any], Any] = lambda tuner, adapter, method: method  # with what only PEFT's layer tells of an adapter
    impose: Callable[[Any, str, Any], None] = lambda tuner, adapter, method: None  # the same, put into PEFT's layer
    numbers: Callable[[str, Any], Any] = lambda name, values: values  # a parameter's numbers, from normal ones, where any will not do
    beside: Callable[[Any], Layer | None] = lambda method: None  # another adapted layer, where sizes are those of all together
    peft_dropout: str | None = None  # what PEFT's layer calls its dropout of the input, where not as the configuration
    several: bool = True  # all active adapters act in PEFT's forward pass
    without_signs: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = (
        None  # of a start from singular vectors, what their signs leave
    )
    silent: bool = False  # PEFT passes over a layer that it does not take, without a word
    made_in_float32: bool = False  # PEFT refuses a fresh adapter on a float64 weight
    settle: Callable[[Any], None] = lambda tuner: None  # takes PEFT's layer out of chance
    alone: bool = False  # PEFT refuses a second adapter like it on one layer
    bias: bool = True  # whether PEFT's layers are given one
    crashes: frozenset[str] = frozenset()  # layers of tests/hf/peft_layers.py on which PEFT itself raises in forward
    float32_functions: tuple[tuple[str, str, str], ...] = ()  # module, class, name, of PEFT: what they round to float32 we round too
    float32_modules: tuple[str, ...] = ()  # of PEFT, which compute in float32 whatever came: read as float64 to be compared
    chained_backwards: Callable[[Layer], bool] = lambda layer: False  # PEFT applies several adapters last to first

    unable: Callable[[str, str], bool] = lambda case, dtype: False  # cases that PEFT's port skips (spec/ports/hf_peft)
    dialects: Mapping[str, Callable[[str, str], bool]] = field(default_factory=dict)  # PEFT's own mistakes: in which cases and dtypes

    # Hypothesis (tests/laws/strategies.py): values of fields, and which layers, by kind.
    required: Options = field(default_factory=dict)  # of fields without a default
    small: Options = field(default_factory=dict)  # where the defaults are too large for a layer of four inputs, as in tests/model
    fields: Strategies = field(default_factory=dict)
    fresh: Strategies = field(default_factory=dict)  # of starts that promise to change nothing
    few: Strategies = field(default_factory=dict)  # for backends that compile: one of each
    layers: Strategies = field(default_factory=dict)
    few_layers: Mapping[str, Layer] = field(default_factory=dict)

    # Configuration files (tests/files/config_space.py): a right one, and other values of its words; `made` compares PEFT's layer with ours.
    config: Options = field(default_factory=dict)
    space: Mapping[str, list[Any]] = field(default_factory=dict)
    made: Callable[[Any, Any], bool] = ranked
    differences: tuple[Difference, ...] = ()

    # A random configuration of PEFT's for `Net`, given a generator and the words of all, which may be changed; without it one
    # of `models` (tests/files/peft_models.py).
    random: Callable[[Any, dict[str, Any]], Any] | None = None

    # Adapters that PEFT saves (tests/files/peft_models.py): a model and PEFT's configuration. None stands for `Net`.
    models: Mapping[str, tuple[Make | None, Make]] = field(default_factory=dict)
    files_elsewhere: str = ""  # why there are none, and the test that compares its files instead

    # The judge: wrong starts by name (tests/check/wrong_starts.py), in which format some cases must match to the bit, and whether its
    # answers are irrational.
    wrong_starts: Mapping[str, tuple[str, Any, str]] = field(default_factory=dict)
    bits: str | None = "float32"
    irrational: bool = False
    no_derivative: Callable[[str, bool], bool] = lambda gradient, several: False  # gradients that are none on purpose, several adapters?

    tour: Tour | None = None  # tests/hf_api/test_quick_tour.py
    tour_impossible: str = ""  # why PEFT cannot do it
