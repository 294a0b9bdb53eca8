"""target_parameters, saved embeddings and other bases in a plan, beside PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="the extra `hf` is not installed")

from safetensors.numpy import load_file, save_file

from peft_ref.checkpoints.plan import Source
from peft_ref.checkpoints.planning import plan
from peft_ref.errors import ConfigError, FileFormatError, KeyMismatchError, ShapeError
from peft_ref.files.safetensors import RawTensor, dtypes, serialize
from tests.checkpoints.beside_peft import (
    DTYPES,
    array_of,
    carried_out,
    differing,
    llama,
    made,
    merged_by_peft,
    nn,
    peft,
    saved_adapter,
    saved_base,
    steps,
    torch,
)

pytestmark = pytest.mark.usefixtures("quiet")


class Experts(nn.Module):  # type: ignore[misc]  # torch has no types here
    """Its parameters in an order that no checkpoint has, of a file's and the other."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        sizes = {"gate_up_proj": (3, 48, 32), "down_proj": (3, 16, 40)}
        for name in sorted(sizes, reverse=transposed):
            setattr(self, name, nn.Parameter(torch.randn(sizes[name]) / 7))


class Mixture(nn.Module):  # type: ignore[misc]
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": Experts(transposed), "q": nn.Linear(48, 64)}) for _ in range(2)])

    def forward(self, x: Any) -> Any:
        return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_an_adapter_on_bare_parameters_is_merged_into_every_expert(tmp_path: Path, dtype: str, transposed: bool) -> None:
    model = made(lambda: Mixture(transposed), dtype)
    base = saved_base(model, tmp_path / "base")
    (base / "config.json").write_text(json.dumps({"model_type": "gpt_oss"} if transposed else {}))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    adapter = saved_adapter(model, config, tmp_path / "adapter")
    for rounding in ("default", "safe"):
        theirs = merged_by_peft(model, [adapter], rounding)
        made_plan = plan(base, [Source(adapter)], rounding=rounding, exact=True)  # type: ignore[arg-type]
        for block in (7, 1000):  # rows of one expert, of several
            assert not differing(theirs, carried_out(made_plan, block))
    matrices = {t.name: t.matrix for t in made_plan.shards[0].tensors}
    assert matrices["layers.0.experts.gate_up_proj"] == (3 * 48, 32)
    assert matrices["layers.0.q.weight"] == (64, 48)
    broken = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(broken)
    name = next(n for n in tensors if "experts" in n and "lora_A" in n)
    save_file({n: (x[:, :-1] if n == name else x) for n, x in tensors.items()}, broken)
    with pytest.raises(ShapeError):
        plan(base, [Source(adapter)])
    save_file({n: x for n, x in tensors.items() if n != name}, broken)
    with pytest.raises(KeyMismatchError, match="missing"):
        plan(base, [Source(adapter)])


def test_saved_embeddings_take_the_place_of_the_frozen_ones_before_anything_is_added(tmp_path: Path) -> None:
    model = made(llama, "BF16")
    base = saved_base(model, tmp_path / "base")
    adapter = saved_adapter(model, peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]), tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    from peft_ref.files.safetensors import open_file

    tensors = {name: open_file(path).read(name) for name in open_file(path).entries}
    saved = next(name for name in tensors if "base_layer" in name)
    tensors[saved] = (tensors[saved].astype(np.float32) + 1).astype(dtypes()["BF16"])
    path.write_bytes(serialize(tensors, {"format": "pt"}))
    ours = carried_out(plan(base, [Source(adapter)], exact=True))
    assert not differing(merged_by_peft(model, [adapter]), ours)
    other = saved_adapter(model, peft.LoraConfig(r=4, target_modules=["embed_tokens"]), tmp_path / "other")
    with pytest.raises(ConfigError, match="not the same"):
        plan(base, [Source(adapter), Source(other)])
    wider = {**tensors, saved: np.zeros((101, 48), np.float32)}
    path.write_bytes(serialize(wider, {"format": "pt"}))
    with pytest.raises(ShapeError, match=r"\(101, 48\), and the base's.*\n.*resize"):
        plan(base, [Source(adapter)])


@pytest.mark.parametrize("stored", ["F8_E4M3", "F8_E5M2"])
def test_a_float8_base_is_computed_with_in_float32(tmp_path: Path, stored: str) -> None:
    """PEFT cannot: torch adds nothing to float8. What it makes of the same numbers in float32 is rounded once here."""
    model = made(llama, "F32")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = {n: array_of(x) for n, x in model.state_dict().items()}
    small = weights[name].astype(dtypes()[stored])
    model.state_dict()[name].copy_(torch.from_numpy(small.astype(np.float32)))
    base = saved_base(model, tmp_path / "base")
    path = base / "model.safetensors"
    path.write_bytes(serialize({**load_file(path), name: RawTensor(stored, small.shape, small.tobytes())}, {"format": "pt"}))
    adapter = saved_adapter(model, peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    ours = carried_out(plan(base, [Source(adapter)], exact=True))
    theirs = merged_by_peft(model, [adapter])
    theirs[name] = theirs[name].astype(dtypes()[stored])
    assert not differing(theirs, ours)


def test_a_float64_base_is_computed_with_in_float64(tmp_path: Path) -> None:
    model = llama().double()
    base = saved_base(model, tmp_path / "base")
    adapter = saved_adapter(model, peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    theirs, ours = merged_by_peft(model, [adapter]), carried_out(plan(base, [Source(adapter)]))
    for name in differing(theirs, ours):
        assert steps(theirs[name], ours[name], theirs[name]) <= 2
    with pytest.raises(ConfigError, match="float64"):
        plan(base, [Source(adapter)], exact=True)


def test_numbers_of_a_quantised_tensor_are_not_added_to(tmp_path: Path) -> None:
    from peft_ref.errors import NotMergeableError

    model = made(llama, "F32")
    base = saved_base(model, tmp_path / "base")
    path = base / "model.safetensors"
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({n: (np.zeros(x.shape, np.int8) if n == name else x) for n, x in load_file(path).items()}, path, {"format": "pt"})
    adapter = saved_adapter(model, peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    with pytest.raises(NotMergeableError, match="stored as I8: a quantised base"):
        plan(base, [Source(adapter)])


def test_a_file_that_changes_after_the_plan_is_noticed(tmp_path: Path) -> None:
    model = made(llama, "F32")
    base = saved_base(model, tmp_path / "base")
    adapter = saved_adapter(model, peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    made_plan = plan(base, [Source(adapter)])
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileFormatError, match="cut off since the plan was made"):
        carried_out(made_plan)
