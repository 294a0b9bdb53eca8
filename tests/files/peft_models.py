"""Small models under PEFT, one of each kind of layer, for the tests of its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


from peft_ref.files.adapter import FILES, AdapterModule, spanned  # noqa: E402
from peft_ref.layers import Conv, Embedding, Layer, Linear  # noqa: E402
from peft_ref.methods import METHODS  # noqa: E402
from peft_ref.stack import Adapter, forward  # noqa: E402
from tests.methods import facts  # noqa: E402
from tests.methods.facts import Facts  # noqa: E402

nn = torch.nn


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

    def prepare_inputs_for_generation(self) -> None: ...  # PEFT asks it of a causal language model


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
    "adalora": (
        Net,
        lambda: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=9, target_modules=["q", "up", "conv2"], bias="all"),
    ),
    "gpt2 Conv1D adalora": (gpt2, lambda: peft.AdaLoraConfig(init_r=3, total_step=9, target_modules=["c_attn", "c_fc"])),
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
    **{label: (base or Net, config) for name in METHODS for label, (base, config) in facts(name).models.items()},
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
        return Linear(in_features=module.in_features, out_features=module.out_features, bias=module.bias is not None)
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
    """Every number that a file holds random; what it leaves out, or holds as places, as the method makes it."""
    config = spanned(config, modules, {})
    together: dict[str, np.ndarray[Any, Any]] = {}
    made = config.method.common(modules, {name: np.zeros(layer.shape) for name, layer in modules.items()}, rng)
    keys = config.method.shared_keys(tuple(modules))
    filled = {}
    for name, layer in modules.items():
        method, values = config.method_for(name), {}
        start = method.start(layer, np.zeros(layer.shape), rng, made.get(name)).params
        for s in method.spec(layer):
            value = getattr(start, s.field)
            if s.saved and value.dtype.kind == "f":
                value = rng.normal(size=s.shape)
            values[s.field] = together.setdefault(keys[name][s.field], value) if s.shared else value
        filled[name] = AdapterModule(method, layer, method.to_params(**values))
    return filled


def _drawn(own: Facts) -> Callable[[Any, dict[str, Any]], Any] | None:
    """How a method draws a configuration; one that does not say takes one of those that it gives for `Net`."""
    given = [config for base, config in own.models.values() if base is None]
    return own.random or ((lambda rng, common: given[rng.integers(len(given))]()) if given else None)


RANDOM = {name: drawn for name in METHODS.weights if (drawn := _drawn(facts(name))) is not None}


def random_peft_config(rng: np.random.Generator, name: str) -> Any:
    """A configuration of a method on weights, for `Net`."""
    common = {
        "target_modules": ["q", "up", "conv2"] if rng.integers(2) else r".*\.(q|up)",
        "exclude_modules": [None, ["head"], ".*head"][rng.integers(3)],
        "modules_to_save": [None, ["head"]][rng.integers(2)],
        "task_type": [None, "CAUSAL_LM"][rng.integers(2)],
        "base_model_name_or_path": [None, "a/b", "ü"][rng.integers(3)],
    }
    return RANDOM[name](rng, common)
