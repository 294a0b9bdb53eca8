"""LN tuning's quirks, seen in HF PEFT run live, and what is done here instead; the norms of torch and transformers, run beside ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import nn  # noqa: E402

from peft_ref.errors import ConfigError, KeyMismatchError, UnsupportedLayerError  # noqa: E402
from peft_ref.files.adapter import load_adapter  # noqa: E402
from peft_ref.files.config import AdapterConfig  # noqa: E402
from peft_ref.graph import TorchGraph  # noqa: E402
from peft_ref.graph.targets import Targets  # noqa: E402
from peft_ref.methods import LNTuning  # noqa: E402
from peft_ref.model import activate, adapt, add, load, merge, save, unmerge, update  # noqa: E402
from peft_ref.model.merging import unload  # noqa: E402
from peft_ref.model.running import forward, forward_rows  # noqa: E402
from peft_ref.model.status import layer_status, model_status  # noqa: E402
from peft_ref.norms import NORM, Norm  # noqa: E402

KEYS = "base_model.model.a.ln_tuning_layers"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.r, self.bn, self.lin = nn.LayerNorm(4), nn.RMSNorm(4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.box, self.act = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.box(self.lin(self.r(self.a(x))))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def base() -> Net:
    net = Net().double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p))
    return net


def tuned(*targets: str, net: Any = None) -> Any:
    return peft.get_peft_model(net or base(), peft.LNTuningConfig(target_modules=list(targets)))


def filled(model: Any, name: str = "default", value: float = 7.0) -> Any:
    with torch.no_grad():
        for key, p in model.named_parameters():
            if f"ln_tuning_layers.{name}." in key:
                p.fill_(value)
    return model


def ours(net: Any, *targets: str, name: str = "default", on: Any = None) -> Any:
    config = AdapterConfig(method=LNTuning(), targets=Targets(target_modules=targets))
    return add(adapt(TorchGraph(net)) if on is None else on, name, config, np.random.default_rng(0))


def numbers(model: Any, module: str, value: float, name: str = "default") -> Any:
    old = model.adapters[name].modules[module].params
    return update(model, name, {module: type(old)(*(None if v is None else 0 * v + value for v in old))})


def test_lntuning_q1_a_module_is_copied_with_all_that_is_in_it() -> None:
    keys = list(peft.get_peft_model_state_dict(tuned("box")))
    assert keys[0] == "base_model.model.box.ln_tuning_layers.default.0.weight"
    assert f"{KEYS.replace('.a.', '.bn.')}.running_mean" in peft.get_peft_model_state_dict(tuned("bn"))
    with pytest.raises(StopIteration):
        tuned("act")
    for name in ("box", "bn", "act"):
        with pytest.raises(UnsupportedLayerError, match="HF PEFT copies whatever it is"):
            ours(base(), name)


def test_lntuning_q2_saved_while_merged_a_file_holds_the_frozen_numbers(tmp_path: Path) -> None:
    net = base()
    frozen = net.a.weight.detach().clone()
    model = filled(tuned("a", net=net))
    model.merge_adapter()
    assert torch.equal(peft.get_peft_model_state_dict(model)[f"{KEYS}.weight"], frozen)

    mine = merge(numbers(ours(base(), "a"), "a", 7.0))
    save(mine, tmp_path)
    assert np.all(load_adapter(tmp_path).modules["a"].params.w == 7)


def test_lntuning_q3_an_active_adapter_on_other_modules_is_asked_for_on_all() -> None:
    x = torch.randn(2, 4, dtype=torch.float64)
    model = tuned("a")
    model.add_adapter("b", peft.LNTuningConfig(target_modules=["r"]))
    with pytest.raises(KeyError, match="default"):
        model(x)
    model.set_adapter("b")
    with pytest.raises(KeyError, match="b"):
        model(x)

    net = base()
    both = ours(net, "r", name="b", on=numbers(ours(net, "a"), "a", 7.0))
    torch.testing.assert_close(forward(activate(both, "b"), "a", x), net.a(x).detach(), rtol=1e-12, atol=1e-13)


def test_lntuning_q4_two_active_adapters_raise_when_they_run() -> None:
    model = tuned("a")
    model.add_adapter("b", peft.LNTuningConfig(target_modules=["a"]))
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match="more than one adapter at a time"):
        model(torch.randn(2, 4, dtype=torch.float64))
    model.base_model.set_adapter("default")
    with pytest.raises(ValueError, match="more than one adapter at a time"):
        model.merge_adapter(["default", "b"])

    both = ours(None, "a", name="b", on=ours(base(), "a"))
    with pytest.raises(ConfigError, match="one acts at a time"):
        activate(both, ("default", "b"))
    with pytest.raises(ConfigError, match="one acts at a time"):
        merge(both, ("default", "b"))


def test_lntuning_q5_rows_that_name_adapters_run_with_the_active_one() -> None:
    x = torch.randn(2, 4, dtype=torch.float64)
    model = filled(tuned("a"))
    model.add_adapter("b", peft.LNTuningConfig(target_modules=["a"]))
    before = model(x)
    assert torch.equal(model(x, adapter_names=["b", "b"]), before)
    model.set_adapter("b")
    assert not torch.equal(model(x), before)

    net = base()
    both = ours(net, "a", name="b", on=numbers(ours(net, "a"), "a", 7.0))
    rows = forward_rows(both, "a", x, ["b", "default"])
    assert torch.equal(rows[1], forward(both, "a", x)[1])
    torch.testing.assert_close(rows[0], net.a(x).detach()[0], rtol=1e-12, atol=1e-13)


def test_lntuning_q6_an_adapter_added_to_a_merged_model_starts_from_the_merged_numbers() -> None:
    model = filled(tuned("a"))
    model.merge_adapter()
    model.add_adapter("b", peft.LNTuningConfig(target_modules=["a"]))
    assert torch.all(model.base_model.model.a.ln_tuning_layers["b"].weight == 7)

    net = base()
    both = ours(net, "a", name="b", on=merge(numbers(ours(net, "a"), "a", 7.0)))
    np.testing.assert_array_equal(np.asarray(both.adapters["b"].modules["a"].params.w)[:, 0], net.a.weight.detach().numpy())
    np.testing.assert_array_equal(both.adapters["b"].modules["a"].params.c, net.a.bias.detach().numpy())


def test_lntuning_q7_the_copy_of_a_layer_in_16_bits_has_16_bits(tmp_path: Path) -> None:
    net = base().bfloat16()
    model = tuned("a", net=net)
    assert model.base_model.model.a.ln_tuning_layers["default"].weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "theirs")
    plain = base().bfloat16()
    plain.load_state_dict({k.replace("a.base_layer", "a"): v for k, v in net.state_dict().items() if "ln_tuning" not in k})
    mine = ours(plain, "a")
    assert all(p.dtype == torch.bfloat16 for p in mine.adapters["default"].modules["a"].params)
    save(mine, tmp_path / "ours")
    name = "adapter_model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    for lazy in (False, True):
        again = load(adapt(TorchGraph(plain)), tmp_path / "theirs", lazy=lazy)
        assert all(p.dtype == torch.bfloat16 for p in again.adapters["default"].modules["a"].params)
    x = torch.randn(2, 4).bfloat16()
    with torch.no_grad():
        theirs = model.base_model.model.a(x).float()
    # Both compute wider than they put out, and round once: at most one rounding of eight bits apart.
    torch.testing.assert_close(forward(mine, "a", x).float(), theirs, rtol=2**-7, atol=0)


def test_lntuning_q8_rms_norms_of_transformers_compute_in_float32_in_a_float64_model() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = torch.randn(3, 4, dtype=torch.float64)
    exact = x / torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True) + 1e-6)
    theirs = LlamaRMSNorm(4, eps=1e-6).double()(x)
    assert theirs.dtype == torch.float64
    assert 1e-12 < (theirs - exact).abs().max() < 1e-5
    mine = Norm(features=4, eps=1e-6, centred=False, bias=False).apply(x.numpy(), np.ones((4, 1)), None)
    np.testing.assert_allclose(mine, exact.numpy(), rtol=1e-14)


def test_merging_another_one_puts_it_in_the_place_of_the_first() -> None:
    net = base()
    model = filled(filled(tuned("a", net=net)))
    model.add_adapter("b", peft.LNTuningConfig(target_modules=["a"]))
    filled(model, "b", 9.0)
    model.merge_adapter(["default"])
    model.merge_adapter(["b"])
    layer = model.base_model.model.a
    assert layer.merged_adapters == ["b"]

    plain = base()
    both = ours(plain, "a", name="b", on=numbers(ours(plain, "a"), "a", 7.0))
    both = merge(merge(numbers(both, "a", 9.0, "b"), ["default"]), ["b"])
    assert both.merged.names == ("b",)
    for name in ("a.weight", "a.bias"):
        np.testing.assert_array_equal(both.weight(name), layer.base_layer.get_parameter(name[2:]).detach().numpy())
        np.testing.assert_array_equal(unmerge(both).weight(name), plain.get_parameter(name).detach().numpy())
        np.testing.assert_array_equal(unload(both).weight(name), both.weight(name))


def test_the_status_is_pefts() -> None:
    net = base()
    model, mine = tuned("a", "lin", net=net), ours(base(), "a", "lin")
    assert [tuple(s) for s in layer_status(mine)] == [tuple(vars(s).values()) for s in model.get_layer_status()]
    theirs = vars(model.get_model_status())
    told = model_status(mine)._asdict()
    assert {k: v for k, v in told.items() if k != "base_model_type"} == {k: v for k, v in theirs.items() if k != "base_model_type"}


NORMS = [
    ("llama.modeling_llama", "LlamaRMSNorm"),
    ("mistral.modeling_mistral", "MistralRMSNorm"),
    ("mixtral.modeling_mixtral", "MixtralRMSNorm"),
    ("phi3.modeling_phi3", "Phi3RMSNorm"),
    ("qwen2.modeling_qwen2", "Qwen2RMSNorm"),
    ("qwen3.modeling_qwen3", "Qwen3RMSNorm"),
    ("t5.modeling_t5", "T5LayerNorm"),
    ("gemma.modeling_gemma", "GemmaRMSNorm"),
    ("gemma2.modeling_gemma2", "Gemma2RMSNorm"),
    ("gemma3.modeling_gemma3", "Gemma3RMSNorm"),
]


@pytest.mark.parametrize(("module", "name"), NORMS)
def test_a_norm_of_transformers_computes_what_the_graph_says_it_does(module: str, name: str) -> None:
    from importlib import import_module

    found = getattr(import_module(f"transformers.models.{module}"), name)(6, eps=0.01)
    with torch.no_grad():
        found.weight.copy_(torch.randn(6))
    at = TorchGraph(nn.ModuleDict({"n": found})).modules()["n"]
    assert at.exact
    assert at.layer is not None
    x = torch.randn(3, 6)
    got = at.layer.apply(x.double().numpy(), at.layer.fold(found.weight.detach().double().numpy()), None)
    np.testing.assert_allclose(got, found(x).detach().numpy(), rtol=1e-5, atol=1e-6)  # a few roundings of float32


def test_a_norm_that_is_not_known_is_merged_and_not_run() -> None:
    class Own(nn.LayerNorm):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    for module in (Own(4), nn.GroupNorm(2, 4), nn.PReLU(4)):
        at = TorchGraph(nn.ModuleDict({"n": module})).modules()["n"]
        assert at.kind == NORM
        assert not at.exact
        model = numbers(ours(nn.ModuleDict({"n": module}), "n"), "n", 7.0)
        assert torch.all(merge(model).weight("n.weight") == 7)
        with pytest.raises(UnsupportedLayerError, match="not known"):
            forward(model, "n", torch.randn(2, 4))


def test_norms_of_torch_that_are_no_layer() -> None:
    for module in (nn.BatchNorm1d(4), nn.LayerNorm((3, 4)), nn.LayerNorm(4, elementwise_affine=False), nn.InstanceNorm1d(4)):
        assert TorchGraph(nn.ModuleDict({"n": module})).modules()["n"].kind == "other"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_default_targets_are_the_norms_of_the_architecture(name: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": 17}
    if name == "llama":
        sizes |= {"hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 3}
        net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    else:
        net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, n_embd=12, n_layer=2, n_head=3, n_positions=9))
    graph = TorchGraph(net)
    mine = add(adapt(graph), "default", AdapterConfig(method=LNTuning()), np.random.default_rng(0))
    kinds = {graph.modules()[module].kind for module in mine.adapters["default"].modules}
    assert kinds == {NORM}
    where = set(mine.adapters["default"].modules)
    model = peft.get_peft_model(net, peft.LNTuningConfig())
    assert where == set(model.base_model.targeted_module_names)


def test_a_bias_for_a_norm_that_has_none_is_refused() -> None:
    model = ours(base(), "r")
    old = model.adapters["default"].modules["r"].params
    with pytest.raises(KeyMismatchError, match=r"c came, and .* has none"):
        update(model, "default", {"r": old._replace(c=old.w[:, 0])})
