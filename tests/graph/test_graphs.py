"""A live model, its saved checkpoint and its arrays are one graph: the same modules, kinds, weights and matches."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = pytest.mark.hf

import torch  # noqa: E402
from torch import nn  # noqa: E402

from peft_ref.graph import CheckpointGraph, Graph, MappingGraph, Targets, TorchGraph, match  # noqa: E402
from peft_ref.graph.protocol import Module  # noqa: E402
from peft_ref.layers import Conv  # noqa: E402
from peft_ref.norms import NORM, Norm  # noqa: E402

from . import models  # noqa: E402

SAVED = [name for name in models.BUILDERS if name not in ("traps", "convs")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def folder(name: str, shard: str = "5GB") -> Path:
        path = tmp_path_factory.mktemp(name)
        models.model(name).save_pretrained(path, max_shard_size=shard)
        return path

    return folder


def mapping(name: str) -> MappingGraph:
    """The arrays of a live model, tied ones once, with what a mapping cannot tell: ties and the head."""
    live = TorchGraph(models.model(name))
    arrays = {key: live.weight(key).numpy() for key in live.parameters()}
    return MappingGraph(arrays=arrays, model_config=live.config, ties=dict(live.tied()), head=live.output_head)


def with_weights(graph: Graph) -> dict[str, Any]:
    return {name: m for name, m in graph.modules().items() if m.weight is not None}


def told(module: Module) -> Any:
    """What shapes tell of a layer: of a norm its size alone."""
    return module.layer.weight_shape if isinstance(module.layer, Norm) else module.layer


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("shard", ["5GB", "1KB"])
def test_the_three_graphs_have_the_same_modules_kinds_and_layers(name: str, shard: str, folders: Any) -> None:
    live, stored, arrays = TorchGraph(models.model(name)), CheckpointGraph(folders(name, shard)), mapping(name)
    assert (folders(name, shard) / "model.safetensors.index.json").is_file() == (shard == "1KB")
    expected = {n: (m.kind, told(m), m.weight, m.bias) for n, m in with_weights(live).items()}
    for other in (stored, arrays):
        assert {n: (m.kind, told(m), m.weight, m.bias) for n, m in with_weights(other).items()} == expected
        assert not any(m.exact for m in other.modules().values() if m.kind == NORM)
        assert other.modules().keys() <= live.modules().keys()
        assert other.tied() == live.tied()
        assert {n: (p.shape, p.dtype) for n, p in other.parameters().items()} == {
            n: (p.shape, p.dtype) for n, p in live.parameters().items()
        }
        assert (other.output_head, other.model_type) == (live.output_head, live.model_type)


@pytest.mark.parametrize("name", SAVED)
def test_every_weight_reads_the_same(name: str, folders: Any) -> None:
    live, stored, arrays = TorchGraph(models.model(name)), CheckpointGraph(folders(name, "1KB")), mapping(name)
    for key in (*live.parameters(), *live.tied()):
        expected = live.weight(key).numpy()
        assert np.array_equal(stored.weight(key), expected)
        assert np.array_equal(arrays.weight(key), expected)


def questions(name: str) -> Iterator[tuple[Targets, dict[str, Any]]]:
    yield Targets(target_modules="all-linear"), {}
    yield Targets(target_modules="all-linear"), {"task_type": "SEQ_CLS"}
    yield Targets(), {}
    yield Targets(), {"peft_type": "IA3"}
    yield Targets(target_modules="all-linear", exclude_modules=("q_proj", "query", "q", "c_attn")), {}
    linear = sorted({n.rpartition(".")[2] for n, m in TorchGraph(models.model(name)).modules().items() if m.kind != "other"})
    yield Targets(target_modules=tuple(linear)), {}
    yield Targets(target_modules=tuple(linear), layers_to_transform=0), {}


@pytest.mark.parametrize("name", SAVED)
def test_the_three_graphs_are_matched_alike(name: str, folders: Any) -> None:
    live = TorchGraph(models.model(name))
    for targets, options in questions(name):
        expected = match(targets, live, **options)
        for other in (CheckpointGraph(folders(name)), mapping(name)):
            found = match(targets, other, **options)
            assert (set(found.modules), set(found.saved)) == (set(expected.modules), set(expected.saved)), targets
            if isinstance(other, MappingGraph):
                tied = {key.rpartition(".")[0] for key in live.tied()}  # those come last in a mapping
                assert [n for n in found.modules if n not in tied] == [n for n in expected.modules if n not in tied]


def test_matching_reads_no_tensor(folders: Any, tmp_path: Path) -> None:
    source = folders("llama")
    file = tmp_path / "model.safetensors"
    file.write_bytes((source / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    cut, whole = CheckpointGraph(tmp_path), CheckpointGraph(source)
    assert cut.parameters() == whole.parameters()
    os.truncate(file, 8 + int.from_bytes(file.read_bytes()[:8], "little"))  # now not one byte of a tensor is left
    assert match(Targets(target_modules="all-linear"), cut) == match(Targets(target_modules="all-linear"), whole)
    with pytest.raises(ValueError, match="changed since its header was read"):
        cut.weight("model.norm.weight")


def test_a_checkpoint_is_in_the_order_of_numbers(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({f"layers.{i}.q.weight": np.zeros((2, 2), dtype=np.float32) for i in (0, 10, 2, 1)}, tmp_path / "model.safetensors")
    assert [name for name in CheckpointGraph(tmp_path).modules() if name.endswith(".q")] == [f"layers.{i}.q" for i in (0, 1, 2, 10)]


def test_a_prefix_makes_a_file_without_one_match_like_the_live_model(folders: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = folders("gpt2")
    tensors = {key.removeprefix("transformer."): t for key, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    whole_name = Targets(target_modules=r"transformer\.h\.\d+\.attn\.c_attn")
    live = match(whole_name, TorchGraph(models.model("gpt2"))).modules
    graph = CheckpointGraph(tmp_path, prefix="transformer.")
    assert match(whole_name, graph).modules == live
    assert np.array_equal(graph.weight("transformer.wte.weight"), tensors["wte.weight"].numpy())


def test_bfloat16_is_read_exactly(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    t = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    save_file({"a.weight": t}, tmp_path / "model.safetensors")
    graph = CheckpointGraph(tmp_path)
    assert graph.parameters()["a.weight"].dtype == "BF16"
    assert np.array_equal(graph.weight("a.weight").astype(np.float32), t.float().numpy())


def test_the_geometry_of_convolutions_is_that_of_the_live_module() -> None:
    modules = TorchGraph(models.model("convs")).modules()
    kinds = {name: m.kind for name, m in modules.items() if name != "body"}
    assert kinds == {
        "c1": "conv1d",
        "c3": "conv3d",
        "up": "other",
        "fc": "linear",
        "body.2": "other",
        **{f"body.{i}": "conv2d" for i in (0, 1, 3, 4)},
    }
    geometry = {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "dilation": (1, 1), "groups": 2}
    assert modules["body.0"].layer == Conv(in_channels=4, out_channels=8, **geometry)
    assert modules["c3"].layer == Conv(in_channels=2, out_channels=4, kernel_size=(2, 2, 2), dilation=(2, 2, 2))
    assert modules["body.1"].layer == Conv(in_channels=8, out_channels=8, kernel_size=(3, 3), padding=(1, 1))
    assert modules["body.3"].layer is None  # pads one side more
    assert modules["body.4"].layer is None  # pads by reflection


@pytest.mark.parametrize("name", ["c1", "body.0", "body.1", "c3", "fc"])
def test_the_layer_of_a_live_module_computes_what_it_computes(name: str) -> None:
    module = models.model("convs").get_submodule(name).double()
    graph = TorchGraph(models.model("convs"))
    layer = graph.modules()[name].layer
    assert layer is not None
    shape = (2, layer.channels, *(7,) * len(layer.kernel_size))
    x = np.random.default_rng(0).normal(size=shape)
    weight, bias = (graph.weight(f"{name}.{key}").double().numpy() for key in ("weight", "bias"))
    expected = module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(layer.apply(x, layer.fold(weight), bias), expected, atol=1e-12)


def test_a_subclass_is_what_it_descends_from_and_a_shared_module_is_listed_once() -> None:
    class Mine(nn.Linear):
        pass

    net = nn.Module()
    net.a = Mine(2, 3)
    net.b = net.a
    graph = TorchGraph(net)
    assert list(graph.modules()) == ["a"]
    assert graph.modules()["a"].kind == "linear"
    assert graph.aliases() == {"b": "a"}
    assert graph.tied() == {"b.weight": "a.weight", "b.bias": "a.bias"}
