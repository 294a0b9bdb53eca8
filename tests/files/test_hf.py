"""HF PEFT's files, live: what it writes we write back to the byte, what we write it loads and computes the same with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


from peft_ref.errors import PeftRefError  # noqa: E402
from peft_ref.files.adapter import (  # noqa: E402
    CONFIG,
    AdapterFile,
    adapter_names,
    all_tensors,
    load_adapter,
    save_adapter,
    state_dict,
)
from peft_ref.files.config import from_dict  # noqa: E402
from peft_ref.files.keys import PREFIX, shared_keys, with_adapter_name, without_adapter_name  # noqa: E402
from peft_ref.graph import TorchGraph  # noqa: E402
from peft_ref.layers import Linear  # noqa: E402
from peft_ref.methods import LoRA  # noqa: E402
from peft_ref.model import adapt, load  # noqa: E402
from peft_ref.stack import Adapter, forward  # noqa: E402
from tests.files.peft_models import (  # noqa: E402
    CASES,
    Net,
    adapted,
    assert_same_files,
    layer_of,
    our_output,
    random_input,
    tuned,
    with_random_parameters,
)
from tests.methods.widened import widen  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("quiet")]
nn = torch.nn


@pytest.mark.parametrize("case", CASES)
def test_what_peft_writes_is_written_back_to_the_byte(tmp_path: Path, case: str) -> None:
    model = adapted(case)
    model.save_pretrained(tmp_path / "hf")
    adapter = load_adapter(tmp_path / "hf")
    save_adapter(tmp_path / "ours", adapter)
    assert_same_files(tmp_path / "hf", tmp_path / "ours")
    layers = {name: layer_of(m) for name, m in tuned(model).items()}
    with_layers = load_adapter(tmp_path / "hf", layers=layers)
    save_adapter(tmp_path / "hf", with_layers)  # over PEFT's own
    assert_same_files(tmp_path / "hf", tmp_path / "ours")
    beside = {name for name in layers if any(s.saved and not s.shared for s in adapter.config.method_for(name).spec(layers[name]))}
    assert adapter.modules.keys() == beside


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_half_or_double_adapter_is_written_back_to_the_byte(tmp_path: Path, dtype: str) -> None:
    model = adapted("modules_to_save").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "hf")
    save_adapter(tmp_path / "ours", load_adapter(tmp_path / "hf"))
    assert_same_files(tmp_path / "hf", tmp_path / "ours")


@pytest.mark.parametrize("case", CASES)
def test_our_parameters_are_peft_s(tmp_path: Path, case: str) -> None:
    """The file and its parts, against PEFT's own reading of it."""
    model = adapted(case)
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    theirs = peft.get_peft_model_state_dict(model)
    ours = all_tensors(adapter)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor.numpy())


OURS = [case for case in CASES if case not in ("gpt2 ia3 by default", "llama tied")]  # the first needs PEFT to fill its targets


@pytest.mark.parametrize("case", OURS)
def test_what_we_write_peft_loads_and_computes_the_same(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    widen(monkeypatch)
    torch.manual_seed(11)
    make, config = CASES[case]
    base = make().to(torch.float64)
    flat = json.loads(json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in config().to_dict().items()}))
    ours = from_dict(flat)
    rng = np.random.default_rng(4)
    probe = peft.get_peft_model(make().to(torch.float64), config())
    layers = {name: layer_of(m) for name, m in tuned(probe).items()}
    modules = with_random_parameters(ours, layers, rng)
    extra = {k: v for k, v in peft.get_peft_model_state_dict(probe).items() if not k.rpartition(".")[0].endswith(("lora_A", "lora_B"))}
    own = state_dict(modules)
    saved = {
        k: rng.normal(size=v.shape)
        for k, v in extra.items()
        if k not in own and ".".join(k.split(".")[2:-1]) not in layers and ours.method.tuner_prefix not in k
    }
    before = {k: v.clone() for k, v in base.state_dict().items()}
    kept = {k: v.numpy() for k, v in extra.items() if k in saved and "base_layer" in k}  # the base's own bias or table
    kept = {k: before[k.removeprefix(PREFIX).replace(".base_layer", "")].numpy() for k in kept}
    save_adapter(tmp_path, AdapterFile(config=ours, modules=modules, modules_to_save={**saved, **kept}))

    model = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    state = model.state_dict()
    with torch.no_grad():
        for name, module in modules.items():
            tuner = model.base_model.model.get_submodule(name)
            x = random_input(module.layer, rng)
            theirs = tuner(torch.from_numpy(x))
            np.testing.assert_allclose(our_output(module, tuner.base_layer, x), theirs.numpy(), rtol=1e-10, atol=1e-10, err_msg=name)
    for key, tensor in saved.items():
        name = key.removeprefix(PREFIX)
        module_path, _, last = name.rpartition(".")
        stored = state.get(key, state.get(f"{PREFIX}{module_path}.modules_to_save.default.{last}"))
        assert stored is not None, key
        if key not in kept:
            np.testing.assert_array_equal(stored.numpy(), tensor)
    for key, tensor in before.items():  # and loading left the frozen weights alone
        at = state.get(PREFIX + key, state.get(PREFIX + ".base_layer.".join(key.rsplit(".", 1))))
        if at is not None and PREFIX + key not in saved and not key.endswith("bias"):
            np.testing.assert_array_equal(at.numpy(), tensor.numpy())


@pytest.mark.parametrize("case", OURS)
def test_peft_misses_no_key_of_what_we_write_and_finds_none_too_many(tmp_path: Path, case: str) -> None:
    make, _ = CASES[case]
    model = adapted(case)
    model.save_pretrained(tmp_path / "hf")
    loaded = load_adapter(tmp_path / "hf")
    rng = np.random.default_rng(6)
    fresh = with_random_parameters(loaded.config, {name: layer_of(m) for name, m in tuned(model).items()}, rng)
    save_adapter(tmp_path / "ours", AdapterFile(**{**vars(loaded), "modules": fresh, "shared": {}}))
    target = peft.get_peft_model(make(), peft.PeftConfig.from_pretrained(str(tmp_path / "ours")))
    result = peft.set_peft_model_state_dict(target, peft.load_peft_weights(str(tmp_path / "ours"), device="cpu"))
    assert result.unexpected_keys == []
    prefix = loaded.config.method.tuner_prefix
    shared = shared_keys(type(loaded.config.method))  # PEFT holds it beside every layer too
    missing = [k for k in result.missing_keys if not any(f".{key}." in k for key in shared)]
    assert [k for k in missing if prefix in k or "modules_to_save.default" in k] == []


@pytest.mark.parametrize("init", ["eva", "lora_ga", "pissa_niter_16", "pissa", "olora", "orthogonal", "gaussian", False])
def test_a_saved_adapter_of_any_init_computes_what_peft_computes_after_loading(tmp_path: Path, init: str | bool) -> None:
    torch.manual_seed(1)
    base = Net()
    frozen = {name: base.get_submodule(name).weight.detach().numpy().astype(np.float64) for name in ("layers.0.q", "layers.1.q")}
    extra = {"lora_ga_config": {"direction": "ArB2r"}} if init == "lora_ga" else {}
    config = from_dict({"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q"], "init_lora_weights": init, **extra})
    rng = np.random.default_rng(2)
    layer = Linear(in_features=6, out_features=10)
    modules = with_random_parameters(config, dict.fromkeys(frozen, layer), rng)
    save_adapter(tmp_path, AdapterFile(config=config, modules=modules))
    model = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    for name, module in modules.items():
        tuner = model.base_model.model.get_submodule(name)
        W = module.method.init(layer, frozen[name], rng).W  # an init that changes the frozen weight does so again on loading
        x = rng.normal(size=(3, 6))
        ours = forward(layer, W, tuner.base_layer.bias.detach().numpy(), [Adapter(module.method, module.params)], x)
        theirs = tuner(torch.from_numpy(x.astype(np.float32))).detach().numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-4)


def test_peft_cannot_load_a_corda_adapter_without_its_data(tmp_path: Path) -> None:
    config = from_dict({"peft_type": "LORA", "target_modules": ["q"], "init_lora_weights": True})
    layer = Linear(in_features=6, out_features=10)
    modules = with_random_parameters(config, {f"layers.{i}.q": layer for i in range(2)}, np.random.default_rng(0))
    save_adapter(tmp_path, AdapterFile(config=config, modules=modules))
    (tmp_path / CONFIG).write_text((tmp_path / CONFIG).read_text().replace('"init_lora_weights": true', '"init_lora_weights": "corda"'))
    with pytest.raises(ValueError, match="preprocess_corda"):
        peft.PeftModel.from_pretrained(Net(), str(tmp_path))
    assert load_adapter(tmp_path).config.method_for("layers.0.q") == LoRA(init_lora_weights="corda")  # a file is read without a model
    with pytest.raises(PeftRefError, match="corda"):
        load(adapt(TorchGraph(Net())), tmp_path)


def test_several_adapters_are_saved_where_peft_saves_them(tmp_path: Path) -> None:
    model = adapted("lora")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q"]))
    model.save_pretrained(tmp_path / "hf")
    assert adapter_names(tmp_path / "hf") == ("default", "other")
    for name in ("default", "other"):
        save_adapter(tmp_path / "ours", load_adapter(tmp_path / "hf", name), name)
    assert_same_files(tmp_path / "hf", tmp_path / "ours")
    assert_same_files(tmp_path / "hf" / "other", tmp_path / "ours" / "other")


def test_beside_an_adapter_called_0_peft_loses_what_structure_keeps(tmp_path: Path) -> None:
    model = adapted("dora")
    model.add_adapter("0", peft.LoraConfig(r=2, use_dora=True, target_modules=["q", "table"]))
    memory = [k for k in model.state_dict() if ".lora_" in k]
    theirs = set(peft.get_peft_model_state_dict(model))
    ours = {without_adapter_name(k, "default", "lora_") for k in memory if without_adapter_name(k, "default", "lora_") != k}
    assert theirs < ours  # PEFT's own mistake: every layers.0 key is gone
    assert {k for k in ours - theirs if not k.startswith(f"{PREFIX}layers.0.")} == set()
    assert {with_adapter_name(k, "default", "lora_") for k in ours} < set(memory)


@pytest.mark.parametrize("case", ["lora", "glora", "peanut deep", "deft", "adamss"])
def test_an_adapters_name_stands_in_its_keys_where_peft_has_it(case: str) -> None:
    """peanut_encoders.<adapter>.0.weight: a list's number comes after the name."""
    _, config = CASES[case]
    method = from_dict(json.loads(json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in config().to_dict().items()}))).method
    model = adapted(case)
    saved = [k for k in peft.get_peft_model_state_dict(model) if f".{method.tuner_prefix}" in k]
    assert saved
    for key in saved:
        named = with_adapter_name(key, "default", method.tuner_prefix)
        assert named in model.state_dict()
        assert without_adapter_name(named, "default", method.tuner_prefix) == key
