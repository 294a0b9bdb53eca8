"""Whatever is done to a model in whatever order, a layer computes what the definitions say of the adapters that act on it.

The machine keeps its own list of what it did: raw weights, raw adapters, which are active, merged, switched off. What a layer must put out
is `stack.forward` of the frozen weight under the adapters on that list; no number of the model is used for it.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peft_ref import stack
from peft_ref.errors import ConfigError, NotMergeableError, PeftRefError
from peft_ref.files.config import AdapterConfig, Patterns
from peft_ref.graph import MappingGraph
from peft_ref.graph.targets import Targets
from peft_ref.layers import Conv, Embedding, Layer, Linear
from peft_ref.methods import METHODS
from peft_ref.model.adapted import Adapted, adapt
from peft_ref.model.attaching import add, delete, update
from peft_ref.model.merging import merge, merge_and_unload, unmerge
from peft_ref.model.placing import MIXABLE
from peft_ref.model.running import forward
from peft_ref.model.status import count, layer_status
from peft_ref.model.storing import load, save, state_dict
from peft_ref.model.switching import activate, disable, enable
from peft_ref.stack import Adapter
from tests.methods import facts, free, made, takes

LAYERS: dict[str, Layer] = {
    "layers.0.q": Linear(in_features=4, out_features=3),
    "layers.0.t": Linear(in_features=4, out_features=6, transposed=True),
    "layers.1.u": Linear(in_features=4, out_features=4, bias=False),
    "c": Conv(in_channels=2, out_channels=4, kernel_size=(2, 2), padding=(1, 0)),
    "e": Embedding(num_embeddings=5, embedding_dim=3),
    "whole": Linear(in_features=3, out_features=2),
}
UNBIASED = ("layers.1.u", "e")
SAVED = "whole"
NAMES = ("0", "a", "default", "layers")
ADAPTED = [name for name in LAYERS if name != SAVED]
# Of some methods not every number is free, and what they are on a whole model is asked in test_strict.py, test_sharing.py and tests/files.
NOT_FREE = {
    "bdlora": "which factor is diagonal goes by the module's name",
    "beft": "it has no merged layer where there is no bias",
    "kasa": "it cuts the weight",
}
FREE = {name: cls for name, cls in METHODS.weights.items() if free(name) and name not in NOT_FREE}
names = st.sampled_from(NAMES)
seeds = st.integers(0, 2**16)


def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    found = {}
    for name, layer in LAYERS.items():
        found[f"{name}.weight"] = rng.normal(size=layer.weight_shape)
        if name not in UNBIASED:
            found[f"{name}.bias"] = rng.normal(size=layer.shape[0])
    for array in found.values():
        array.setflags(write=False)
    return found


def given_inputs() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {name: (2, layer.shape[1]) for name, layer in LAYERS.items()}
    found: dict[str, Any] = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return {**found, "c": rng.normal(size=(2, 2, 3, 3)), "e": rng.integers(0, 5, (2, 3))}


BASE, X = arrays(), given_inputs()


class Model(RuleBasedStateMachine):
    mixed = False
    kinds: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.model: Adapted = adapt(MappingGraph(arrays=BASE, layers=LAYERS), mixed=self.mixed)
        self.raw: dict[str, dict[str, Adapter]] = {}
        self.copies: dict[str, dict[str, Any]] = {}
        self.active: list[str] = []
        self.merged: list[str] = []
        self.enabled = True

    @initialize(kind=st.sampled_from(sorted({cls.peft_type for cls in FREE.values()})))
    def choose_type(self, kind: str) -> None:
        wanted = MIXABLE if self.mixed else {kind}
        self.kinds = tuple(name for name, cls in FREE.items() if cls.peft_type in wanted and not cls.__module__.startswith("tests"))

    @precondition(lambda self: len(self.raw) < len(NAMES))
    @rule(name=names, modules=st.sets(st.sampled_from(ADAPTED), min_size=1), saves=st.booleans(), seed=seeds, data=st.data())
    def add(self, name: str, modules: set[str], saves: bool, seed: int, data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from(self.kinds))
        method = made(kind, **facts(kind).small)
        if "r" in vars(method):
            with contextlib.suppress(ConfigError):  # of another method r says how many, or must be even
                method = replace(method, r=data.draw(st.integers(1, 3)))  # type: ignore[type-var, call-arg]
        here = tuple(sorted(t for t in modules if takes(method, LAYERS[t])))
        config = AdapterConfig(
            method=method,
            targets=Targets(target_modules=here, modules_to_save=(SAVED,) if saves else None),
            patterns=Patterns(feedforward_modules=tuple(t for t in here if t == "layers.0.t")),
            housekeeping={"inference_mode": True},
        )
        rng = np.random.default_rng(seed)
        if name in self.raw or not here:
            with pytest.raises(PeftRefError):
                add(self.model, name, config, rng)
            return
        self.model = add(self.model, name, config, rng)
        first = not self.raw
        self.raw[name] = {t: Adapter(config.method_for(t), None) for t in here}
        self.copies[name] = {key: BASE[key] for key in (f"{SAVED}.weight", f"{SAVED}.bias")} if saves else {}
        self.active, self.merged = [name] if first else self.active, []
        self._train(name, seed)

    @precondition(lambda self: self.raw)
    @rule(name=names, seed=seeds)
    def train(self, name: str, seed: int) -> None:
        if name in self.raw and name not in self.merged:
            self._train(name, seed)
        else:
            with pytest.raises(PeftRefError):
                update(self.model, name, {})

    @rule(chosen=st.lists(names, max_size=3))
    def activate(self, chosen: list[str]) -> None:
        owners = [name for name in chosen if self.copies.get(name)]
        if not set(chosen) <= self.raw.keys() or len(set(chosen)) < len(chosen) or len(owners) > 1 or (self.alone and len(chosen) > 1):
            with pytest.raises(PeftRefError):
                activate(self.model, chosen)
            return
        self.model, self.active, self.merged = activate(self.model, chosen), chosen, []

    @rule()
    def disable(self) -> None:
        self.model, self.enabled, self.merged = disable(self.model), False, []

    @rule()
    def enable(self) -> None:
        self.model, self.enabled = enable(self.model), True

    @rule(chosen=st.none() | st.lists(names, max_size=2, unique=True), safe=st.booleans())
    def merge(self, chosen: list[str] | None, safe: bool) -> None:
        wanted = self.active if chosen is None else chosen
        if not self.enabled or not set(wanted) <= self.raw.keys() or (self.alone and len(wanted) > 1):
            with pytest.raises(PeftRefError):
                merge(self.model, chosen, safe=safe)
            return
        self.model = merge(self.model, chosen, safe=safe)
        self.merged = self._merged_with(wanted)

    @rule()
    def unmerge(self) -> None:
        self.model, self.merged = unmerge(self.model), []
        for key in BASE:
            if key not in self.model.copies:
                np.testing.assert_array_equal(self.model.weight(key), BASE[key])

    @rule(name=names)
    def delete(self, name: str) -> None:
        if name not in self.raw or name in self.merged:
            with pytest.raises(PeftRefError):
                delete(self.model, name)
            return
        self.model = delete(self.model, name)
        gone = self.raw.pop(name)
        del self.copies[name]
        was_active = name in self.active
        self.active = [other for other in self.active if other != name]
        if was_active and not self.active:
            adapted = [module for module in LAYERS if module in gone or any(module in raw for raw in self.raw.values())]
            self.active = sorted(other for other, raw in self.raw.items() if adapted[0] in raw)[:1]

    @rule(name=names, other=names, lazy=st.booleans())
    def save_and_load_under_another_name(self, name: str, other: str, lazy: bool) -> None:
        if name not in self.raw or other in self.raw:
            return
        with tempfile.TemporaryDirectory() as folder:
            save(self.model, folder, name)
            loaded = load(self.model, folder, other, subfolder=name, lazy=lazy)
            if lazy:  # the folder will be gone
                params = {module: found.params for module, found in loaded.adapters[other].modules.items()}
                loaded = load(self.model, folder, other, subfolder=name)
                loaded = update(loaded, other, params)
        self.model, self.merged = loaded, []
        self.raw[other] = dict(self.raw[name])
        self.copies[other] = dict(self.copies[name])

    @rule()
    def what_is_unloaded_computes_what_the_merged_model_does(self) -> None:
        if not self.enabled:
            return
        left = merge_and_unload(self.model)
        self._check(left, self._merged_with(self.active))
        assert not left.adapters

    @invariant()
    def every_layer_computes_what_the_definitions_say(self) -> None:
        self._check(self.model, self.merged)

    @invariant()
    def what_is_told_is_what_was_done(self) -> None:
        assert list(self.model.adapters) == list(self.raw)
        assert list(self.model.active_names) == self.active
        assert list(self.model.merged.names) == self.merged
        assert self.model.enabled == self.enabled
        parameters = sum(array.size for array in BASE.values())
        for name in self.raw:
            own = sum(np.asarray(tensor).size for tensor in state_dict(self.model, name).values())
            parameters += own + (len(self.raw[name]) if self.kinds == ("adalora",) or self._is_adalora(name) else 0)
        assert count(self.model).total == parameters
        if self.raw:
            assert {s.name for s in layer_status(self.model)} == {
                f"model.{m}" for name in self.raw for m in [*self.raw[name], *({SAVED} if self.copies[name] else ())]
            }

    @invariant()
    def the_injection_is_what_is_active_on_every_adapted_module(self) -> None:
        found = self.model.injection()
        assert list(found) == [module for module in LAYERS if any(module in raw for raw in self.raw.values())]
        for module, adapters in found.items():
            _, beside = self._acting(module, self.merged)
            assert [a.method for a in adapters] == [a.method for a in beside if self.enabled]
            for a, b in zip(adapters, beside, strict=False):
                assert all(p is q or np.array_equal(p, q) for p, q in zip(a.params, b.params, strict=True))

    @property
    def alone(self) -> bool:
        """Whether one adapter acts at a time."""
        return any(FREE[kind].swaps for kind in self.kinds)

    def _merged_with(self, wanted: list[str]) -> list[str]:
        before = [] if self.alone and wanted else self.merged
        return [*before, *(name for name in wanted if name not in before)]

    def _is_adalora(self, name: str) -> bool:
        return next(iter(self.raw[name].values())).method.peft_type == "ADALORA"

    def _train(self, name: str, seed: int) -> None:
        """New numbers, drawn here; what starts at one stays near it, so that nothing vanishes."""
        rng = np.random.default_rng(seed)
        params = {}
        for module, adapter in self.raw[name].items():
            method, layer = adapter.method, LAYERS[module]
            values = {s.field: rng.normal(size=s.shape) * 0.4 for s in method.spec(layer)}
            values |= {field: 1 + 0.3 * np.sign(values[field]) for field in ("l", "m") if field in values}
            params[module] = method.to_params(**values)
            self.raw[name][module] = Adapter(method, params[module])
        self.copies[name] = {key: rng.normal(size=copy.shape) for key, copy in self.copies[name].items()}
        self.model = update(self.model, name, params, saved=self.copies[name])

    def _acting(self, module: str, merged: list[str]) -> tuple[list[Adapter], list[Adapter]]:
        """The raw adapters in the weight and beside it. HF puts a layer around a module for each type; a merged one stops that layer."""
        runs: list[list[str]] = []
        for name, raw in self.raw.items():
            if module in raw:
                kind = raw[module].method.peft_type
                if not runs or self.raw[runs[-1][0]][module].method.peft_type != kind:
                    runs.append([])
                runs[-1].append(name)
        merged_here = [[name for name in merged if name in run] for run in runs]
        in_weight = [name for run in merged_here for name in run]
        beside = [name for run, stopped in zip(runs, merged_here, strict=True) if not stopped for name in self.active if name in run]
        return [self.raw[name][module] for name in in_weight], [self.raw[name][module] for name in beside]

    def _check(self, model: Adapted, merged: list[str]) -> None:
        for module, layer in LAYERS.items():
            weight, bias = BASE[f"{module}.weight"], BASE.get(f"{module}.bias")
            adapters: list[Adapter] = []
            W = layer.fold(weight)
            if self.enabled and module == SAVED:
                for name in self.active:
                    W = self.copies[name].get(f"{SAVED}.weight", W)
                    bias = self.copies[name].get(f"{SAVED}.bias", bias)
            elif self.enabled:
                in_weight, beside = self._acting(module, merged)
                adapters = in_weight + beside
                if in_weight and beside:  # of several types: what lies beside, a DoRA's norm too, sees the merged weight
                    (W, bias), adapters = stack.merge(layer, W, bias, in_weight), beside
            expected = stack.forward(layer, W, bias, adapters, X[module])
            np.testing.assert_allclose(forward(model, module, X[module]), expected, rtol=1e-9, atol=1e-9, err_msg=module)


class MixedModel(Model):
    mixed = True


SETTINGS = settings(max_examples=70, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
TestModel = Model.TestCase
TestModel.settings = SETTINGS
TestMixedModel = MixedModel.TestCase
TestMixedModel.settings = settings(SETTINGS, max_examples=50)


@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_that_fails_leaves_the_model_as_it_was(safe: bool) -> None:
    """The second module's merge fails: it has no bias. In PEFT the first one is merged by then."""
    config = AdapterConfig(method=made("lora", r=2, lora_bias=True), targets=Targets(target_modules=("q", "u")))
    model = add(adapt(MappingGraph(arrays=BASE, layers=LAYERS)), "a", config, np.random.default_rng(0))
    before = {module: forward(model, module, X[module]) for module in LAYERS}
    with pytest.raises(NotMergeableError):
        merge(model, safe=safe)
    for module in LAYERS:
        np.testing.assert_array_equal(forward(model, module, X[module]), before[module])


def test_a_safe_merge_refuses_what_is_not_finite_and_a_plain_one_does_not() -> None:
    config = AdapterConfig(method=made("lora", r=2), targets=Targets(target_modules=("q",)))
    model = add(adapt(MappingGraph(arrays=BASE, layers=LAYERS)), "a", config, np.random.default_rng(0))
    p = model.adapters["a"].modules["layers.0.q"].params
    model = update(model, "a", {"layers.0.q": p._replace(B=p.B + np.inf)})
    with np.errstate(invalid="ignore"), pytest.raises(NotMergeableError, match="finite"):
        merge(model, safe=True)
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(merge(model).weight("layers.0.q.weight")).all()
    np.testing.assert_array_equal(model.weight("layers.0.q.weight"), BASE["layers.0.q.weight"])
