"""Small checkpoints with adapters that HF PEFT made, merged by PEFT and, as a plan says it, in memory."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra `hf` is not installed")
peft = pytest.importorskip("peft", reason="the extra `hf` is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from safetensors.torch import save_file  # noqa: E402

from peft_ref.checkpoints.plan import Plan, Planned  # noqa: E402
from peft_ref.files.safetensors import BITS, dtypes  # noqa: E402

NDArray = np.ndarray[Any, Any]
nn = torch.nn
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Net(nn.Module):  # type: ignore[misc]  # torch has no types here
    """One of each kind of layer, large enough that torch multiplies as it does at any size."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(48, 64), "up": nn.Linear(48, 32, bias=False)}) for _ in range(2)])
        self.conv1 = nn.Conv1d(16, 32, 3)
        self.conv2 = nn.Conv2d(16, 32, (3, 2), groups=groups)
        self.conv3 = nn.Conv3d(16, 16, 2)
        self.embed_tokens = nn.Embedding(80, 48)
        self.head = nn.Linear(64, 24)

    def forward(self, x: Any) -> Any:
        return x

    def prepare_inputs_for_generation(self) -> None: ...  # PEFT asks it of a causal language model


def llama(**changes: Any) -> Any:
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes}))


def gpt2() -> Any:
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def made(make: Callable[[], Any], dtype: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return make().to(DTYPES[dtype]).eval()


def saved_base(model: Any, folder: Path, size: str = "1GB") -> Path:
    """As transformers saves it; any other model as one file."""
    with quietly():
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder, max_shard_size=size)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def saved_adapter(model: Any, config: Any, folder: Path, seed: int = 1, dtype: str | None = None, deviation: float = 0.05) -> Path:
    """An adapter that was trained, by the look of it: what is trained is moved by noise."""
    torch.manual_seed(seed)
    tuned = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                moved = parameter.float() + torch.randn(parameter.shape) * deviation
                parameter.data = moved.to(parameter.dtype if dtype is None else DTYPES[dtype])
    tuned.save_pretrained(folder)
    return folder


def merged_by_peft(model: Any, adapters: Sequence[Path], rounding: str = "default", weights: Sequence[float] = ()) -> dict[str, NDArray]:
    """Every parameter of the merged model."""
    cast = rounding != "kept"
    base = copy.deepcopy(model)
    tuned = peft.PeftModel.from_pretrained(base, adapters[0], adapter_name="a0", autocast_adapter_dtype=cast)
    for n, folder in enumerate(adapters[1:], 1):
        tuned.load_adapter(folder, adapter_name=f"a{n}", autocast_adapter_dtype=cast)
    names = [f"a{n}" for n in range(len(adapters))]
    for name, weight in zip(names, weights, strict=False):
        for module in tuned.modules() if weight != 1 else ():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) and name in module.scaling:
                module.scaling[name] *= weight
    merged = tuned.merge_and_unload(safe_merge=rounding == "safe", adapter_names=names)
    unwrapped = {name.replace(".modules_to_save.a0.", "."): tensor for name, tensor in merged.state_dict().items()}  # LN tuning leaves them
    return {name: array_of(tensor) for name, tensor in unwrapped.items()}


def array_of(tensor: Any) -> NDArray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy()).view(dtypes()["BF16"])
    return np.asarray(tensor.numpy())


def carried_out(plan: Plan, block: int = 37) -> dict[str, NDArray]:
    """What a plan says, tensor by tensor, a few rows at a time."""
    return {t.name: _carried_out(t, block) for shard in plan.shards for t in shard.tensors}


def _carried_out(tensor: Planned, block: int) -> NDArray:
    stored, out = dtypes()[tensor.stored_dtype], dtypes()[tensor.dtype]
    data = tensor.path.read_bytes()[tensor.begin : tensor.end]
    rows = np.frombuffer(bytearray(data), stored).reshape(tensor.matrix)
    rows = rows.astype(out) if BITS[tensor.dtype] > BITS[tensor.stored_dtype] else rows
    for change in tensor.changes:
        opened = change.opened()
        assert opened.whole == change.whole()
        each = len(rows) if opened.whole else block
        rows = np.concatenate([opened(rows[first : first + each].copy(), first) for first in range(0, len(rows), each)])
    return rows.astype(out).reshape(tensor.shape)


def differing(a: Mapping[str, NDArray], b: Mapping[str, NDArray]) -> dict[str, int]:
    """By name, how many numbers are not the same to the bit."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    counts = {}
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        bits = f"u{a[name].dtype.itemsize}"
        counts[name] = int((np.ascontiguousarray(a[name]).view(bits) != np.ascontiguousarray(b[name]).view(bits)).sum())
    return {name: count for name, count in counts.items() if count}


def steps(a: NDArray, b: NDArray, base: NDArray) -> float:
    """The largest difference, in last places of the largest of the three numbers: a small sum of large ones is not asked for more."""
    info = {2: (8 if a.dtype == dtypes()["BF16"] else 11), 4: 24, 8: 53}[a.dtype.itemsize]
    wide = [x.astype(np.float64) for x in (a, b, base)]
    largest = np.maximum(np.maximum(abs(wide[0]), abs(wide[1])), abs(wide[2]))
    exponent = np.floor(np.log2(np.where(largest > 0, largest, 1.0)))
    return float((abs(wide[0] - wide[1]) / 2.0 ** (exponent - info + 1)).max(initial=0.0))


def config_in(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return data
