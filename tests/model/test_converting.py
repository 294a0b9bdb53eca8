"""Whole adapters as LoRA: beside PEFT's convert_to_lora and its conversion with an initial adapter; loaded by PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.errors import ConfigError, KeyMismatchError
from peft_ref.files.adapter import load_adapter, save_adapter
from peft_ref.files.config import flatten
from peft_ref.methods import METHODS
from peft_ref.model.adapted import adapt
from peft_ref.model.attaching import add
from peft_ref.model.converting import as_lora, converted, plain
from peft_ref.model.running import forward
from peft_ref.model.storing import adapter_file, attach
from tests.model.live import INPUTS, config_of, frozen_graph, inputs, layer_output, mirrored, net, peft, torch

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
X = inputs()
EVERY = ["q", "up", "conv", "table"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q", "up"], rank_pattern={"up": 2}),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=4, target_modules=["q", "up"], init_weights=False),
    "c3a": lambda: peft.C3AConfig(block_size=1, target_modules=["q", "up"], init_weights=False),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=4, scaling=9.0, target_modules=["q", "up"], init_weights=False),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["q", "up"]),
    "randlora": lambda: peft.RandLoraConfig(r=2, target_modules=["q", "up"]),
    "miss": lambda: peft.MissConfig(r=2, target_modules=["up"]),
}
FLOAT32 = ("c3a", "fourierft")  # whose deltas PEFT takes in float32
OURS: dict[str, Callable[[], Any]] = {  # what PEFT does not convert
    "lora everywhere": lambda: peft.LoraConfig(r=2, lora_alpha=5, target_modules=EVERY, bias="lora_only", modules_to_save=["head"]),
    "lora_bias": lambda: peft.LoraConfig(r=2, lora_alpha=5, lora_bias=True, target_modules=["q"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, total_step=9, target_modules=["q", "up"]),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=EVERY),
    "ia3": lambda: peft.IA3Config(target_modules=["q", "up", "conv"], feedforward_modules=["up"]),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=4, target_modules=["q", "up", "conv"]),
    "hra": lambda: peft.HRAConfig(r=2, target_modules=["q", "up"]),
    "all biases": lambda: peft.HRAConfig(r=2, target_modules=["q"], bias="all"),
}


def built(peft_type: Any) -> bool:
    return str(peft_type.value) in {cls.peft_type for cls in METHODS.values()}


def theirs_of(config: Any) -> Any:
    if not built(config.peft_type):
        pytest.skip(f"{config.peft_type} is not built here yet")
    theirs = peft.get_peft_model(net(), config)
    generator = torch.Generator().manual_seed(3)
    for key, parameter in theirs.named_parameters():
        if parameter.requires_grad and "ranknum" not in key:  # a count, which PEFT marks as trained
            parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return theirs.eval()


@pytest.mark.parametrize("rank", [1, 3, 0.5, 0.9])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_converted_adapter_is_pefts(kind: str, rank: float, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = theirs_of(CONFIGS[kind]())
    ours = mirrored(frozen_graph(net()), theirs, ("default",))
    if kind not in FLOAT32:
        monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())  # PEFT takes its singular values in float32
    said, expected = peft.convert_to_lora(theirs, rank)
    asked: dict[str, Any] = {"rank": rank} if isinstance(rank, int) else {"energy": rank}
    asked = {} if kind == "miss" else asked  # which keeps its own rank in PEFT
    found = as_lora(ours, "default", **asked).file
    for module, (method, _, params) in found.modules.items():
        A, B = (expected[f"base_model.model.{module}.lora_{f}.weight"].detach().numpy() for f in "AB")
        assert method.r <= A.shape[0]
        assert method == found.config.method_for(module)
        if kind == "miss" and rank != 3:
            assert A.shape[0] == 2  # PEFT keeps MiSS's own rank, whatever is asked for
            continue
        loose = 1e-6 if kind in FLOAT32 else 1e-10
        np.testing.assert_allclose(method.scale * params.B @ params.A, B @ A, rtol=loose, atol=loose)
        if not isinstance(rank, int):
            assert method.r == A.shape[0]
    assert {f"base_model.model.{module}.lora_A.weight" for module in found.modules} == {k for k in expected if "lora_A" in k}
    assert said.r == rank or not isinstance(rank, int)


@pytest.mark.parametrize("kind", [*CONFIGS, *OURS])
def test_what_is_converted_here_peft_loads_and_computes_what_the_adapter_computed(kind: str, tmp_path: Path) -> None:
    config = {**CONFIGS, **OURS}[kind]()
    theirs = theirs_of(config)
    ours = mirrored(frozen_graph(net()), theirs, ("default",))
    file, lost = as_lora(ours, "default")
    assert set(lost) == set(ours.adapters["default"].modules)
    assert max(lost.values()) < 1e-20
    save_adapter(tmp_path, file)
    again = peft.PeftModel.from_pretrained(net(), tmp_path).eval()
    assert again.peft_config["default"].peft_type == "LORA"
    loaded = attach(adapt(frozen_graph(net())), "b", file)
    loose = 1e-6 if kind in FLOAT32 else 1e-9
    for module in INPUTS:
        expected = layer_output(theirs, module, X[module])
        np.testing.assert_allclose(layer_output(again, module, X[module]), expected, rtol=loose, atol=loose)
        np.testing.assert_allclose(forward(loaded, module, X[module]), expected, rtol=loose, atol=loose)


def test_a_smaller_rank_loses_what_it_says(tmp_path: Path) -> None:
    theirs = theirs_of(CONFIGS["lora"]())
    ours = mirrored(frozen_graph(net()), theirs, ("default",))
    file, lost = as_lora(ours, "default", rank=1)
    for module, found in file.modules.items():
        method, _, params = ours.adapters["default"].modules[module]
        whole = method.scale * params.B @ params.A
        off = float(np.linalg.norm(whole - found.params.B @ found.params.A) / np.linalg.norm(whole))
        assert off**2 == pytest.approx(lost[module], rel=1e-9)
        assert 0 < lost[module] < 1
    assert flatten(file.config)["r"] == 1


def test_a_file_needs_no_model_where_its_delta_needs_no_weight(tmp_path: Path) -> None:
    theirs_of(CONFIGS["lora"]()).save_pretrained(tmp_path / "lora")
    file = load_adapter(tmp_path / "lora")
    for module, (method, _, params) in converted(file, energy=1.0).file.modules.items():
        before = file.modules[module]
        np.testing.assert_allclose(params.B @ params.A, before.method.scale * before.params.B @ before.params.A, rtol=1e-9, atol=1e-12)
        assert method.r <= before.method.r
    theirs_of(OURS["dora"]()).save_pretrained(tmp_path / "dora")
    with pytest.raises(ConfigError, match="frozen weight"):
        converted(load_adapter(tmp_path / "dora"))


def test_ranks_of_modules_that_end_alike_stay_apart() -> None:
    """A pattern is a module's whole name: one of its end would reach the other."""
    outer = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)}), "q": torch.nn.Linear(4, 4)}).double()
    graph = frozen_graph(outer)
    ours = add(adapt(graph), "x", config_of(peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)), np.random.default_rng(0))
    file = adapter_file(ours, "x")
    params = file.modules["q"].params
    thin = params._replace(A=np.concatenate([params.A[:1], 0 * params.A[:1]]))
    file = replace(file, modules={**file.modules, "q": file.modules["q"]._replace(params=thin)})
    made = converted(file, energy=1.0).file
    assert {m: f.method.r for m, f in made.modules.items()} == {"a.q": 2, "q": 1}
    assert {m: made.config.method_for(m) for m in made.modules} == {m: f.method for m, f in made.modules.items()}


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_a_changed_weight_becomes_plain_as_in_peft(init: str, rslora: bool, tmp_path: Path) -> None:
    pattern = {} if rslora else {"rank_pattern": {"up": 3}, "alpha_pattern": {r"layers\.0\.q": 7}}
    config = peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=init, target_modules=["q", "up"], use_rslora=rslora, **pattern)
    theirs = peft.get_peft_model(net().float(), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = init
    torch.manual_seed(3)  # numbers of a fair size: what is left of a large start and its opposite is known to fewer digits
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter += 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "trained")
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    trained, start = load_adapter(tmp_path / "trained"), load_adapter(tmp_path / "start")
    with pytest.raises(ConfigError, match="--initial"):
        converted(trained)
    save_adapter(tmp_path / "ours", plain(trained, start))
    ours, expected = tmp_path / "ours" / "adapter_model.safetensors", tmp_path / "theirs" / "adapter_model.safetensors"
    assert ours.read_bytes() == expected.read_bytes()
    said, meant = (flatten(load_adapter(tmp_path / side).config) for side in ("ours", "theirs"))
    assert said == meant
    again = peft.PeftModel.from_pretrained(net().float(), tmp_path / "ours").eval()
    for module in ("layers.0.q", "layers.1.q", "layers.0.up"):
        x = X[module].astype(np.float32)
        np.testing.assert_allclose(layer_output(again, module, x), layer_output(theirs.eval(), module, x), rtol=2e-5, atol=2e-5)


def test_a_plain_adapter_keeps_every_modules_scale_also_where_peft_refuses() -> None:
    config = config_of(
        peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q", "up"], use_rslora=True, rank_pattern={"up": 3}, alpha_pattern={"q": 7})
    )
    ours = add(adapt(frozen_graph(net())), "a", config, np.random.default_rng(0))
    file = adapter_file(ours, "a")
    made = plain(file, file)
    for module, (method, _, params) in made.modules.items():
        assert method.scale == pytest.approx(file.modules[module].method.scale, rel=1e-15)
        assert made.config.method_for(module) == method
        np.testing.assert_allclose(params.B @ params.A, 0, atol=1e-15)
    fewer = replace(file, modules=dict(list(file.modules.items())[1:]))
    with pytest.raises(KeyMismatchError, match="one of the two"):
        plain(file, fewer)


def test_kasa_belongs_to_a_weight_that_was_cut_off_and_is_no_lora() -> None:
    if not any(cls.flag == "kasa_config" for cls in METHODS.values()):
        pytest.skip("KaSA is not built here yet")
    config = peft.LoraConfig(r=2, kasa_config=peft.KasaConfig(), target_modules=["q"])
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(peft.get_peft_model(net(), config), 2)
    ours = add(adapt(frozen_graph(net())), "a", config_of(config), np.random.default_rng(0))
    with pytest.raises(ConfigError, match="cuts the frozen weight off"):
        as_lora(ours, "a", rank=2)
