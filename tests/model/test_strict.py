"""Every operation on arrays that know the standard and nothing else, and in 16 bits: the numbers are those of NumPy, and of PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.files.config import AdapterConfig, Patterns
from peft_ref.graph import MappingGraph
from peft_ref.graph.targets import Targets
from peft_ref.methods import METHODS
from peft_ref.model.adapted import Adapted, adapt
from peft_ref.model.attaching import add, update
from peft_ref.model.combine import TYPES, add_weighted, bernoulli
from peft_ref.model.combine_ia3 import add_weighted_ia3
from peft_ref.model.exact import add_exact, deviations
from peft_ref.model.merging import merge, merge_and_unload
from peft_ref.model.running import forward, forward_rows
from peft_ref.model.status import layer_status
from peft_ref.model.storing import load, save
from peft_ref.model.swapping import padded
from peft_ref.model.switching import activate, rescaled
from tests.methods import facts, made, takes
from tests.model.test_states import BASE, LAYERS, NOT_FREE, X

strict = pytest.importorskip("array_api_strict")


def config(name: str, **options: Any) -> AdapterConfig:
    method = made(name, **{**facts(name).small, **options})
    targets = Targets(target_modules=tuple(m for m, layer in LAYERS.items() if takes(method, layer) and m != "whole"))
    kept = {"inference_mode": True}
    return AdapterConfig(method=method, targets=targets, patterns=Patterns(feedforward_modules=("layers.0.t",)), housekeeping=kept)


def twice(name: str, **options: Any) -> tuple[Adapted, Adapted]:
    """The same model with the same two adapters, on NumPy and on the strict arrays."""
    models = []
    for library in (np, strict):
        model = adapt(MappingGraph(arrays={key: library.asarray(array) for key, array in BASE.items()}, layers=LAYERS))
        for seed, adapter in enumerate("ab"):
            rng = np.random.default_rng(seed)
            model = add(model, adapter, config(name, **options), rng)
            params = {}
            for module, (method, layer, p) in model.adapters[adapter].modules.items():
                # What is worked out of the frozen weight when a file is read, shared, or a place, stays as it was made.
                again = {s.field for s in method.spec(layer) if not s.saved or s.shared or not s.trained}
                moved = {f: library.asarray(1 + 0.3 * rng.normal(size=v.shape)) for f, v in p._asdict().items() if v is not None}
                params[module] = p._replace(**{f: v for f, v in moved.items() if f not in again})
            model = update(model, adapter, params)
        models.append(model)
    return models[0], models[1]


def agree(ours: Adapted, plain: Adapted) -> None:
    for module in LAYERS:
        found = forward(ours, module, strict.asarray(X[module]))
        np.testing.assert_allclose(np.asarray(found), forward(plain, module, X[module]), rtol=1e-12, atol=1e-12, err_msg=module)
    for key in BASE:
        np.testing.assert_allclose(np.asarray(ours.weight(key)), plain.weight(key), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in METHODS.weights if name not in NOT_FREE])
def test_adapters_act_merge_and_are_stored_on_strict_arrays(name: str, tmp_path: Path) -> None:
    plain, ours = twice(name)
    chosen = ["b"] if METHODS.weights[name].swaps else ["b", "a"]
    agree(activate(ours, chosen), activate(plain, chosen))
    agree(merge(activate(ours, chosen), safe=True), merge(activate(plain, chosen)))
    agree(merge_and_unload(ours, ["b"]), merge_and_unload(plain, ["b"]))
    save(ours, tmp_path, "a")
    loaded = load(adapt(ours.base), tmp_path, "a", subfolder="a", lazy=True)
    assert {status.name for status in layer_status(loaded)} == {f"model.{m}" for m in ours.adapters["a"].modules}
    agree(loaded, activate(plain, "a"))
    module = next(iter(ours.adapters["a"].modules))
    rows = forward_rows(ours, module, strict.asarray(X[module]), ["b", "__base__"])
    np.testing.assert_allclose(np.asarray(rows), forward_rows(plain, module, X[module], ["b", "__base__"]), rtol=1e-12)


@pytest.mark.parametrize("kind", TYPES)
def test_loras_are_combined_on_strict_arrays(kind: str) -> None:
    plain, ours = twice("lora", r=2)
    found = []
    for model in (plain, ours):
        draw = bernoulli(np.random.default_rng(0), 0.6)
        found.append(activate(add_weighted(model, "ab", [0.5, -2.0], "c", kind, density=0.6, draw=draw, svd_clamp=0.95), "c"))
    agree(found[1], found[0])


def test_the_other_combinations_run_on_strict_arrays() -> None:
    plain, ours = twice("lora", r=2)
    for rank in (None, 2):
        summed = [add_exact(model, "ab", [0.5, -2.0], "c", rank=rank) for model in (plain, ours)]
        agree(activate(summed[1], "c"), activate(summed[0], "c"))
        assert deviations(summed[1], "c", "ab", [0.5, -2.0]).keys() == deviations(summed[0], "c", "ab", [0.5, -2.0]).keys()
    agree(activate(padded(rescaled(ours, 0.5), "a", 4), "a"), activate(rescaled(plain, 0.5), "a"))
    plain, ours = twice("ia3")
    agree(*(activate(add_weighted_ia3(model, "ab", [0.5, -2.0], "c"), "c") for model in (ours, plain)))


@pytest.mark.hf
def test_a_merge_into_sixteen_bits_rounds_where_peft_rounds() -> None:
    live = pytest.importorskip("tests.model.live")
    torch, peft = live.torch, live.peft
    model = live.net().half()
    graph = live.frozen_graph(model)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q", "up", "conv", "table"]), adapter_name="a")
    theirs.add_adapter("b", peft.LoraConfig(r=3, target_modules=["q", "conv"]))
    for seed, name in enumerate("ab"):
        live.randomise(theirs, name, seed)
        for key, parameter in theirs.named_parameters():
            if f".{name}" in key and "lora_" in key:
                parameter.data = parameter.data.float()
    ours = live.mirrored(graph, theirs, ("a", "b"))
    assert ours.adapters["a"].modules["layers.0.q"].params.A.dtype == np.float32
    theirs.merge_adapter(["a", "b"])
    ours = merge(ours, ["a", "b"])
    for module in ("layers.0.q", "layers.1.up", "conv"):
        weight = theirs.base_model.model.get_submodule(module).base_layer.weight.detach()
        assert weight.dtype == torch.float16
        found = ours.weight(f"{module}.weight")
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, weight.numpy())
    # Into an embedding PEFT rounds the delta, and then the sum; here the sum alone, so that it is at least as near.
    p = ours.adapters["a"].modules["table"].params
    exact = graph.weight("table.weight").astype(np.float64) + 2.5 * (p.B.astype(np.float64) @ p.A.astype(np.float64)).T
    weight = theirs.base_model.model.table.base_layer.weight.detach().numpy()
    assert (np.abs(ours.weight("table.weight") - exact) <= np.abs(weight - exact) + 1e-6).all()


def test_bfloat16_weights_are_kept_and_computed_in_float32() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = {key: array.astype(ml_dtypes.bfloat16) for key, array in BASE.items()}
    model = add(
        adapt(MappingGraph(arrays=arrays, layers=LAYERS)), "a", config("dora", r=2, init_lora_weights=False), np.random.default_rng(0)
    )
    assert {p.dtype for found in model.adapters["a"].modules.values() for p in found.params} == {np.dtype(np.float32)}
    wide = adapt(MappingGraph(arrays={key: array.astype(np.float32) for key, array in arrays.items()}, layers=LAYERS))
    wide = replace(wide, adapters=model.adapters, active_names=("a",))
    for key in BASE:
        assert merge(model).weight(key).dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(merge(model).weight(key), merge(wide).weight(key).astype(ml_dtypes.bfloat16))
