"""Adapter folders without PEFT: nothing is lost on the way, every tensor has a place or is an error that names it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from peft_ref.contracts import WeightMethod
from peft_ref.errors import ConfigError, FileFormatError, KeyMismatchError, ShapeError, UnsupportedLayerError
from peft_ref.files.adapter import (
    CONFIG,
    FILES,
    WEIGHTS,
    AdapterFile,
    AdapterModule,
    adapter_names,
    all_tensors,
    from_state_dict,
    load_adapter,
    save_adapter,
    state_dict,
)
from peft_ref.files.config import from_dict
from peft_ref.files.keys import parameter_name, with_adapter_name, without_adapter_name
from peft_ref.files.safetensors import RawTensor, serialize
from peft_ref.layers import Conv, Embedding, Layer, Linear

P = "base_model.model."
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q"]}
LINEAR = {f"{P}q.lora_A.weight": np.ones((4, 6)), f"{P}q.lora_B.weight": np.ones((5, 4))}


def random_module(method: WeightMethod[Any], layer: Layer, rng: np.random.Generator, dtype: Any = np.float64) -> AdapterModule:
    arrays = {s.field: rng.normal(size=s.shape).astype(dtype) for s in method.spec(layer)}
    return AdapterModule(method, layer, method.to_params(**arrays))


def same(a: AdapterFile, b: AdapterFile) -> bool:
    left, right = all_tensors(a), all_tensors(b)
    return left.keys() == right.keys() and all(
        x.dtype == y.dtype and x.shape == y.shape and (x == y).all() for x, y in ((left[k], right[k]) for k in left)
    )


def random_adapter(rng: np.random.Generator) -> AdapterFile:
    kind = str(rng.choice(["LORA", "DORA", "LOHA", "IA3"]))
    r = int(rng.integers(1, 5)) * 2
    flat: dict[str, Any] = {"peft_type": "LORA", "r": r, "lora_alpha": 3, "rank_pattern": {r"l\.1\..*": 2}, "modules_to_save": ["head"]}
    if kind == "DORA":
        flat |= {"use_dora": True}
    elif kind == "LOHA":
        flat = {"peft_type": "LOHA", "r": r, "alpha": 5, "rank_pattern": {"l.2": 6}}
    elif kind == "IA3":
        flat = {"peft_type": "IA3", "feedforward_modules": ["l.1.up"], "target_modules": ["q", "up", "l.1.up"]}
    elif rng.integers(2):
        flat |= {"lora_bias": True, "bias": "all"}
    config = from_dict(flat)

    def size(low: int = 1) -> int:
        return int(rng.integers(low, 9))

    def conv() -> Conv:
        return Conv(in_channels=2 * size(), out_channels=2 * size(), kernel_size=tuple(size() for _ in range(int(rng.integers(1, 4)))))

    layers: dict[str, Layer] = {}
    for i in range(rng.integers(1, 5)):
        choice = rng.integers(3 if kind in ("LORA", "DORA") and "lora_bias" not in flat else 2)
        layer: Layer = Linear(in_features=size(), out_features=size())
        if choice == 1 and kind in ("LORA", "DORA"):
            layer = conv()
        elif choice == 2:
            layer = Embedding(num_embeddings=size(), embedding_dim=size())
        layers[f"l.{i}.{rng.choice(['q', 'up'])}"] = layer
    dtype = rng.choice(["float32", "float64", "float16", "bfloat16"])
    modules = {k: random_module(config.method_for(k), v, rng, np.dtype(dtype)) for k, v in layers.items()}
    head = {f"{P}head.weight": rng.normal(size=(3, 4))} if "modules_to_save" in flat else {}
    return AdapterFile(config=config, modules=modules, modules_to_save=head)


def test_random_adapters_survive_saving_and_loading(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    for i in range(150):
        adapter = random_adapter(rng)
        save_adapter(tmp_path / f"{i}", adapter)
        got = load_adapter(tmp_path / f"{i}")
        assert same(got, adapter)
        assert got.config == adapter.config
        assert got.modules.keys() == adapter.modules.keys()
        assert same(load_adapter(tmp_path / f"{i}", layers={k: m.layer for k, m in adapter.modules.items()}), adapter)
        save_adapter(tmp_path / f"{i}b", got)
        for name in FILES:
            assert (tmp_path / f"{i}b" / name).read_bytes() == (tmp_path / f"{i}" / name).read_bytes()


def test_the_inferred_layer_has_the_sizes_the_tensors_hold() -> None:
    rng = np.random.default_rng(9)
    config = from_dict(LORA)
    for layer in (
        Linear(in_features=6, out_features=5),
        Embedding(num_embeddings=7, embedding_dim=3),
        Conv(in_channels=6, out_channels=10, kernel_size=(3,)),
        Conv(in_channels=6, out_channels=10, kernel_size=(3, 2), groups=2),
        Conv(in_channels=6, out_channels=10, kernel_size=(1, 3, 2)),
    ):
        module = random_module(config.method, layer, rng)
        assert from_state_dict(config, state_dict({"q": module})).modules["q"].layer == layer


def test_a_state_dict_has_peft_s_keys_and_comes_back() -> None:
    config = from_dict(LORA)
    module = AdapterModule(
        config.method, Linear(in_features=6, out_features=5), config.method.to_params(A=np.ones((4, 6)), B=np.ones((5, 4)))
    )
    assert state_dict({"q": module}).keys() == LINEAR.keys()
    back = from_state_dict(config, LINEAR, {"q": module.layer}).modules["q"]
    assert (back.method, back.layer) == (module.method, module.layer)
    np.testing.assert_array_equal(back.params.A, np.ones((4, 6)))


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "a missing tensor": ({}, {f"{P}q.lora_B.weight": None}, KeyMismatchError, r"base_model\.model\.q.*lora_B\.weight missing"),
    "another parameter": ({}, {f"{P}q.lora_B.bias": np.ones(5)}, KeyMismatchError, r"model\.q.*unexpected lora_B\.bias"),
    "an unknown parameter": ({}, {f"{P}q.lora_C.weight": np.ones(5)}, KeyMismatchError, r"model\.q.*unexpected lora_C\.weight"),
    "a tensor of nothing": ({}, {f"{P}k.weight": np.ones(5)}, KeyMismatchError, r"'base_model\.model\.k\.weight' is no parameter of LoRA"),
    "a bias nobody asked for": ({}, {f"{P}q.base_layer.bias": np.ones(5)}, KeyMismatchError, r"model\.q\.base_layer\.bias' is no"),
    "a weight nobody asked for": ({}, {f"{P}q.base_layer.weight": np.ones(5)}, KeyMismatchError, r"model\.q\.base_layer\.weight' is no"),
    "another prefix": ({}, {"unet.q.lora_A.weight": np.ones((4, 6))}, KeyMismatchError, r"'unet\.q\.lora_A\.weight' does not begin"),
    "another rank": ({"r": 8}, {}, ShapeError, r"model\.q'?: lora_A\.weight is \(4, 6\), expected \(8, 6\)"),
    "ranks that differ": ({}, {f"{P}q.lora_B.weight": np.ones((5, 3))}, ShapeError, r"lora_B\.weight is \(5, 3\), expected \(5, 4\)"),
    "a transposed B": ({}, {f"{P}q.lora_B.weight": np.ones((4, 5))}, ShapeError, r"lora_B\.weight is \(4, 5\)"),
    "no dimensions": ({}, {f"{P}q.lora_A.weight": np.ones(()), f"{P}q.lora_B.weight": np.ones(())}, ConfigError, "'q'.*layers"),
    "an adapter in an adapted layer": (
        {},
        {f"{P}q.base_layer.lora_A.weight": np.ones((4, 6)), f"{P}q.base_layer.lora_B.weight": np.ones((5, 4))},
        UnsupportedLayerError,
        r"q\.base_layer\.lora_A\.weight",
    ),
    "a dtype NumPy lacks": ({}, {f"{P}q.lora_A.weight": RawTensor("F4", (4, 6), bytes(12))}, FileFormatError, r"q\.lora_A\.weight is F4"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_tensor_that_does_not_fit_is_an_error_that_names_it(what: str) -> None:
    changes, tensors, error, message = WRONG[what]
    merged = {k: v for k, v in {**LINEAR, **tensors}.items() if v is not None}
    with pytest.raises(error, match=f"(?s){message}"):
        from_state_dict(from_dict({**LORA, **changes}), merged)


def test_modules_that_the_model_and_the_file_do_not_share_are_named() -> None:
    layer = Linear(in_features=6, out_features=5)
    with pytest.raises(KeyMismatchError, match=r"base_model\.model\.v: lora_A\.weight, lora_B\.weight missing"):
        from_state_dict(from_dict(LORA), LINEAR, {"q": layer, "v": layer})
    with pytest.raises(KeyMismatchError, match=r"base_model\.model\.q\.lora_A\.weight: the model adapts no module 'q'"):
        from_state_dict(from_dict(LORA), LINEAR, {})
    with pytest.raises(ShapeError, match=r"lora_B\.weight is \(5, 4\), expected \(9, 4\)"):
        from_state_dict(from_dict(LORA), LINEAR, {"q": Linear(in_features=6, out_features=9)})


def test_a_grouped_convolution_that_dora_refuses_is_refused() -> None:
    tensors = {
        f"{P}q.lora_A.weight": np.ones((4, 6, 3, 3)),
        f"{P}q.lora_B.weight": np.ones((8, 2, 1, 1)),
        f"{P}q.lora_magnitude_vector": np.ones((1, 8, 1, 1)),
    }
    with pytest.raises((UnsupportedLayerError, ShapeError)):
        from_state_dict(from_dict({**LORA, "use_dora": True}), tensors)


def test_other_tensors_are_kept_apart_under_the_model_s_names() -> None:
    others = {
        "score.weight": "modules_to_save",
        "h.0.lora_head.weight": "modules_to_save",
        "h.0.score.dense.bias": "modules_to_save",
        "q.base_layer.bias": "biases",
        "h.0.ln.bias": "biases",
        "embed_tokens.base_layer.weight": "embeddings",
        "lm_head.weight": "embeddings",
    }
    config = from_dict({**LORA, "bias": "all", "modules_to_save": ["score", "lora_head"]})
    adapter = from_state_dict(config, {**LINEAR, **{P + name: np.ones(2) for name in others}})
    for name, kind in others.items():
        assert P + name in getattr(adapter, kind)
    assert all_tensors(adapter).keys() == {*LINEAR, *(P + name for name in others)}
    assert parameter_name(f"{P}q.base_layer.bias") == "q.bias"
    assert parameter_name(f"{P}h.0.ln.bias") == "h.0.ln.bias"


def test_an_adapter_s_name_is_removed_only_where_a_name_can_be() -> None:
    for name in ("default", "0", "weight", "q", "lora_A"):
        for key in ("layers.0.q.lora_A.weight", "layers.0.weight.lora_embedding_A", "h.0.default.lora_B.bias", "q.lora_magnitude_vector"):
            assert without_adapter_name(with_adapter_name(key, name, "lora_"), name, "lora_") == key
    assert with_adapter_name("q.lora_A.weight", "x", "lora_") == "q.lora_A.x.weight"
    assert with_adapter_name("q.lora_embedding_A", "x", "lora_") == "q.lora_embedding_A.x"
    assert with_adapter_name("q.lora_magnitude_vector", "x", "lora_") == "q.lora_magnitude_vector.x.weight"
    assert without_adapter_name("layers.0.weight", "0", "lora_") == "layers.0.weight"
    assert without_adapter_name("layers.0.lora_A.0.weight", "0", "lora_") == "layers.0.lora_A.weight"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a.b", "a\\b"])
def test_a_name_that_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be called"):
        load_adapter(tmp_path, name)


def write(folder: Path, config: Any = None, tensors: Any = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(config if isinstance(config, str) else json.dumps(config or LORA))
    (folder / WEIGHTS).write_bytes(serialize(LINEAR if tensors is None else tensors, {"format": "pt"}))
    return folder


def test_several_adapters_lie_in_sub_folders(tmp_path: Path) -> None:
    adapter = load_adapter(write(tmp_path))
    save_adapter(tmp_path, adapter, "0")
    save_adapter(tmp_path, adapter, "other")
    assert adapter_names(tmp_path) == ("default", "0", "other")
    assert same(load_adapter(tmp_path, "0"), adapter)
    assert (tmp_path / "0" / CONFIG).read_bytes() == (tmp_path / CONFIG).read_bytes()
    with pytest.raises(FileFormatError, match="Adapters there: default, 0, other"):
        load_adapter(tmp_path, "third")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pkl"])
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "ran"), "w")

    (write(tmp_path) / WEIGHTS).unlink()
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FileFormatError, match=rf"(?s){name}, a pickle.*runs whatever code.*sandbox"):
        load_adapter(tmp_path)
    (tmp_path / name).rename(tmp_path / WEIGHTS)
    with pytest.raises(FileFormatError):
        load_adapter(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_absent_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"has no adapter_config\.json"):
        load_adapter(tmp_path / "nothing")
    (write(tmp_path) / WEIGHTS).unlink()
    with pytest.raises(FileFormatError, match=r"has no adapter_model\.safetensors"):
        load_adapter(tmp_path)
    (write(tmp_path) / CONFIG).write_bytes(b'{"peft_type": "\xff"}')
    with pytest.raises(FileFormatError, match="not text in UTF-8"):
        load_adapter(tmp_path)
    with pytest.raises(FileFormatError, match=r"adapter_config\.json is not JSON"):
        load_adapter(write(tmp_path, "{"))
    with pytest.raises(ConfigError, match="peft_type"):
        load_adapter(write(tmp_path, {"r": 4}))


def test_every_float_dtype_keeps_its_bits(tmp_path: Path) -> None:
    for dtype in ("float64", "float32", "float16", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        tensors = {k: np.random.default_rng(1).normal(size=v.shape).astype(dtype) for k, v in LINEAR.items()}
        adapter = load_adapter(write(tmp_path, None, tensors))
        assert adapter.modules["q"].params.A.dtype == np.dtype(dtype)
        save_adapter(tmp_path / "copy", adapter)
        assert (tmp_path / "copy" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


def test_a_saved_module_of_a_dtype_numpy_lacks_survives(tmp_path: Path) -> None:
    raw = RawTensor("F4", (4,), b"ab")
    write(tmp_path, {**LORA, "modules_to_save": ["head"]}, {**LINEAR, f"{P}head.weight": raw})
    save_adapter(tmp_path / "copy", load_adapter(tmp_path))
    assert load_adapter(tmp_path / "copy").modules_to_save == {f"{P}head.weight": raw}
    assert (tmp_path / "copy" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
