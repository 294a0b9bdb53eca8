"""HF PEFT's files, live: what it writes we write back to the byte, what we write it loads and computes the same with."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.utils.other import get_pattern_key  # noqa: E402

from peft_ref.contracts import Method  # noqa: E402
from peft_ref.errors import PeftRefError  # noqa: E402
from peft_ref.files.adapter import (  # noqa: E402
    CONFIG,
    FILES,
    WEIGHTS,
    AdapterFile,
    AdapterModule,
    adapter_names,
    all_tensors,
    load_adapter,
    save_adapter,
)
from peft_ref.files.config import from_dict, parse, render  # noqa: E402
from peft_ref.files.keys import PREFIX, with_adapter_name, without_adapter_name  # noqa: E402
from peft_ref.files.rules import TASK_TYPES, field_names  # noqa: E402
from peft_ref.layers import Conv, Embedding, Layer, Linear  # noqa: E402
from peft_ref.methods import METHODS  # noqa: E402
from peft_ref.stack import Adapter, forward  # noqa: E402

pytestmark = pytest.mark.hf
nn = torch.nn


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(nn.Module):  # type: ignore[misc]  # torch has no types here
    """One of each kind of layer, with unequal sizes, and numbers in the names."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(6, 10), "up": nn.Linear(6, 5, bias=False)}) for _ in range(2)])
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(4, 8, (3, 2), stride=2, padding=1, groups=groups)
        self.conv3 = nn.Conv3d(2, 3, 2)
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(10, 3)

    def forward(self, name: str, x: Any) -> Any:
        return self.get_submodule(name)(x)


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=13, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def llama(**changes: Any) -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 13}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **changes))


def classifier() -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 13}
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes, pad_token_id=0))


EVERY = ["q", "up", "conv1", "conv2", "conv3", "table"]
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "lora": (Net, lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=EVERY)),
    "rslora": (Net, lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules=["q"])),
    "lora_bias": (Net, lambda: peft.LoraConfig(r=4, lora_bias=True, target_modules=["q", "conv2"])),
    "patterns": (
        Net,
        lambda: peft.LoraConfig(r=4, rank_pattern={r"layers\.1\.q": 2, "up": 3}, alpha_pattern={"q": 5}, target_modules=["q", "up"]),
    ),
    "grouped conv": (lambda: Net(groups=2), lambda: peft.LoraConfig(r=4, target_modules=["conv2"])),
    "dora": (Net, lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=EVERY)),
    "modules_to_save": (Net, lambda: peft.LoraConfig(r=4, target_modules=["q"], modules_to_save=["head"])),
    "bias all": (Net, lambda: peft.LoraConfig(r=4, target_modules=["q", "conv2"], bias="all")),
    "bias lora_only": (Net, lambda: peft.LoraConfig(r=4, target_modules=["q", "up"], bias="lora_only", lora_bias=True)),
    "a pattern as target": (Net, lambda: peft.LoraConfig(target_modules=r"layers\.\d\.q")),
    "eva": (Net, lambda: peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(), target_modules=["q"])),
    # PEFT keeps LoHa's scale as a float32, so only a dyadic one can be compared in float64
    "loha": (Net, lambda: peft.LoHaConfig(r=4, alpha=6, rank_pattern={"q": 2}, target_modules=["q", "up", "conv1", "conv2"])),
    "loha conv of one": (lambda: nn.ModuleDict({"c": nn.Conv2d(4, 6, 1)}), lambda: peft.LoHaConfig(r=4, target_modules=["c"])),
    "ia3": (
        Net,
        lambda: peft.IA3Config(target_modules=["q", "up", "conv2", "conv3"], feedforward_modules=["up", "conv3"], modules_to_save=["head"]),
    ),
    "gpt2 Conv1D": (gpt2, lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn", "c_fc"], bias="all")),
    "gpt2 Conv1D dora": (gpt2, lambda: peft.LoraConfig(target_modules=["c_proj"], use_dora=True)),
    "gpt2 ia3 by default": (gpt2, lambda: peft.IA3Config(task_type="CAUSAL_LM")),
    "gpt2 table": (gpt2, lambda: peft.LoraConfig(target_modules=["wte", "wpe"])),
    "llama all-linear": (llama, lambda: peft.LoraConfig(target_modules="all-linear", layers_to_transform=None)),
    "llama layers": (llama, lambda: peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")),
    "llama embeddings": (llama, lambda: peft.LoraConfig(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "llama tied": (lambda: llama(tie_word_embeddings=True), lambda: peft.LoraConfig(target_modules=["embed_tokens"], use_dora=True)),
    "classifier": (classifier, lambda: peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])),
}


def adapted(case: str, seed: int = 3, dtype: Any = None) -> Any:
    """A PEFT model whose adapter and saved parameters are random, in no place zero or one."""
    torch.manual_seed(seed)
    make, config = CASES[case]
    model = peft.get_peft_model(make() if dtype is None else make().to(dtype), config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    return model


def layer_of(module: Any) -> Layer:
    module = getattr(module, "base_layer", module)
    if isinstance(module, nn.Embedding):
        return Embedding(num_embeddings=module.num_embeddings, embedding_dim=module.embedding_dim)
    if isinstance(module, nn.Linear):
        return Linear(in_features=module.in_features, out_features=module.out_features)
    if isinstance(module, transformers.pytorch_utils.Conv1D):
        return Linear(in_features=module.weight.shape[0], out_features=module.weight.shape[1], transposed=True)
    return Conv(
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel_size=module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
    )


def tuned(model: Any) -> dict[str, Any]:
    """The modules that an adapter is on, under the base model's names."""
    found = model.base_model.model.named_modules()
    return {name: m for name, m in found if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)}


def assert_same_files(a: Path, b: Path) -> None:
    for name in FILES:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


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
    assert adapter.modules.keys() == layers.keys()


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


def random_input(layer: Layer, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    if isinstance(layer, Embedding):
        return rng.integers(0, layer.num_embeddings, (2, 3))
    return rng.normal(size=(2, layer.channels, *(7,) * len(layer.kernel_size)))


def our_output(module: AdapterModule, base: Any, x: np.ndarray[Any, Any]) -> Any:
    weight = base.weight.detach().numpy()
    bias = getattr(base, "bias", None)
    return forward(
        module.layer,
        module.layer.fold(weight),
        None if bias is None else bias.detach().numpy(),
        [Adapter(module.method, module.params)],
        x,
    )


def with_random_parameters(config: Any, modules: dict[str, Layer], rng: np.random.Generator) -> dict[str, AdapterModule]:
    def fill(method: Method[Any], layer: Layer) -> AdapterModule:
        return AdapterModule(method, layer, method.to_params(**{s.field: rng.normal(size=s.shape) for s in method.spec(layer)}))

    return {name: fill(config.method_for(name), layer) for name, layer in modules.items()}


OURS = [case for case in CASES if case not in ("gpt2 ia3 by default", "llama tied")]  # the first needs PEFT to fill its targets


@pytest.mark.parametrize("case", OURS)
def test_what_we_write_peft_loads_and_computes_the_same(tmp_path: Path, case: str) -> None:
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
    saved = {k: rng.normal(size=v.shape) for k, v in extra.items() if ".".join(k.split(".")[2:-1]) not in layers and "lora_" not in k}
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
    fresh = with_random_parameters(loaded.config, {name: m.layer for name, m in loaded.modules.items()}, rng)
    save_adapter(tmp_path / "ours", AdapterFile(**{**vars(loaded), "modules": fresh}))
    target = peft.get_peft_model(make(), peft.PeftConfig.from_pretrained(str(tmp_path / "ours")))
    result = peft.set_peft_model_state_dict(target, peft.load_peft_weights(str(tmp_path / "ours"), device="cpu"))
    assert result.unexpected_keys == []
    prefix = loaded.config.method.tuner_prefix
    assert [k for k in result.missing_keys if prefix in k or "modules_to_save.default" in k] == []


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
    with pytest.raises(PeftRefError, match="corda"):
        load_adapter(tmp_path)


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


@pytest.mark.parametrize("name", METHODS)
def test_an_absent_key_has_peft_s_default(name: str) -> None:
    method = METHODS[name]
    theirs = {"LORA": peft.LoraConfig, "LOHA": peft.LoHaConfig, "IA3": peft.IA3Config}.get(method.peft_type)
    if theirs is None:
        pytest.skip(f"{method.peft_type} has no row here yet")
    ours = from_dict({"peft_type": method.peft_type, **({method.flag: True} if method.flag else {})})
    default = theirs()
    for field in field_names(method):
        if field != "is_feedforward":
            assert getattr(ours.method, field) == getattr(default, field), field
    for part in (ours.targets, ours.patterns):
        for field in field_names(type(part)):
            if hasattr(default, field):
                assert getattr(part, field) == getattr(default, field), field


def test_the_task_types_are_peft_s() -> None:
    assert tuple(t.value for t in peft.TaskType) == TASK_TYPES


def test_peft_refuses_what_we_refuse() -> None:
    for arguments in (
        {"lora_bias": True, "use_dora": True},
        {"lora_bias": True, "init_lora_weights": "gaussian"},
        {"layers_pattern": "h"},
        {"target_modules": "q", "layers_to_transform": [0]},
        {"target_modules": "q", "layers_pattern": "h", "layers_to_transform": None},
        {"use_dora": True, "megatron_config": {"a": 1}},
        {"task_type": "COOKING"},
    ):
        with pytest.raises(ValueError):
            peft.LoraConfig(**arguments)
        with pytest.raises(PeftRefError):
            from_dict({"peft_type": "LORA", **arguments})
    with pytest.raises(ValueError, match="subset"):
        peft.IA3Config(target_modules=["q"], feedforward_modules=["w"])
    for arguments in ({"r": 0}, {"rank_pattern": {"q": 0}}, {"bias": "some"}, {"init_lora_weights": "magic"}):
        with pytest.raises((ValueError, NotImplementedError, AttributeError)):
            peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["q"], **arguments))
        with pytest.raises(PeftRefError):
            from_dict({"peft_type": "LORA", "target_modules": ["q"], **arguments})


def random_config(rng: np.random.Generator) -> Any:
    keys = ["q", "up", "layers.0.q", r"layers\.[01]\.up", r".*\.q", "conv2", "nothing"]

    def pattern() -> dict[str, int]:
        return {keys[i]: int(rng.integers(1, 9)) for i in rng.permutation(len(keys))[: rng.integers(0, 4)]}

    targets = ["q", "up", "conv2"] if rng.integers(2) else r".*\.(q|up)"
    common = {
        "target_modules": targets,
        "exclude_modules": [None, ["head"], ".*head"][rng.integers(3)],
        "modules_to_save": [None, ["head"]][rng.integers(2)],
        "task_type": [None, "CAUSAL_LM"][rng.integers(2)],
        "base_model_name_or_path": [None, "a/b", "ü"][rng.integers(3)],
    }
    kind = rng.integers(3)
    if kind == 0:
        dora = bool(rng.integers(2))
        layers = {} if isinstance(targets, str) else {"layers_to_transform": [None, 1, [0, 1]][rng.integers(3)]}
        return peft.LoraConfig(
            r=int(rng.integers(1, 65)),
            lora_alpha=[8, 2.5, 1e-7][rng.integers(3)],
            lora_dropout=float(rng.random()),
            use_rslora=bool(rng.integers(2)),
            use_dora=dora,
            lora_bias=not dora and bool(rng.integers(2)),
            bias=str(rng.choice(["none", "all", "lora_only"])),
            rank_pattern=pattern(),
            alpha_pattern=pattern(),
            **layers,
            **common,
        )
    if kind == 1:
        return peft.LoHaConfig(r=int(rng.integers(1, 9)), alpha=3, rank_pattern=pattern(), alpha_pattern=pattern(), **common)
    return peft.IA3Config(feedforward_modules=[["up"], [], r".*\.up", None][rng.integers(4)], **common)


def test_random_configurations_of_peft_are_written_back_to_the_byte_and_mean_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(31)
    names = ["layers.0.q", "layers.1.q", "layers.0.up", "layers.1.up", "conv2", "q", "xq"]
    for i in range(150):
        theirs = random_config(rng)
        theirs.save_pretrained(str(tmp_path))
        text = (tmp_path / CONFIG).read_text()
        ours = parse(text)
        assert render(ours) == text, i
        theirs = peft.PeftConfig.from_pretrained(str(tmp_path))  # PEFT sorts the patterns when it saves
        for field in field_names(type(ours.method)):
            if field != "is_feedforward":
                assert getattr(ours.method, field) == getattr(theirs, field)
        for name in names:
            if theirs.peft_type == "IA3":
                if theirs.feedforward_modules is not None:
                    expected = peft.IA3Model._check_target_module_feedforward(theirs, name)
                    assert ours.method_for(name).is_feedforward == expected  # type: ignore[attr-defined]
                continue
            method: Any = ours.method_for(name)
            alpha = "lora_alpha" if theirs.peft_type == "LORA" else "alpha"
            assert method.r == theirs.rank_pattern.get(get_pattern_key(list(theirs.rank_pattern), name), theirs.r)
            key = get_pattern_key(list(theirs.alpha_pattern), name)
            assert getattr(method, alpha) == theirs.alpha_pattern.get(key, getattr(theirs, alpha))


def test_saving_with_peft_can_change_which_pattern_is_first(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q"], rank_pattern={"q": 2, "layers.0.q": 3})
    config.save_pretrained(str(tmp_path))
    after = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert get_pattern_key(list(config.rank_pattern), "layers.0.q") == "q"
    assert get_pattern_key(list(after.rank_pattern), "layers.0.q") == "layers.0.q"
    ours = from_dict({"peft_type": "LORA", "rank_pattern": {"q": 2, "layers.0.q": 3}})
    (tmp_path / CONFIG).write_text(render(ours))
    read = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert get_pattern_key(list(read.rank_pattern), "layers.0.q") == "q"  # what we write keeps its meaning


def test_torch_writes_the_same_bytes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from peft_ref.files.safetensors import open_file, serialize

    torch.manual_seed(0)
    dtypes = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int8", "uint8", "bool"]
    tensors = {f"{i}.{d}": (torch.randn(3, i + 1) * 3).to(getattr(torch, d)) for i, d in enumerate(dtypes)}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    file = open_file(tmp_path / WEIGHTS)
    arrays = {name: file.read(name) for name in file.entries}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(arrays[name].astype(np.float64), tensor.to(torch.float64).numpy())
    assert serialize(arrays, file.metadata) == (tmp_path / WEIGHTS).read_bytes()
    assert os.path.getsize(tmp_path / WEIGHTS) == file.path.stat().st_size
